// How rows of 12 bits a weight are described to the loops (packed.cpp), and what they share with those of 11 (tight.cpp).
#pragma once
#include "common.h"

namespace {

constexpr int64_t BLOCK = 64;  // weights whose 64 codes lie in 32 bytes: byte j has those of weights j and j + 32

constexpr int64_t CHAIN = 512;  // inputs whose products torch sums before it adds those sums: ordered.cpp

constexpr int64_t ROW_BLOCK = 256;  // rows of a matrix that a thread takes at a time, or a fourth of its share

// Where the loops keep value j: by block of 64, first the even ones of the first 8 of every 16, then their odd ones, then
// those of the second 8.
INLINE int64_t shuffled(int64_t j) {
  const int64_t lane = j / 16 % 4, k = j % 16;
  return j / BLOCK * BLOCK + k / 8 * 32 + k % 2 * 16 + lane * 4 + k % 8 / 2;
}

// Where `decode_lanes` puts weight k of 64: in `first` or, after its 32, in `second`.
INLINE int64_t laned(int64_t k) { return k % 16 / 8 * 32 + k / 16 * 8 + k % 8; }

// out [T, n] of `dtype` = what products(begin, end, sums [T, n]) gives for n rows of E weights, and the bias [n] or null.
template <class F> void linear(int64_t n, int64_t E, int64_t T, const void *bias, int dtype, void *out, F products) {
  const std::vector<float> added = to_float(bias, bias ? n : 0, dtype);
  std::vector<float> sums(static_cast<size_t>(T * n));
  const int threads = n * E < 65536 * max_threads() ? 1 : max_threads();
  const int64_t share = n / (4 * threads) / 64 * 64, block = share < 64 ? 64 : share < ROW_BLOCK ? share : ROW_BLOCK;
  in_blocks(threads, n, block, [&](int64_t begin, int64_t end) { products(begin, end, sums.data()); });
  for (int64_t t = 0; t < T; t++)
    for (int64_t i = 0; i < n && bias; i++) sums[static_cast<size_t>(t * n + i)] += added[static_cast<size_t>(i)];
  from_float(sums.data(), T * n, dtype, out);
}

struct alignas(16) Tables {  // by code: the exponent's upper 7 bits, and its lowest as the top bit of the lower byte
  uint8_t high[16], low[16];
};

struct Packed {  // how rows of E weights are packed
  int64_t E;
  uint32_t base;
  const int32_t *start;     // [n_rows + 1] where a row's escapes begin
  const uint32_t *escapes;  // position << 16 | value
  Tables tables;

  Packed(int64_t n, int exponent, const int32_t *begin, const uint32_t *list)
      : E(n), base(static_cast<uint32_t>(exponent)), start(begin), escapes(list) {
    for (uint32_t c = 0; c < 16; c++) {
      const uint32_t e = c ? base + c : 0;
      tables.high[c] = static_cast<uint8_t>(e >> 1), tables.low[c] = static_cast<uint8_t>((e & 1) << 7);
    }
  }
};

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace {

// 64 weights as bfloat16 in 16-byte lanes: `first` has the first 8 of every 16, `second` the others.
INLINE void decode_lanes(const uint8_t *low, const uint8_t *code, const Tables &t, __m512i *first, __m512i *second) {
  const __m512i l = _mm512_loadu_si512(low);
  const __m256i n = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(code));
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(n), _mm256_srli_epi16(n, 4), 1);
  const __m512i c = _mm512_and_si512(both, _mm512_set1_epi8(15));
  const __m512i h = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)t.high)), c);
  const __m512i g = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)t.low)), c);
  const __m512i high = _mm512_ternarylogic_epi32(h, l, _mm512_set1_epi8(-128), 0xf8);  // h | (l & 0x80)
  const __m512i down = _mm512_ternarylogic_epi32(g, l, _mm512_set1_epi8(127), 0xf8);
  *first = _mm512_unpacklo_epi8(down, high), *second = _mm512_unpackhi_epi8(down, high);
}

// out[i] has the i-th four bytes of each of 16 registers.
INLINE void transpose(const __m512i *in, __m512i *out) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2)
    b[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; i++) {  // a[i + 4 r] has column 4 lane + i of registers 4 r .. 4 r + 3
    const __m512i c0 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), c1 = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    const __m512i d0 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    const __m512i d1 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    out[i] = _mm512_shuffle_i32x4(c0, d0, 0x88), out[8 + i] = _mm512_shuffle_i32x4(c0, d0, 0xdd);
    out[4 + i] = _mm512_shuffle_i32x4(c1, d1, 0x88), out[12 + i] = _mm512_shuffle_i32x4(c1, d1, 0xdd);
  }
}

// put(16 numbers of a block of 64, where they go), four times a block: `order`(k) says which 8 of the first 32 those of
// vector k are; the other 8 are the same ones of the last 32.
template <class Order, class Put> inline void in_order(const float *from, int64_t n, Order order, Put put) {
  for (int64_t j = 0; j < n; j += BLOCK, from += BLOCK) {
    __m512 v[4];
    for (int k = 0; k < 4; k++) v[k] = _mm512_loadu_ps(from + 16 * k);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      const __m512i at = order(k);
      const __m512 front = _mm512_permutex2var_ps(v[0], at, v[1]), back = _mm512_permutex2var_ps(v[2], at, v[3]);
      put(_mm512_insertf32x8(front, _mm512_castps512_ps256(back), 1), j + 16 * k);
    }
  }
}

// Per block of 64: to[shuffled(k)] = from[k].
inline void shuffle_lanes(const float *from, int64_t n, float *to) {
  const __m512i first = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 22, 20, 18, 16, 6, 4, 2, 0);
  in_order(from, n, [&](int k) { return _mm512_add_epi32(first, _mm512_set1_epi32(k / 2 * 8 + k % 2)); },
           [&](__m512 some, int64_t at) { _mm512_storeu_ps(to + at, some); });
}

// Per block of 64: to[k] += from[shuffled(k)].
inline void add_unshuffled_lanes(const float *from, int64_t n, float *to) {
  const __m512i first = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 19, 3, 18, 2, 17, 1, 16, 0);
  in_order(from, n, [&](int k) { return _mm512_add_epi32(first, _mm512_set1_epi32(4 * k)); },
           [&](__m512 some, int64_t at) { _mm512_storeu_ps(to + at, _mm512_add_ps(_mm512_loadu_ps(to + at), some)); });
}

}  // namespace
#pragma GCC pop_options
#define LANES 1
#endif

namespace {

inline Floats shuffle(const float *x, int64_t T, int64_t d) {
  Floats out(T * d);
  float *to = out.data();
#ifdef LANES
  if (level() == 4) return shuffle_lanes(x, T * d, to), out;
#endif
  for (int64_t j = 0; j < T * d; j += BLOCK)
    for (int64_t k = 0; k < BLOCK; k++) to[j + shuffled(k)] = x[j + k];
  return out;
}

// to [n] += what is kept in the order of `shuffled`.
inline void add_unshuffled(const float *from, int64_t n, float *to) {
#ifdef LANES
  if (level() == 4) return add_unshuffled_lanes(from, n, to);
#endif
  for (int64_t j = 0; j < n; j += BLOCK)
    for (int64_t k = 0; k < BLOCK; k++) to[j + k] += from[j + shuffled(k)];
}

}  // namespace
