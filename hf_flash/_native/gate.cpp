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
  const Known *known;          // null: nothing is
  int64_t groups;
  int bits;
};

struct Inputs {
  int64_t T;                                     // at most MAX_TOKENS
  const float *x;                                // [T, groups * 64], zero-padded
  const float *constant, *squares, *norms;       // [T, groups]: what codes leave out; |r_g|^2 and |r_g| from above
  const float *along, *half;  // [T, N_DIRECTIONS]: of x in the known directions, r is the rest; [T]: what their steps hide
  const float *size;                             // [T]: |x|, infinite where the token is not judged
  uint8_t mark, last_mark;                       // of a neuron that one of them wants; that the last one wants
  float tail, gamma, per_norm, tiny, unit, threshold;  // tail < 0: the deterministic bound alone
  float *near;                                   // [n] <- how near to firing the last token brings a neuron; or null
  const int32_t *list;                           // the neurons to look at; null for all
  // Of one token, for the scan in whole numbers: x = scale * whole, but for `rest` in norm.
  const int8_t *whole;       // in the order of `Whole`; null where the scan is in floats
  const int8_t *by_bit;      // the same in the order in which planes have their bits, see `Whole`
  const float *scale;        // [groups, up to a multiple of 16]
  float rest;
  const float *planes_constant;  // [groups]: what the codes' lower bits leave out
  float upper_tail;              // `tail` of the upper 4 bits; NaN where they do not decide alone
};

// Of a group's entries: their sum times `offset`, of their squares, and the largest.
CLONES void measure(const float *x, const float *offset, float *shift, float *squares, float *largest) {
  float c = 0, q = 0, most = 0;
  for (int j = 0; j < GROUP; j++) {
    const float a = std::fabs(x[j]);
    c += x[j] * offset[j], q += x[j] * x[j], most = a > most ? a : most;
  }
  *shift = c, *squares = q, *largest = most;
}

// The norm of a group's entries.
CLONES float norm2(const float *x) {
  float q = 0;
  for (int j = 0; j < GROUP; j++) q += x[j] * x[j];
  return std::sqrt(q);
}

// A group's entries in whole numbers of `unit`, in two bytes each: half of the group from `to`, the others from to + GROUP.
// Returns the square of what that leaves out; *sum: what the numbers add up to.
CLONES double split(const float *x, float unit, int8_t *to, int32_t *sum) {
  const float times = unit >= 0x1p-100f ? 1 / unit : 0;
  double squares = 0;
  int32_t all = 0;
  for (int half = 0; half < 2; half++, x += GROUP / 2, to += GROUP) {
    for (int j = 0; j < GROUP / 2; j++) {
      const int32_t v = static_cast<int32_t>(std::nearbyint(x[j] * times)), upper = (v + 128) >> 8;
      to[j] = static_cast<int8_t>(upper), to[j + 2 * GROUP] = static_cast<int8_t>(v - 256 * upper);
      const double off = static_cast<double>(x[j]) - static_cast<double>(unit) * v;
      squares += off * off, all += v;
    }
  }
  *sum = all;
  return squares;
}

// A group as `split` leaves it, in the order of planes.
CLONES void turn(const int8_t *from, int8_t *to) {
  for (int part = 0; part < 2; part++)
    for (int b = 0; b < 8; b++)
      for (int p = 0; p < 8; p++) to[(2 * b + part) * GROUP + p] = from[2 * part * GROUP + p / 4 * GROUP + p % 4 * 8 + b];
}

// One token in whole numbers. Two groups take 256 bytes: upper bytes of the first 32 entries of either, of the last 32 of
// either, as 64 bytes of nibbles have their codes; then lower bytes. And once more for planes, eight groups in 1024 bytes:
// upper bytes of what bit 0 of each byte of the eight words is of, lower bytes, those of bit 1, ...
struct Whole {
  Floats bytes, bits, scale, sums;  // scale, sums [groups]: of a whole number; of all of a group
  float rest = 0;

  Whole(const float *x, const float *largest, int64_t groups)
      : bytes((groups + 1) / 2 * GROUP), bits((groups + 7) / 8 * 8 * GROUP / 2), scale(groups + 16), sums(groups) {
    double squares = 0;
    for (int64_t g = 0; g < groups; g++) {
      const float unit = scale.data()[g] = largest[g] / 32512;
      int32_t sum;
      int8_t *to = entries() + g / 2 * 4 * GROUP + g % 2 * GROUP / 2;
      squares += split(x + g * GROUP, unit, to, &sum);
      turn(to, by_bit() + g / 8 * 16 * GROUP + g % 8 * 8);
      sums.data()[g] = unit * static_cast<float>(sum);
    }
    rest = static_cast<float>(std::sqrt(squares) * (1 + 0x1p-20));
  }

  int8_t *entries() { return reinterpret_cast<int8_t *>(bytes.data()); }
  int8_t *by_bit() { return reinterpret_cast<int8_t *>(bits.data()); }
};

INLINE uint64_t word(const uint64_t *plane, int64_t at) {
  uint64_t bits;
  std::memcpy(&bits, plane + at, sizeof bits);
  return bits;
}

// x [n] = along [N_DIRECTIONS] times directions + rest [n]; returns sum_k |along_k|.
CLONES float split_off(const uint16_t *directions, int64_t n, const float *x, float *along, float *rest) {
  float all = 0;
  std::memcpy(rest, x, static_cast<size_t>(n) * sizeof(float));
  for (int k = 0; k < N_DIRECTIONS; k++) {
    float sum = 0;
    for (int64_t j = 0; j < n; j++) sum += x[j] * from_bf16(directions[k * n + j]);
    along[k] = sum, all += std::fabs(sum);
  }
  for (int k = 0; k < N_DIRECTIONS; k++)
    for (int64_t j = 0; j < n; j++) rest[j] -= along[k] * from_bf16(directions[k * n + j]);
  return all;
}

// The most that is known of what the rounding of neuron i takes from token t's score, by the upper bits or all.
INLINE float known_score(const Sketch *s, const Inputs *in, bool upper, int64_t i, int64_t t) {
  const int8_t *code = (upper ? s->known->upper : s->known->all) + i * N_DIRECTIONS;
  float sum = in->half[t];
  for (int k = 0; k < N_DIRECTIONS; k++) sum += in->along[t * N_DIRECTIONS + k] * code[k];
  return sum * (upper ? s->known->upper_step : s->known->all_step)[i];
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
  if (s->known) v += known_score(s, in, bits == 4, i, t);
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

// Steps of groups g .. g + 16 of a neuron as float32, 0 beyond the last.
INLINE __m512 steps16(const Sketch *s, int64_t i, int64_t g) {
  const int64_t n = s->groups - g;
  const __mmask16 some = n < 16 ? static_cast<__mmask16>((1u << n) - 1) : 0xffff;
  const __m256i steps = _mm256_maskz_loadu_epi16(some, s->step + i * s->groups + g);
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(steps), 16);
}

// The sums of four vectors' entries.
INLINE __m128 sums4(const __m512 *v) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d lower = _mm512_unpacklo_pd((__m512d)a, (__m512d)b), upper = _mm512_unpackhi_pd((__m512d)a, (__m512d)b);
  const __m512 all = _mm512_add_ps((__m512)lower, (__m512)upper);
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Codes times inputs of two groups, `first` of the first 32 weights of either, `last` of the last 32, summed by fours.
INLINE __m512 pair_sum(__m512i first, __m512i last, const __m512i *x) {
  __m512i sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), first, x[0]), last, x[1]);
  sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), first, x[2]), last, x[3]);
  return _mm512_cvtepi32_ps(sum);
}

INLINE void load_pair(const Inputs *in, int64_t g, __m512i *x) {
  for (int k = 0; k < 4; k++) x[k] = _mm512_load_si512(in->whole + g * 2 * GROUP + k * GROUP);
}

INLINE __m512i lanes() {  // of the factors of 16 groups, where those of the first two are
  return _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
}

constexpr int ROWS = 4;        // neurons whose sums are added up together
constexpr int AHEAD_ROWS = 4;  // those behind them are fetched meanwhile
constexpr int JUDGED = 16;     // that are judged together

// What the upper 4 bits of some neurons' codes give them, in steps of 4 bits, and what bounds it.
struct Scores {
  alignas(64) float score[JUDGED], squares[JUDGED], sure[JUDGED];
};

// What is to be summed for what is known of neuron i by its upper bits.
INLINE __m512 known_sum(const Sketch *s, const Inputs *in, int64_t i) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(s->known->upper + i * N_DIRECTIONS));
  const __m512 half = _mm512_maskz_mov_ps(1, _mm512_set1_ps(in->half[0]));
  const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), _mm512_loadu_ps(in->along), half);
  return _mm512_mul_ps(sum, _mm512_set1_ps(s->known->upper_step[i]));
}

// What is to be summed for the score of neuron i, its squares and norms, 16 of each. `next`: a neuron to fetch meanwhile.
// Neuron by neuron, as they lie: what shared the loads of the inputs among four was a fifth slower from DRAM.
INLINE void add_nibbles(const Sketch *s, const Inputs *in, int64_t i, int64_t next, __m512 *sum, __m512 *squares, __m512 *sure) {
  const uint8_t *from = s->nibbles + i * s->groups * 32, *ahead = s->nibbles + next * s->groups * 32;
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 score = _mm512_setzero_ps(), square = score, norm = score;
  if (s->known) score = known_sum(s, in, i);
  for (int64_t block = 0; block < s->groups; block += 16) {
    const __m512 step = steps16(s, i, block), factor = _mm512_mul_ps(step, _mm512_load_ps(in->scale + block));
    fetch(s->step + next * s->groups + block);
    score = _mm512_fmadd_ps(step, _mm512_loadu_ps(in->constant + block), score);
    square = _mm512_fmadd_ps(_mm512_mul_ps(step, step), _mm512_loadu_ps(in->squares + block), square);
    norm = _mm512_fmadd_ps(step, _mm512_loadu_ps(in->norms + block), norm);
    __m512i lane = lanes();
    const auto pair = [&](int64_t g, __mmask64 there) __attribute__((always_inline)) {
      __m512i x[4];
      load_pair(in, g, x);
      fetch(ahead + g * 32);
      const __m512i codes = _mm512_maskz_loadu_epi8(there, from + g * 32);
      const __m512i first = _mm512_and_si512(codes, nibble), last = _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble);
      score = _mm512_fmadd_ps(pair_sum(first, last, x), _mm512_permutexvar_ps(lane, factor), score);
      lane = _mm512_add_epi32(lane, _mm512_set1_epi32(2));
    };
    const int64_t end = s->groups < block + 16 ? s->groups : block + 16;
    int64_t g = block;
    for (; g + 2 <= end; g += 2) pair(g, ~0ull);
    if (g < end) pair(g, 0xffffffffull);
  }
  *sum = score, *squares = square, *sure = norm;
}

// What there is a little of for each neuron, which lies close together only where all are looked at.
INLINE void fetch_few(const Sketch *s, int64_t i) {
  fetch(s->norm + i);
  if (s->bias) fetch(s->bias + i);
  if (s->known) fetch(s->known->upper + i * N_DIRECTIONS), fetch(s->known->upper_step + i);
}

// Scores [at .. at + ROWS] of neurons `who`. `ahead`: those to fetch meanwhile.
INLINE void by_nibbles(const Sketch *s, const Inputs *in, const int32_t *who, const int32_t *ahead, int at, Scores *out) {
  __m512 sums[ROWS], squares[ROWS], sure[ROWS];
  for (int r = 0; r < ROWS && in->list; r++) fetch_few(s, ahead[r]);
  for (int r = 0; r < ROWS; r++) add_nibbles(s, in, who[r], ahead[r], sums + r, squares + r, sure + r);
  _mm_store_ps(out->score + at, sums4(sums));
  _mm_store_ps(out->squares + at, sums4(squares));
  _mm_store_ps(out->sure + at, sums4(sure));
}

// `most` of 16 neurons.
INLINE __m512 most16(const Sketch *s, const Inputs *in, int bits, float tail, const int32_t *who, const Scores *at) {
  const __m512 fine = _mm512_set1_ps(1.0f / static_cast<float>(1 << (bits - 4))), unit = _mm512_set1_ps(in->unit);
  __m512 bound = _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(4), _mm512_load_ps(at->sure)), fine);
  if (tail >= 0) {
    const __m512 squares = _mm512_mul_ps(_mm512_set1_ps(tail), _mm512_load_ps(at->squares));
    bound = _mm512_min_ps(_mm512_mul_ps(_mm512_sqrt_ps(squares), fine), bound);  // the latter if either is NaN
  }
  const __m512i ids = _mm512_loadu_si512(who);
  const __m512 norm = _mm512_i32gather_ps(ids, s->norm, 4);
  const __m512 arithmetic = _mm512_fmadd_ps(norm, _mm512_set1_ps(in->per_norm), _mm512_set1_ps(in->tiny));
  __m512 v = _mm512_fmadd_ps(bound, _mm512_set1_ps(1 + 1.0f / 4096), _mm512_load_ps(at->score));
  v = _mm512_fmadd_ps(_mm512_set1_ps(in->size[0]), arithmetic, v);
  v = _mm512_fmadd_ps(norm, _mm512_set1_ps(in->rest), v);
  v = _mm512_fmadd_ps(unit, _mm512_abs_ps(v), v);
  if (s->bias) {
    const __m512 bias = _mm512_i32gather_ps(ids, s->bias, 4);
    v = _mm512_add_ps(v, _mm512_fmadd_ps(_mm512_set1_ps(in->gamma), _mm512_abs_ps(bias), bias));
    v = _mm512_fmadd_ps(unit, _mm512_abs_ps(v), v);
  }
  return v;
}

// What the lower bits of a neuron's codes add to its score, in steps of all bits. Eight groups at a time: bit b of all bytes
// of their words, put together to codes of as many bytes, meets part b of `by_bit`.
template <int BITS> INLINE float by_planes(const Sketch *s, const Inputs *in, int64_t i) {
  const __m512i twice[2] = {_mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0),
                            _mm512_set_epi32(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8)};
  __m512 sum = _mm512_setzero_ps(), constant = sum;
  for (int64_t block = 0; block < s->groups; block += 16) {
    const __m512 step = steps16(s, i, block), factor = _mm512_mul_ps(step, _mm512_load_ps(in->scale + block));
    constant = _mm512_fmadd_ps(step, _mm512_loadu_ps(in->planes_constant + block), constant);
    for (int half = 0; half < 2 && block + 8 * half < s->groups; half++) {
      const int64_t g = block + 8 * half, n = s->groups - g;
      const __mmask8 some = n < 8 ? static_cast<__mmask8>((1u << n) - 1) : 0xff;
      const int8_t *x = in->by_bit + g * 2 * GROUP;
      __m512i words[BITS - 4 + 1], upper = _mm512_setzero_si512(), lower = upper;
      for (int p = 0; p < BITS - 4; p++) words[p] = _mm512_maskz_loadu_epi64(some, s->planes[p] + i * s->groups + g);
#pragma GCC unroll 8
      for (int b = 0; b < 8; b++) {
        __m512i codes = _mm512_setzero_si512();
#pragma GCC unroll 4
        for (int p = 0; p < BITS - 4; p++) {
          const int to = BITS - 5 - p;  // which bit of the code it is
          const __m512i moved = b > to ? _mm512_srli_epi16(words[p], static_cast<unsigned>(b > to ? b - to : 0))
                                       : _mm512_slli_epi16(words[p], static_cast<unsigned>(b > to ? 0 : to - b));
          const __m512i bit = _mm512_set1_epi8(static_cast<char>(1 << to));
          codes = p ? _mm512_ternarylogic_epi32(codes, moved, bit, 0xf8) : _mm512_and_si512(moved, bit);  // codes | moved & bit
        }
        upper = _mm512_dpbusd_epi32(upper, codes, _mm512_load_si512(x + b * 2 * GROUP));
        lower = _mm512_dpbusd_epi32(lower, codes, _mm512_load_si512(x + (b * 2 + 1) * GROUP));
      }
      const __m512 all = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower));
      sum = _mm512_fmadd_ps(all, _mm512_permutexvar_ps(twice[half], factor), sum);
    }
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sum, constant));
}

// A neuron whose upper bits do not decide.
struct Undecided {
  int64_t i;
  float score, squares, sure;
};

// What all bits of a neuron need besides. Every third line first: told of lines in order, a core fetches more than those.
template <int BITS> INLINE void fetch_planes(const Sketch *s, int64_t i) {
  for (int p = 0; p < BITS - 4; p++)
    for (int64_t first = 0; first < 24; first += 8)
      for (int64_t g = first; g < s->groups; g += 24) fetch(s->planes[p] + i * s->groups + g);
  if (s->known) fetch(s->known->all + i * N_DIRECTIONS), fetch(s->known->all_step + i);
}

// The scan of one token in whole numbers, codes of 4 bits times inputs of 16, which AVX512-VNNI sums four at a time. Most
// neurons are silent by the upper 4 bits of their codes, and the others' planes are looked at only then.
template <int BITS> void scan_whole(const Sketch *s, const Inputs *in, int64_t begin, int64_t end, uint8_t *wanted) {
  static thread_local std::vector<int32_t> who;  // they keep their memory from tile to tile
  static thread_local std::vector<Undecided> undecided;
  who.clear(), undecided.clear();
  for (int64_t k = begin; k < end; k++)
    if (!wanted[neuron(in, k)]) who.push_back(static_cast<int32_t>(neuron(in, k)));
  const int64_t n = static_cast<int64_t>(who.size());
  if (!n) return;
  who.resize(who.size() + JUDGED + AHEAD_ROWS, who.back());
  const float tail = BITS > 4 ? in->upper_tail : in->tail;
  size_t last = 0;  // of the undecided: the first of the last ones
  for (int64_t k = 0; k < n; k += JUDGED) {
    const int32_t *some = who.data() + k;
    Scores scores;
    for (int r = 0; r < JUDGED; r += ROWS) by_nibbles(s, in, some + r, some + r + AHEAD_ROWS, r, &scores);
    const __m512 v = most16(s, in, 4, tail, some, &scores);
    const unsigned judged = n - k < JUDGED ? (1u << (n - k)) - 1 : 0xffff;
    const unsigned reach = _mm512_cmp_ps_mask(v, _mm512_set1_ps(in->threshold), _CMP_NLE_UQ);  // NaN wants every neuron
    unsigned may = (BITS > 4 && tail != tail ? 0xffff : reach) & judged;
    if (in->near) _mm512_mask_i32scatter_ps(in->near, static_cast<__mmask16>(judged), _mm512_loadu_si512(some), v, 4);
    for (int r = 0; r < JUDGED && k + r < n; r++) wanted[some[r]] = BITS == 4 && may >> r & 1 ? in->last_mark : 0;
    const size_t before = undecided.size();
    for (; BITS > 4 && may; may &= may - 1) {
      const int r = __builtin_ctz(may);
      undecided.push_back({some[r], scores.score[r], scores.squares[r], scores.sure[r]});
    }
    for (; last < undecided.size(); last++) fetch_planes<BITS>(s, undecided[last].i);
    last = before;  // they are told again: of many fetches at once a core drops some
  }
  for (const Undecided &u : undecided) {
    float score = u.score + by_planes<BITS>(s, in, u.i) / (1 << (BITS - 4));
    if (s->known) score -= known_score(s, in, true, u.i, 0);  // `most` has that of all bits
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
  if (in->whole) return scan_whole<BITS>(s, in, begin, end, wanted);
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
// `known`, where it is not null: what of the sketch's errors need not be bounded.
// list [n], where it is not null: the neurons to look at, sorted, instead of the first n; marks and near are by neuron.
//
// `found`, where it is not null, is called meanwhile, by the calling thread: found(arg, n, end) when all neurons below
// `end` are decided and n ids are there.
int64_t hf_flash_gate(const float *x, int64_t T, int64_t d, int64_t n, const uint8_t *nibbles, const uint64_t *plane5,
                      const uint64_t *plane6, const uint64_t *plane7, const uint64_t *plane8, const uint16_t *step,
                      const float *norm, const float *offset, const Known *known, const float *bias, int bits, float tail, float gamma,
                      float per_norm, float tiny, float unit, float threshold, float least, float most, int64_t *ids,
                      uint8_t *marks, float upper_tail, float *near, const int32_t *list, Found found, void *arg) {
  const int64_t groups = (d + GROUP - 1) / GROUP;
  const Sketch s{nibbles, {plane5, plane6, plane7, plane8}, step, norm, bias, known, groups, bits};
  std::vector<float> padded(static_cast<size_t>(T * groups * GROUP), 0.0f), sums(static_cast<size_t>(4 * T * groups + 16)),
      size(static_cast<size_t>(T)), planes_constant(static_cast<size_t>(groups + 16));
  std::vector<float> along(static_cast<size_t>(known ? T * N_DIRECTIONS : 0)), half(static_cast<size_t>(known ? T : 0));
  std::vector<float> rest(static_cast<size_t>(known ? groups * GROUP : 0));
  float *constant = sums.data(), *squares = constant + T * groups, *norms = squares + T * groups;
  float *largest = norms + T * groups + 16;
  for (int64_t t = 0; t < T; t++) {
    float *to = padded.data() + t * groups * GROUP, high = 0, all = 0;
    std::memcpy(to, x + t * d, static_cast<size_t>(d) * sizeof(float));
    for (int64_t i = t * groups, g = 0; g < groups; i++, g++) {
      float q;
      measure(to + g * GROUP, offset + g * GROUP, constant + i, &q, largest + i);
      q *= 1 + 1.0f / 65536;
      squares[i] = q, norms[i] = std::sqrt(q);
      all += q, high = largest[i] > high ? largest[i] : high;
    }
    if (known) {
      float *a = along.data() + t * N_DIRECTIONS;
      const float lengths = split_off(known->directions, groups * GROUP, to, a, rest.data());
      half[static_cast<size_t>(t)] = 0.5f * lengths * (1 + 1.0f / 4096);
      for (int64_t i = t * groups, g = 0; g < groups; g++, i++) {
        const float of_rest = norm2(rest.data() + g * GROUP) + 0x1p-18f * (norms[i] + lengths);
        norms[i] = of_rest * (1 + 1.0f / 65536), squares[i] = norms[i] * of_rest;
      }
    }
    const bool finite = high <= most && all == all;  // NaN is not larger than anything, but a sum of squares is NaN
    size[static_cast<size_t>(t)] = finite && (high == 0 || high >= least) ? std::sqrt(all) : INFINITY;
  }
  const bool in_whole = T == 1 && can_scan_whole() && size[0] < INFINITY;
  Whole whole(padded.data(), largest, in_whole ? groups : 0);
  for (int64_t g = 0; g < groups && in_whole; g++) {
    // What a code of 0 stands for in b bits is 2^(b - 4) times that in 4 bits, less (2^(b - 4) - 1) / 2. And codes of 4 bits
    // begin 8 below the middle.
    const float finer = static_cast<float>(1 << (bits - 4)), sum = whole.sums.data()[g];
    planes_constant[static_cast<size_t>(g)] = -0.5f * (finer - 1) * sum;
    constant[g] = (constant[g] - planes_constant[static_cast<size_t>(g)]) / finer - 8 * sum;
  }
  std::vector<Inputs> some;  // MAX_TOKENS of them at a time, the last ones first
  for (int64_t end = T, t; end > 0; end = t) {
    t = std::max<int64_t>(0, end - MAX_TOKENS);
    const uint8_t mark = static_cast<uint8_t>(LAST + 1 + some.size());
    some.push_back({end - t, padded.data() + t * groups * GROUP, constant + t * groups, squares + t * groups,
                    norms + t * groups, known ? along.data() + t * N_DIRECTIONS : nullptr, known ? half.data() + t : nullptr, size.data() + t, mark, end == T ? LAST : mark, tail, gamma, per_norm,
                    tiny, unit, threshold, end == T ? near : nullptr, list, in_whole ? whole.entries() : nullptr,
                    whole.by_bit(), whole.scale.data(), whole.rest, planes_constant.data(), upper_tail});
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
