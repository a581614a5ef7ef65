// The norm of one bfloat16 token, to the bit what torch makes of it on an AVX2 CPU or better: LayerNorm, and the RMSNorm
// that transformers spells in torch operations. Reference: layer_step.py, which compares both before it relies on this.
//
// torch sums 8 lanes side by side. LayerNorm: running mean and squares of the differences (Welford) in chunks of 16
// vectors, chunks joined like the digits of a binary counter (Chan et al. 1979), then lane by lane. A mean of squares: four
// chains, in runs of 16 that are summed like the digits of a counter, too. Its compiler fused some products with sums, and
// which ones its results show.
#include "calls.h"
#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NORM 1
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#pragma GCC optimize("no-associative-math,no-finite-math-only,no-reciprocal-math,fp-contract=off")  // the order is the point

namespace {

constexpr int64_t LANES = 8, CHUNK = 16;  // vectors of 2 * LANES in a chunk
constexpr int LEVELS = 32;                // of the counter: any number of chunks

INLINE __m256 wide(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }

INLINE __m256 wide(const uint16_t *p) { return wide(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }  // 8 bfloat16

INLINE __m128i rounded(__m256 v) {  // to bfloat16, to nearest, ties to even; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(v), upper = _mm256_srli_epi32(bits, 16);
  const __m256i even = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i some = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), quiet, nan);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(some, some), 0x08));
}

INLINE void store(__m128i v, uint16_t *to) { _mm_storeu_si128(reinterpret_cast<__m128i *>(to), v); }

struct Moments {  // of n values in each lane: mean, and sum of the squared differences from it
  __m256 mean, squares;
  int64_t n;
};

INLINE Moments none() { return {_mm256_setzero_ps(), _mm256_setzero_ps(), 0}; }

INLINE void join(Moments *to, const Moments &more) {
  const int64_t n = to->n + more.n;
  const __m256 share = _mm256_set1_ps(n == 0 ? 0.0f : static_cast<float>(more.n) / static_cast<float>(n));
  const __m256 apart = _mm256_sub_ps(more.mean, to->mean);
  const __m256 part = _mm256_mul_ps(_mm256_mul_ps(apart, share), _mm256_set1_ps(static_cast<float>(to->n)));
  to->mean = _mm256_add_ps(to->mean, _mm256_mul_ps(share, apart));
  to->squares = _mm256_fmadd_ps(apart, part, _mm256_add_ps(to->squares, more.squares));
  to->n = n;
}

INLINE void add(Moments *to, __m256 x, __m256 over) {
  const __m256 apart = _mm256_sub_ps(x, to->mean);
  to->mean = _mm256_fmadd_ps(apart, over, to->mean);
  to->squares = _mm256_fmadd_ps(apart, _mm256_sub_ps(x, to->mean), to->squares);
  to->n++;
}

// Mean and variance of x [d].
void moments(const uint16_t *x, int64_t d, float *mean, float *variance) {
  const int64_t n = d / (2 * LANES), n_chunks = (n + CHUNK - 1) / CHUNK;
  int depth = 0;
  while ((int64_t{1} << depth) < n_chunks) depth++;
  Moments sums[LEVELS];
  for (Moments &sum : sums) sum = none();
  for (int64_t i = 0; i < n_chunks; i++) {
    Moments even = none(), odd = none();
    for (int64_t j = i * CHUNK; j < n && j < (i + 1) * CHUNK; j++) {
      const __m256 over = _mm256_set1_ps(1.0f / static_cast<float>(j - i * CHUNK + 1));
      add(&even, wide(x + 2 * LANES * j), over);
      add(&odd, wide(x + 2 * LANES * j + LANES), over);
    }
    join(&sums[0], even);
    join(&sums[0], odd);
    int64_t full = i + 1;
    for (int level = 1; level < depth && full % 2 == 0; level++, full /= 2) {
      join(&sums[level], sums[level - 1]);
      sums[level - 1] = none();
    }
  }
  for (int level = 1; level < depth; level++) join(&sums[0], sums[level]);
  float means[LANES], squares[LANES], whole = 0, spread = 0;
  _mm256_storeu_ps(means, sums[0].mean), _mm256_storeu_ps(squares, sums[0].squares);
  for (int i = 0; i < LANES; i++) {
    const float count = static_cast<float>(2 * n * i), each = static_cast<float>(2 * n);
    const float share = each / (count + each), apart = means[i] - whole;
    whole = std::fma(share, apart, whole);
    spread += std::fma(apart * apart * share, count, squares[i]);
  }
  *mean = whole, *variance = spread / static_cast<float>(d);
}

// Mean of x[i]^2.
float mean_square(const uint16_t *x, int64_t d) {
  constexpr int CHAINS = 4, DEPTH = 4, RUN = 16;
  const int64_t n = d / LANES, rows = n / CHAINS;
  __m256 sums[DEPTH][CHAINS];
  for (auto &level : sums)
    for (__m256 &sum : level) sum = _mm256_setzero_ps();
  const auto square = [&](int64_t i) {
    const __m256 v = wide(x + i * LANES);
    return _mm256_mul_ps(v, v);
  };
  for (int64_t i = 0; i < rows;) {
    for (int c = 0; c < CHAINS; c++) sums[0][c] = _mm256_add_ps(sums[0][c], square(i * CHAINS + c));
    if (++i % RUN) continue;
    for (int level = 1; level < DEPTH; level++) {
      for (int c = 0; c < CHAINS; c++) {
        sums[level][c] = _mm256_add_ps(sums[level][c], sums[level - 1][c]);
        sums[level - 1][c] = _mm256_setzero_ps();
      }
      if (i >> (4 * level) & (RUN - 1)) break;
    }
  }
  for (int level = 1; level < DEPTH; level++)
    for (int c = 0; c < CHAINS; c++) sums[0][c] = _mm256_add_ps(sums[0][c], sums[level][c]);
  __m256 lanes = sums[0][0];
  for (int64_t i = rows * CHAINS; i < n; i++) lanes = _mm256_add_ps(lanes, square(i));
  for (int c = 1; c < CHAINS; c++) lanes = _mm256_add_ps(lanes, sums[0][c]);
  float values[LANES], total = 0;
  _mm256_storeu_ps(values, lanes);
  for (float v : values) total += v;
  return total / static_cast<float>(d);
}

}  // namespace
#endif

extern "C" {

// What a norm divides by and subtracts: scale and mean as of LayerNorm where `centred`, else RMSNorm's scale and 0.
void hf_flash_norm_scale(const uint16_t *x, int64_t d, int centred, float eps, float *scale, float *mean) {
#ifdef NORM
  float variance;
  *mean = 0;
  if (centred) moments(x, d, mean, &variance);
  else variance = mean_square(x, d);
  *scale = 1.0f / std::sqrt((variance < 0 ? 0.0f : variance) + eps);
#endif
}

// out [d] = the norm of x [d]: RMSNorm with a weight where `bias` is null, else LayerNorm with both. d is a multiple of 16.
void hf_flash_norm(const uint16_t *x, int64_t d, const uint16_t *weight, const uint16_t *bias, float eps, uint16_t *out) {
#ifdef NORM
  float scale, mean;
  hf_flash_norm_scale(x, d, bias != nullptr, eps, &scale, &mean);
  const __m256 by = _mm256_set1_ps(scale), shift = _mm256_set1_ps(-mean * scale);
  for (int64_t i = 0; i < d && bias; i += LANES)
    store(rounded(_mm256_fmadd_ps(_mm256_fmadd_ps(wide(x + i), by, shift), wide(weight + i), wide(bias + i))), out + i);
  for (int64_t i = 0; i < d && !bias; i += LANES)
    store(rounded(_mm256_mul_ps(wide(weight + i), wide(rounded(_mm256_mul_ps(wide(x + i), by))))), out + i);
#endif
}

}  // extern "C"
#ifdef NORM
#pragma GCC pop_options
#endif

extern "C" {

// Whether the calls above may be made.
int hf_flash_norms() {
#ifdef NORM
  return level() >= 3;
#else
  return 0;
#endif
}

}  // extern "C"
