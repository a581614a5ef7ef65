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
  // Of one token, for the scan in whole numbers: x = scale * (256 * high + low), but for `rest` in norm.
  const int8_t *high, *low;  // [groups * 64], null where the scan is in floats
  const int32_t *middle;     // [groups * 16]: minus the middle code times what 4 neighbours sum to
  const float *scale;        // [groups]
  float rest;
};

// One token in whole numbers.
struct Whole {
  std::vector<int8_t> high, low;
  std::vector<int32_t> middle;
  std::vector<float> scale;
  float rest = 0;

  Whole(const float *x, int64_t groups, int bits)
      : high(static_cast<size_t>(groups * GROUP)), low(high.size()), middle(high.size() / 4), scale(static_cast<size_t>(groups)) {
    double squares = 0;
    for (int64_t g = 0; g < groups; g++) {
      const float *from = x + g * GROUP;
      float largest = 0;
      for (int j = 0; j < GROUP; j++) largest = std::fabs(from[j]) > largest ? std::fabs(from[j]) : largest;
      const float unit = largest / 32512, times = unit >= 0x1p-100f ? 1 / unit : 0;
      scale[static_cast<size_t>(g)] = unit;
      for (int j = 0; j < GROUP; j++) {
        const size_t at = static_cast<size_t>(g * GROUP + j);
        const int32_t v = static_cast<int32_t>(std::lrint(from[j] * times)), upper = (v + 128) >> 8;
        high[at] = static_cast<int8_t>(upper), low[at] = static_cast<int8_t>(v - 256 * upper);
        middle[at / 4] -= v << (bits - 1);
        const double off = static_cast<double>(from[j]) - static_cast<double>(unit) * v;
        squares += off * off;
      }
    }
    rest = static_cast<float>(std::sqrt(squares) * (1 + 0x1p-20));
  }
};

INLINE uint64_t word(const uint64_t *plane, int64_t at) {
  uint64_t bits;
  std::memcpy(&bits, plane + at, sizeof bits);
  return bits;
}

INLINE uint8_t judge(const Sketch *s, const Inputs *in, int64_t i, int64_t t, float score, float squares, float sure) {
  const float fine = 1.0f / static_cast<float>(1 << (s->bits - 4));  // steps are those of 4 bits
  float bound = 4 * sure * fine;
  if (in->tail >= 0) {
    const float h = std::sqrt(in->tail * squares) * fine;
    bound = h < bound ? h : bound;
  }
  float v = score * fine + bound * (1 + 1.0f / 4096) + in->size[t] * (s->norm[i] * in->per_norm + in->tiny);
  v += s->norm[i] * in->rest;
  v += in->unit * std::fabs(v);
  if (s->bias) {
    v += s->bias[i] + in->gamma * std::fabs(s->bias[i]);
    v += in->unit * std::fabs(v);
  }
  return !(v <= in->threshold);  // NaN wants every neuron
}

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

// The scan of one token in whole numbers: codes of 8 bits times inputs of 16, which AVX512-VNNI sums four at a time.
template <int BITS> void scan_whole(const Sketch *s, const Inputs *in, int64_t begin, int64_t end, uint8_t *wanted) {
  const int64_t groups = s->groups, ahead = 48;  // groups fetched ahead
  std::vector<float> factors(static_cast<size_t>(groups));
  for (int64_t i = begin; i < end; i++) {
    if (wanted[i]) continue;
    const uint16_t *stored = s->step + i * groups;
    float *factor = factors.data(), score = 0, squares = 0, sure = 0;
    for (int64_t g = 0; g < groups; g++) {
      const float step = from_bf16(stored[g]);
      factor[g] = step * in->scale[g];
      score += step * in->constant[g];
      squares += step * step * in->squares[g];
      sure += step * in->norms[g];
    }
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t g = 0; g < groups; g++) {
      const int64_t at = i * groups + g;
      __builtin_prefetch(s->nibbles + (at + ahead) * 32);
      const __m512i c = codes<BITS>(s, at);
      __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), c, _mm512_loadu_si512(in->high + g * GROUP));
      sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), c, _mm512_loadu_si512(in->low + g * GROUP));
      sum = _mm512_add_epi32(sum, _mm512_loadu_si512(in->middle + g * (GROUP / 4)));
      sums[g % 2] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(factor[g]), sums[g % 2]);
    }
    score += _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
    wanted[i] = judge(s, in, i, 0, score, squares, sure) ? in->last_mark : 0;
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
// `found`, where it is not null, is called meanwhile, by the calling thread: found(arg, n, end) when all neurons below
// `end` are decided and n ids are there.
int64_t hf_flash_gate(const float *x, int64_t T, int64_t d, int64_t n, const uint8_t *nibbles, const uint64_t *plane5,
                      const uint64_t *plane6, const uint64_t *plane7, const uint64_t *plane8, const uint16_t *step,
                      const float *norm, const float *offset, const float *bias, int bits, float tail, float gamma,
                      float per_norm, float tiny, float unit, float threshold, float least, float most, int64_t *ids,
                      uint8_t *marks, Found found, void *arg) {
  const int64_t groups = (d + GROUP - 1) / GROUP;
  const Sketch s{nibbles, {plane5, plane6, plane7, plane8}, step, norm, bias, groups, bits};
  std::vector<float> padded(static_cast<size_t>(T * groups * GROUP), 0.0f), sums(static_cast<size_t>(3 * T * groups)),
      size(static_cast<size_t>(T));
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
  const Whole whole(padded.data(), in_whole ? groups : 0, bits);
  std::vector<Inputs> some;  // MAX_TOKENS of them at a time, the last ones first
  for (int64_t end = T, t; end > 0; end = t) {
    t = std::max<int64_t>(0, end - MAX_TOKENS);
    const uint8_t mark = static_cast<uint8_t>(LAST + 1 + some.size());
    some.push_back({end - t, padded.data() + t * groups * GROUP, constant + t * groups, squares + t * groups,
                    norms + t * groups, size.data() + t, mark, end == T ? LAST : mark, tail, gamma, per_norm,
                    tiny, unit, threshold, in_whole ? whole.high.data() : nullptr, whole.low.data(), whole.middle.data(),
                    whole.scale.data(), whole.rest});
  }
  const int threads = n * groups < 4096 * max_threads() ? 1 : max_threads();
  const int64_t tile = std::max<int64_t>(16, TILE_WEIGHTS / (groups * GROUP)), n_tiles = (n + tile - 1) / tile;
  std::vector<std::atomic<bool>> done(static_cast<size_t>(n_tiles));
  std::atomic<int64_t> next{0};
  int64_t count = 0, collected = 0;
  const auto collect = [&] {
    for (; collected < n_tiles && done[static_cast<size_t>(collected)].load(std::memory_order_acquire); collected++) {
      const int64_t end = std::min(n, (collected + 1) * tile);
      for (int64_t i = collected * tile; i < end; i++) {
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
