// The scan of a certified gate's sketch. Reference: CertifiedGate.upper in gates/certified.py, which has the bound.
#include <algorithm>
#include <atomic>
#include <thread>

#include "common.h"
#include "gate.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int GROUP = 64, MAX_TOKENS = 8;
constexpr int64_t TILE_WEIGHTS = 1 << 18;  // scanned between two looks at what was found

struct Sketch {
  const uint8_t *nibbles;      // [n, groups * 32]: upper 4 bits of 64 codes; byte j has those of codes j and j + 32
  const uint64_t *planes[4];   // [n, groups] each: the next bits; bit j is that of code j
  const uint16_t *step;        // [n, groups] bf16: the step of 4 bits
  const float *norm, *bias;    // [n]; bias may be null
  int64_t groups;
  int bits;
};

struct Inputs {
  int64_t T;                                     // at most MAX_TOKENS
  const float *x;                                // [T, groups * 64], zero-padded
  const float *constant, *squares, *norms;       // [T, groups]: what codes leave out; |x_g|^2 and |x_g| from above
  const float *size;                             // [T]: |x|, infinite where the token is not judged
  uint8_t mark, last_mark;                       // of a neuron that one of them wants; that the last one wants
  float tail, gamma, per_norm, tiny, unit, threshold;  // tail < 0: the deterministic bound alone
  float *near;                                   // [n] <- how near to firing the last token brings a neuron; or null
  const int32_t *list;                           // the neurons to look at; null for all
  // Of one token, for the scan in whole numbers: x = scale * (256 * high + low), but for `rest` in norm.
  const int8_t *high, *low;  // [groups * 64] in the order of `Whole`, null where the scan is in floats
  const float *scale;        // [groups, up to a multiple of 16]
  float rest;
  const float *planes_constant;  // [groups]: what the codes' lower bits leave out
  float upper_tail;              // `tail` of the upper 4 bits; NaN where they do not decide alone
};

// Where `Whole` has entry j of group g. A pair of groups takes 128 places: the first 32 of either, then the last 32 of
// either, as 64 bytes of nibbles have their codes.
INLINE int64_t place(int64_t g, int64_t j) { return g / 2 * 2 * GROUP + j / 32 * GROUP + g % 2 * 32 + j % 32; }

// One token in whole numbers.
struct Whole {
  std::vector<int8_t> high, low;
  Floats scale;
  float rest = 0;

  Whole(const float *x, int64_t groups)
      : high(static_cast<size_t>((groups + 1) / 2 * 2 * GROUP)), low(high.size()), scale(groups + 16) {
    double squares = 0;
    for (int64_t g = 0; g < groups; g++) {
      const float *from = x + g * GROUP;
      float largest = 0;
      for (int j = 0; j < GROUP; j++) largest = std::fabs(from[j]) > largest ? std::fabs(from[j]) : largest;
      const float unit = largest / 32512, times = unit >= 0x1p-100f ? 1 / unit : 0;
      scale.data()[g] = unit;
      for (int j = 0; j < GROUP; j++) {
        const size_t at = static_cast<size_t>(place(g, j));
        const int32_t v = static_cast<int32_t>(std::lrint(from[j] * times)), upper = (v + 128) >> 8;
        high[at] = static_cast<int8_t>(upper), low[at] = static_cast<int8_t>(v - 256 * upper);
        const double off = static_cast<double>(from[j]) - static_cast<double>(unit) * v;
        squares += off * off;
      }
    }
    rest = static_cast<float>(std::sqrt(squares) * (1 + 0x1p-20));
  }

  // What the entries of group g sum to.
  float sum(int64_t g) const {
    int32_t all = 0;
    for (int j = 0; j < GROUP; j++) {
      const size_t at = static_cast<size_t>(place(g, j));
      all += 256 * high[at] + low[at];
    }
    return scale.data()[g] * static_cast<float>(all);
  }
};

INLINE uint64_t word(const uint64_t *plane, int64_t at) {
  uint64_t bits;
  std::memcpy(&bits, plane + at, sizeof bits);
  return bits;
}

// The most that neuron i can be for token t, by `bits` of its code. `score` is in steps of 4 bits, as `squares` and `sure`.
INLINE float most(const Sketch *s, const Inputs *in, int bits, float tail, int64_t i, int64_t t, float score, float squares,
                  float sure) {
  const float fine = 1.0f / static_cast<float>(1 << (bits - 4));
  float bound = 4 * sure * fine;
  if (tail >= 0) {
    const float h = std::sqrt(tail * squares) * fine;
    bound = h < bound ? h : bound;
  }
  float v = score + bound * (1 + 1.0f / 4096) + in->size[t] * (s->norm[i] * in->per_norm + in->tiny);
  v += s->norm[i] * in->rest;
  v += in->unit * std::fabs(v);
  if (s->bias) {
    v += s->bias[i] + in->gamma * std::fabs(s->bias[i]);
    v += in->unit * std::fabs(v);
  }
  return v;
}

INLINE bool reaches(const Inputs *in, float v) { return !(v <= in->threshold); }  // NaN wants every neuron

INLINE int64_t neuron(const Inputs *in, int64_t k) { return in->list ? in->list[k] : k; }

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace {

template <int BITS> INLINE __m512i codes(const Sketch *s, int64_t at) {  // those of group `at`, 0 to 2^BITS - 1
  const __m256i n = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(s->nibbles + at * 32));
  __m512i c = _mm512_inserti64x4(_mm512_castsi256_si512(n), _mm256_srli_epi16(n, 4), 1);
  c = _mm512_slli_epi16(_mm512_and_si512(c, _mm512_set1_epi8(15)), BITS - 4);
  for (int k = 0; k < BITS - 4; k++)
    c = _mm512_mask_add_epi8(c, word(s->planes[k], at), c, _mm512_set1_epi8(static_cast<char>(1 << (BITS - 5 - k))));
  return c;
}

}  // namespace
#pragma GCC pop_options
#endif

#define LOOPS "gate_loops.h"
#include "each_level.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WHOLE 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vnni")
namespace {

// A neuron whose upper bits do not decide: its score in steps of 4 bits, and what bounds it.
struct Undecided {
  int64_t i;
  float score, squares, sure;
};

INLINE __m512 steps16(const uint16_t *from, int64_t n) {  // the next 16 of n steps, 0 beyond
  const __mmask16 some = n < 16 ? static_cast<__mmask16>((1u << n) - 1) : 0xffff;
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from)), 16);
}

INLINE __m512 some16(const float *from, int64_t n) {
  return _mm512_maskz_loadu_ps(n < 16 ? static_cast<__mmask16>((1u << n) - 1) : 0xffff, from);
}

// What the upper 4 bits of N neurons' codes give them, in steps of 4 bits; `ahead`: those that come next.
template <int N>
INLINE void by_nibbles(const Sketch *s, const Inputs *in, const int32_t *who, const int32_t *ahead, float *factors,
                       Undecided *out) {
  const int64_t groups = s->groups, padded = (groups + 15) / 16 * 16;
  __m512 sums[N];
  for (int r = 0; r < N; r++) {
    const uint16_t *steps = s->step + who[r] * groups;
    fetch(s->step + ahead[r] * groups);
    __m512 squares = _mm512_setzero_ps(), sure = _mm512_setzero_ps();
    sums[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g += 16) {
      const int64_t n = groups - g;
      const __m512 step = steps16(steps + g, n);
      _mm512_storeu_ps(factors + r * padded + g, _mm512_mul_ps(step, _mm512_loadu_ps(in->scale + g)));
      sums[r] = _mm512_fmadd_ps(step, some16(in->constant + g, n), sums[r]);
      squares = _mm512_fmadd_ps(_mm512_mul_ps(step, step), some16(in->squares + g, n), squares);
      sure = _mm512_fmadd_ps(step, some16(in->norms + g, n), sure);
    }
    out[r] = {who[r], 0, _mm512_reduce_add_ps(squares), _mm512_reduce_add_ps(sure)};
  }
  const __m512i nibble = _mm512_set1_epi8(15), second = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  for (int64_t g = 0; g < groups; g += 2) {
    const __mmask64 both = g + 1 < groups ? ~0ull : 0xffffffffull;
    const __m512i lane = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(g % 16)), second);
    const int8_t *high = in->high + g * GROUP, *low = in->low + g * GROUP;
    const __m512i h0 = _mm512_loadu_si512(high), h1 = _mm512_loadu_si512(high + GROUP);
    const __m512i l0 = _mm512_loadu_si512(low), l1 = _mm512_loadu_si512(low + GROUP);
    for (int r = 0; r < N; r++) {
      fetch(s->nibbles + (ahead[r] * groups + g) * 32);
      const __m512i codes = _mm512_maskz_loadu_epi8(both, s->nibbles + (who[r] * groups + g) * 32);
      const __m512i first = _mm512_and_si512(codes, nibble), last = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
      __m512i sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), first, h0), last, h1);
      sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), first, l0), last, l1);
      const __m512 factor = _mm512_permutexvar_ps(lane, _mm512_loadu_ps(factors + r * padded + g / 16 * 16));
      sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, sums[r]);
    }
  }
  for (int r = 0; r < N; r++) out[r].score = _mm512_reduce_add_ps(sums[r]);
}

template <int BITS> INLINE __m512i lower_bits(const Sketch *s, int64_t at) {  // of the codes of group `at`
  __m512i c = _mm512_setzero_si512();
  for (int k = 0; k < BITS - 4; k++)
    c = _mm512_mask_add_epi8(c, word(s->planes[k], at), c, _mm512_set1_epi8(static_cast<char>(1 << (BITS - 5 - k))));
  return c;
}

INLINE __m512i entries(const int8_t *x, int64_t g) {  // the 64 of group g, in order
  const int8_t *from = x + place(g, 0);
  const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + GROUP)), 1);
}

// What the lower bits of a neuron's codes add to its score, in steps of all bits.
template <int BITS> INLINE float by_planes(const Sketch *s, const Inputs *in, int64_t i) {
  __m512 sum = _mm512_setzero_ps();
  float constant = 0;
  for (int64_t g = 0; g < s->groups; g++) {
    const float step = from_bf16(s->step[i * s->groups + g]);
    constant += step * in->planes_constant[g];
    const __m512i codes = lower_bits<BITS>(s, i * s->groups + g);
    __m512i part = _mm512_dpbusd_epi32(_mm512_setzero_si512(), codes, entries(in->high, g));
    part = _mm512_dpbusd_epi32(_mm512_slli_epi32(part, 8), codes, entries(in->low, g));
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part), _mm512_set1_ps(step * in->scale[g]), sum);
  }
  return constant + _mm512_reduce_add_ps(sum);
}

// The scan of one token in whole numbers, codes of 4 bits times inputs of 16, which AVX512-VNNI sums four at a time. Most
// neurons are silent by the upper 4 bits of their codes, and the others' planes are looked at only then.
template <int BITS> void scan_whole(const Sketch *s, const Inputs *in, int64_t begin, int64_t end, uint8_t *wanted) {
  constexpr int N = 8;  // at a time: they share the loads of the inputs
  static thread_local std::vector<int32_t> who;  // they keep their memory from tile to tile
  static thread_local std::vector<Undecided> undecided;
  static thread_local std::vector<float> factors;
  who.clear(), undecided.clear();
  for (int64_t k = begin; k < end; k++)
    if (!wanted[neuron(in, k)]) who.push_back(static_cast<int32_t>(neuron(in, k)));
  const int64_t n = static_cast<int64_t>(who.size());
  if (!n) return;
  who.resize(who.size() + 2 * N, who.back());
  factors.resize(static_cast<size_t>(N * (s->groups + 16)));
  for (int64_t k = 0; k < n; k += N) {
    Undecided found[N];
    by_nibbles<N>(s, in, who.data() + k, who.data() + k + N, factors.data(), found);
    for (int r = 0; r < N && k + r < n; r++) {
      const Undecided &u = found[r];
      const float v = most(s, in, 4, BITS > 4 ? in->upper_tail : in->tail, u.i, 0, u.score, u.squares, u.sure);
      const bool may = reaches(in, v) || (BITS > 4 && in->upper_tail != in->upper_tail);
      if (in->near) in->near[u.i] = v;
      wanted[u.i] = BITS == 4 && may ? in->last_mark : 0;
      if (BITS == 4 || !may) continue;
      for (int p = 0; p < BITS - 4; p++)
        for (int64_t g = 0; g < s->groups; g += 8) fetch(s->planes[p] + u.i * s->groups + g);
      undecided.push_back(u);
    }
  }
  for (const Undecided &u : undecided) {
    const float score = u.score + by_planes<BITS>(s, in, u.i) / (1 << (BITS - 4));
    wanted[u.i] = reaches(in, most(s, in, BITS, in->tail, u.i, 0, score, u.squares, u.sure)) ? in->last_mark : 0;
  }
}

}  // namespace
#pragma GCC pop_options
#endif

namespace {

inline bool can_scan_whole() {
#ifdef WHOLE
  return level() == 4 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

template <int BITS> void scan(const Sketch *s, const Inputs *in, int64_t begin, int64_t end, uint8_t *wanted) {
#ifdef WHOLE
  if (in->high) return scan_whole<BITS>(s, in, begin, end, wanted);
#endif
  CALL(scan<BITS>, s, in, begin, end, wanted);
}

}  // namespace

extern "C" {

// ids [n] <- the neurons that cannot be proved silent for one of T tokens, sorted; returns how many there are. marks [n] <-
// 1 where the last token wants it, else 2 where the last 8 tokens do, 3 the 8 before, ..., 0 where none does; a neuron that is
// PASSED_OVER before is not looked at. `offset` [groups * 64] is what a code of 0 stands for, in steps of its own.
//
// One token's neurons may be found silent by the upper 4 bits alone, by a bound of `upper_tail`, if that is not NaN.
// near [n], where it is not null, <- by how much each of one token's neurons may fire, by the bits that were looked at first.
// list [n], where it is not null: the neurons to look at, sorted, instead of the first n; marks and near are by neuron.
//
// `found`, where it is not null, is called meanwhile, by the calling thread: found(arg, n, end) when all neurons below
// `end` are decided and n ids are there.
int64_t hf_flash_gate(const float *x, int64_t T, int64_t d, int64_t n, const uint8_t *nibbles, const uint64_t *plane5,
                      const uint64_t *plane6, const uint64_t *plane7, const uint64_t *plane8, const uint16_t *step,
                      const float *norm, const float *offset, const float *bias, int bits, float tail, float gamma,
                      float per_norm, float tiny, float unit, float threshold, float least, float most, int64_t *ids,
                      uint8_t *marks, float upper_tail, float *near, const int32_t *list, Found found, void *arg) {
  const int64_t groups = (d + GROUP - 1) / GROUP;
  const Sketch s{nibbles, {plane5, plane6, plane7, plane8}, step, norm, bias, groups, bits};
  std::vector<float> padded(static_cast<size_t>(T * groups * GROUP), 0.0f), sums(static_cast<size_t>(3 * T * groups)),
      size(static_cast<size_t>(T)), planes_constant(static_cast<size_t>(groups));
  float *constant = sums.data(), *squares = constant + T * groups, *norms = squares + T * groups;
  for (int64_t t = 0; t < T; t++) {
    float *to = padded.data() + t * groups * GROUP, largest = 0, all = 0;
    std::memcpy(to, x + t * d, static_cast<size_t>(d) * sizeof(float));
    bool finite = true;
    for (int64_t j = 0; j < d; j++) {
      const float a = std::fabs(to[j]);
      largest = a > largest ? a : largest;
      finite &= a <= most;  // false for NaN
    }
    for (int64_t g = 0; g < groups; g++) {
      float c = 0, q = 0;
      for (int j = 0; j < GROUP; j++) {
        const float v = to[g * GROUP + j];
        c += v * offset[g * GROUP + j];
        q += v * v;
      }
      q *= 1 + 1.0f / 65536;
      constant[t * groups + g] = c, squares[t * groups + g] = q, norms[t * groups + g] = std::sqrt(q);
      all += q;
    }
    size[static_cast<size_t>(t)] = finite && (largest == 0 || largest >= least) ? std::sqrt(all) : INFINITY;
  }
  const bool in_whole = T == 1 && can_scan_whole() && size[0] < INFINITY;
  const Whole whole(padded.data(), in_whole ? groups : 0);
  for (int64_t g = 0; g < groups && in_whole; g++) {
    // What a code of 0 stands for in b bits is 2^(b - 4) times that in 4 bits, less (2^(b - 4) - 1) / 2. And codes of 4 bits
    // begin 8 below the middle.
    const float finer = static_cast<float>(1 << (bits - 4)), sum = whole.sum(g);
    planes_constant[static_cast<size_t>(g)] = -0.5f * (finer - 1) * sum;
    constant[g] = (constant[g] - planes_constant[static_cast<size_t>(g)]) / finer - 8 * sum;
  }
  std::vector<Inputs> some;  // MAX_TOKENS of them at a time, the last ones first
  for (int64_t end = T, t; end > 0; end = t) {
    t = std::max<int64_t>(0, end - MAX_TOKENS);
    const uint8_t mark = static_cast<uint8_t>(LAST + 1 + some.size());
    some.push_back({end - t, padded.data() + t * groups * GROUP, constant + t * groups, squares + t * groups,
                    norms + t * groups, size.data() + t, mark, end == T ? LAST : mark, tail, gamma, per_norm,
                    tiny, unit, threshold, end == T ? near : nullptr, list, in_whole ? whole.high.data() : nullptr, whole.low.data(),
                    whole.scale.data(), whole.rest, planes_constant.data(), upper_tail});
  }
  const int threads = n * groups < 4096 * max_threads() ? 1 : max_threads();
  const int64_t tile = std::max<int64_t>(16, TILE_WEIGHTS / (groups * GROUP)), n_tiles = (n + tile - 1) / tile;
  std::vector<std::atomic<bool>> done(static_cast<size_t>(n_tiles));
  std::atomic<int64_t> next{0};
  int64_t count = 0, collected = 0;
  const auto collect = [&] {
    for (; collected < n_tiles && done[static_cast<size_t>(collected)].load(std::memory_order_acquire); collected++) {
      const int64_t end = std::min(n, (collected + 1) * tile);
      for (int64_t k = collected * tile; k < end; k++) {
        const int64_t i = list ? list[k] : k;
        ids[count] = i;
        count += marks[i] && marks[i] != PASSED_OVER;
      }
      if (found) found(arg, count, end);
    }
  };
  in_parallel(threads, [&](int me) {
    for (int64_t mine; (mine = next.fetch_add(1)) < n_tiles;) {
      const int64_t begin = mine * tile, end = std::min(n, begin + tile);
      for (const Inputs &in : some) {
        switch (bits) {
          case 4: scan<4>(&s, &in, begin, end, marks); break;
          case 5: scan<5>(&s, &in, begin, end, marks); break;
          case 6: scan<6>(&s, &in, begin, end, marks); break;
          case 7: scan<7>(&s, &in, begin, end, marks); break;
          default: scan<8>(&s, &in, begin, end, marks);
        }
      }
      done[static_cast<size_t>(mine)].store(true, std::memory_order_release);
      if (me == 0) collect();
    }
    while (me == 0 && collected < n_tiles) {  // the last ones are being scanned by others
      std::this_thread::yield();
      collect();
    }
  });
  return count;
}

}  // extern "C"
