// Attention of one bfloat16 query per sequence, to the bit what torch's scaled_dot_product_attention makes of it on an
// AVX-512 CPU, at the speed of memory. Reference: attention.py, which compares both before it relies on this.
//
// torch goes through the keys in blocks of 512: scores, an exponential of 20 units of error, weights rounded to bfloat16,
// the weighted sum of values. Its library sums one query's products in an order that is plain in its results: a score as
// four chains, a value's sum in fours. A product of two bfloat16 is exact in float32, so only the order of sums matters.
#include "calls.h"
#include "common.h"
#include <algorithm>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ATTENTION 1
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#pragma GCC optimize("no-associative-math,no-finite-math-only,no-reciprocal-math,fp-contract=off")  // the order is the point

namespace {

constexpr int64_t KEYS = 512;     // of a block
constexpr int64_t FETCHED = 256;  // the most that is fetched ahead of a head's keys, and of its values

struct Heads {  // where a head's rows lie; strides in elements
  const uint16_t *k, *v;
  int64_t k_stride, v_stride, D;
};

INLINE __m512 wide(const uint16_t *p) {  // 16 bfloat16
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))), 16);
}

INLINE __m512 plus(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }

INLINE __m512 larger(__m512 a, __m512 b) {  // or what is no number
  const __m512 most = _mm512_max_ps(a, b);
  return _mm512_mask_mov_ps(most, _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), _mm512_add_ps(a, b));
}

template <__m512 (*OF)(__m512, __m512)> INLINE float by_halves(__m512 v) {  // of all 16
  v = OF(v, _mm512_shuffle_f32x4(v, v, 0x4e));
  v = OF(v, _mm512_shuffle_f32x4(v, v, 0xb1));
  v = OF(v, _mm512_shuffle_ps(v, v, 0x4e));
  return _mm512_cvtss_f32(OF(v, _mm512_shuffle_ps(v, v, 0xb1)));
}

// 2^x as the bits of a float: the exponent from the whole part, the mantissa from a cubic of the rest (Malossi, Ineichen,
// Bekas, Curioni 2015); x <= 0.
INLINE __m512 exp_20(__m512 x) {
  const __m512 y = _mm512_mul_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(0x3fb8aa3b)));  // log2(e)
  const __m512 f = _mm512_sub_ps(y, _mm512_floor_ps(y));
  __m512 r = _mm512_fmadd_ps(f, _mm512_set1_ps(-0.079204240219773236f), _mm512_set1_ps(-0.22433836478672356f));
  r = _mm512_fmadd_ps(f, r, _mm512_set1_ps(0.30354260500649682f));
  r = _mm512_fmadd_ps(f, r, _mm512_set1_ps(0.00010703434948458272f));
  const __m512 bits = _mm512_fmadd_ps(_mm512_set1_ps(8388608.0f), _mm512_sub_ps(y, r), _mm512_set1_ps(8388608.0f * 127));
  const __mmask16 some = _mm512_cmp_ps_mask(x, _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xc2aeac50))), _CMP_NLT_US);
  return _mm512_castsi512_ps(_mm512_maskz_cvttps_epi32(some, bits));
}

INLINE __m512 round_lanes(__m512 v) {  // to bfloat16
  const __m512i b = _mm512_castps_si512(v);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(b, even), _mm512_set1_epi32(0x7fff));
  const __m512 cut = _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  return _mm512_mask_mov_ps(cut, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), v);
}

// s[t] = q . k[t]: chain c takes the products c, c + 4, ...; then (0 + 2) + (1 + 3). Four keys side by side.
void scores(const float *q, const Heads &h, int64_t n, float *s) {
  for (int64_t t = 0; t < n; t += 4) {
    const uint16_t *key[4];
    for (int64_t i = 0; i < 4; i++) key[i] = h.k + (t + i < n ? t + i : t) * h.k_stride;
    __m512 chains = _mm512_setzero_ps();
    for (int64_t j = 0; j < h.D; j += 16) {
      const __m512 a = wide(key[0] + j), b = wide(key[1] + j), c = wide(key[2] + j), d = wide(key[3] + j);
      const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);
      const __m512 ab2 = _mm512_shuffle_f32x4(a, b, 0xee), cd2 = _mm512_shuffle_f32x4(c, d, 0xee);
      const __m512 x = _mm512_loadu_ps(q + j);
      chains = _mm512_fmadd_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(x, x, 0x00), chains);
      chains = _mm512_fmadd_ps(_mm512_shuffle_f32x4(ab, cd, 0xdd), _mm512_shuffle_f32x4(x, x, 0x55), chains);
      chains = _mm512_fmadd_ps(_mm512_shuffle_f32x4(ab2, cd2, 0x88), _mm512_shuffle_f32x4(x, x, 0xaa), chains);
      chains = _mm512_fmadd_ps(_mm512_shuffle_f32x4(ab2, cd2, 0xdd), _mm512_shuffle_f32x4(x, x, 0xff), chains);
    }
    chains = _mm512_add_ps(chains, _mm512_shuffle_ps(chains, chains, 0x4e));
    chains = _mm512_add_ps(chains, _mm512_shuffle_ps(chains, chains, 0xb1));
    const __m512i firsts = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
    _mm_storeu_ps(s + t, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, chains)));
  }
}

// s *= scale; returns the largest, or what is no number.
float scale_all(float *s, int64_t n, float scale) {
  const __m512 by = _mm512_set1_ps(scale);
  __m512 most = _mm512_set1_ps(-INFINITY);
  int64_t t = 0;
  for (; t + 16 <= n; t += 16) {
    const __m512 v = _mm512_mul_ps(_mm512_loadu_ps(s + t), by);
    most = larger(most, v);
    _mm512_storeu_ps(s + t, v);
  }
  float rest = -INFINITY;
  for (; t < n; t++) {
    s[t] *= scale;
    rest = rest < s[t] || s[t] != s[t] ? s[t] : rest;
    if (rest != rest) return rest;
  }
  const float all = by_halves<larger>(most);
  return rest > all ? rest : all;
}

// s = bfloat16(exp(s - most)), and their sum before they are rounded.
float weights(float *s, int64_t n, float most) {
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};  // in turns; the last of an odd number to the first
  int64_t t = 0;
  for (; t + 16 <= n; t += 16) {
    const __m512 e = exp_20(_mm512_sub_ps(_mm512_loadu_ps(s + t), _mm512_set1_ps(most)));
    sums[t / 16 % 2] = _mm512_add_ps(sums[t / 16 % 2], e);
    _mm512_storeu_ps(s + t, round_lanes(e));
  }
  float total = by_halves<plus>(plus(sums[0], sums[1]));
  for (; t < n; t++) {
    const float e = std::exp(s[t] - most);
    total += e;
    s[t] = round_bf16(e);
  }
  return total;
}

// out[d] = fade * out[d] + sum of w[t] v[t, d] in fours, (0 + 2) + (1 + 3), and what is left from the last one back.
void values(const float *w, const Heads &h, int64_t n, float fade, float *out) {
  for (int64_t d = 0; d < h.D; d += 16) {
    const uint16_t *v = h.v + d;
    __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(out + d), _mm512_set1_ps(fade));
    int64_t t = 0;
    for (; t + 4 <= n; t += 4, v += 4 * h.v_stride) {
      const __m512 even = _mm512_mul_ps(wide(v), _mm512_set1_ps(w[t]));
      const __m512 odd = _mm512_mul_ps(wide(v + h.v_stride), _mm512_set1_ps(w[t + 1]));
      const __m512 evens = _mm512_fmadd_ps(wide(v + 2 * h.v_stride), _mm512_set1_ps(w[t + 2]), even);
      const __m512 odds = _mm512_fmadd_ps(wide(v + 3 * h.v_stride), _mm512_set1_ps(w[t + 3]), odd);
      sum = _mm512_add_ps(sum, _mm512_add_ps(evens, odds));
    }
    for (int64_t i = n - 1; i >= t; i--)
      sum = _mm512_fmadd_ps(wide(v + (i - t) * h.v_stride), _mm512_set1_ps(w[i]), sum);
    _mm512_storeu_ps(out + d, sum);
  }
}

// Told of a head's rows before they are looked at: they lie in pieces too short for a core to foresee.
void fetch_rows(const uint16_t *rows, int64_t stride, int64_t D, int64_t n) {
  for (int64_t t = 0; t < n; t++)
    for (int64_t d = 0; d < D; d += 32) fetch(rows + t * stride + d);
}

void attend(const uint16_t *q, Heads h, int64_t n, float scale, uint16_t *out) {
  alignas(64) float s[KEYS + 4];
  Floats query(h.D), whole(h.D);
  for (int64_t d = 0; d < h.D; d += 16) _mm512_storeu_ps(query.data() + d, wide(q + d));
  float most = -INFINITY, sum = 0;
  for (int64_t begin = 0; begin < n; begin += KEYS, h.k += KEYS * h.k_stride, h.v += KEYS * h.v_stride) {
    const int64_t keys = n - begin < KEYS ? n - begin : KEYS;
    scores(query.data(), h, keys, s);
    float found = scale_all(s, keys, scale);
    if (found != found) {
      std::fill_n(out, h.D, static_cast<uint16_t>(0x7fc0));
      return;
    }
    found = most > found ? most : found;
    if (found == -INFINITY) {  // no score is finite, and none counts
      std::memset(s, 0, sizeof s);
      values(s, h, keys, 1, whole.data());
      continue;
    }
    const float new_sum = weights(s, keys, found), fade = std::exp(most - found);
    sum = std::fma(fade, sum, new_sum);
    most = found;
    values(s, h, keys, fade, whole.data());
  }
  const float over = 1 / (sum == 0 ? 1 : sum);
  for (int64_t d = 0; d < h.D; d++) out[d] = bits_bf16(round_bf16(whole.data()[d] * over));
}

}  // namespace
#pragma GCC pop_options
#endif

extern "C" {

// Whether the call below may be made.
int hf_flash_attention() {
#ifdef ATTENTION
  return level() == 4;
#else
  return 0;
#endif
}

// out [B, H, D] = attention of q [B, H, D] over k and v [B, H / group, n, D]; strides in elements: of a sequence and a
// head of q, then of a sequence, a head and a key of k and v. D is a multiple of 16.
void hf_flash_attend(const uint16_t *q, const uint16_t *k, const uint16_t *v, int64_t q_batch, int64_t q_head,
                     int64_t k_batch, int64_t k_head, int64_t k_token, int64_t v_batch, int64_t v_head, int64_t v_token,
                     int64_t B, int64_t H, int64_t group, int64_t n, int64_t D, float scale, uint16_t *out) {
#ifdef ATTENTION
  const int threads = B * H < max_threads() ? static_cast<int>(B * H) : max_threads();
  in_parallel(threads, [&](int me) {
    const auto heads = [&](int64_t i) {
      const int64_t b = i / H, shared = i % H / group;
      return Heads{k + b * k_batch + shared * k_head, v + b * v_batch + shared * v_head, k_token, v_token, D};
    };
    const int64_t begin = B * H * me / threads, end = B * H * (me + 1) / threads;
    for (int64_t i = begin; i < end; i++) {
      const Heads h = heads(i), next = heads(i + 1 < end ? i + 1 : i);
      const int64_t some = n < FETCHED ? n : FETCHED;
      if (i == begin) fetch_rows(h.k, k_token, D, some), fetch_rows(h.v, v_token, D, some);
      if (next.k != h.k) fetch_rows(next.k, k_token, D, some), fetch_rows(next.v, v_token, D, some);
      attend(q + i / H * q_batch + i % H * q_head, h, n, scale, out + i * D);
    }
  });
#endif
}

}  // extern "C"
