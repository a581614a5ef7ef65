// Rows of bfloat16 in some 11.2 bits a weight, decoded in a register: tight.cpp, and ordered.cpp where torch's order of
// sums is kept. Reference: tight.py.
//
// A row of E weights is E bytes, mantissa << 1 | sign, and 3 bits of code for each: codes 0 .. 6 are the exponents
// base .. base + 6, where base is the row's own; code 7 says that the exponent is the next byte of the row's escapes.
#pragma once
#include "packed.h"

namespace {

constexpr int N_TIGHT = 7;  // exponents that have a code
constexpr int64_t CODE_BYTES = BLOCK * 3 / 8;

struct Tight {  // how a matrix is kept
  const uint8_t *rows;  // [n, stride], and 8 bytes more
  int64_t stride, E;
  const uint8_t *base;     // [n], none 0
  const int32_t *start;    // [n + 1] where a row's escapes begin
  const uint8_t *escapes;  // and 64 bytes more
};

// Where `decode_lanes` puts weight k of 64: in `first` or, after its 32, in `second`.
INLINE int64_t laned(int64_t k) { return k % 16 / 8 * 32 + k / 16 * 8 + k % 8; }

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10
#define TIGHT 1
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vbmi,avx512vbmi2")

namespace {

// Where the decoding of a row is. Blocks are taken in order: each begins where the escapes of the last one ended.
struct TightRow {
  const uint8_t *row, *escape;
  __m512i table;  // exponent by code, 0 for code 7
};

INLINE TightRow tight_row(const Tight &m, int64_t i) {
  const __m512i codes = _mm512_set1_epi64(0x0706050403020100), base = _mm512_set1_epi8(static_cast<char>(m.base[i]));
  const __m512i table = _mm512_maskz_add_epi8(0x7f7f7f7f7f7f7f7f, codes, base);
  return {m.rows + i * m.stride, m.escapes + m.start[i], table};
}

// The next 64 weights as bfloat16 in 16-byte lanes: `first` has the first 8 of every 16, `second` the others. They begin
// at weight j, their codes at byte `code` of the row.
INLINE void decode_lanes(TightRow *r, int64_t j, int64_t code, __m512i *first, __m512i *second) {
  const __m512i place = _mm512_set_epi64(  // three bytes of codes for every eight weights
      0x171615, 0x141312, 0x11100f, 0x0e0d0c, 0x0b0a09, 0x080706, 0x050403, 0x020100);
  const __m512i shift = _mm512_set1_epi64(0x15120f0c09060300);
  const __m512i packed = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(r->row + code)));
  const __m512i codes = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(place, packed));
  const __m512i known = _mm512_permutexvar_epi8(codes, r->table);
  const __mmask64 escaped = _mm512_testn_epi8_mask(known, known);
  const __m512i exponent = _mm512_mask_expand_epi8(known, escaped, _mm512_loadu_si512(r->escape));
  const __m512i low = _mm512_loadu_si512(r->row + j);
  const __m512i a = _mm512_unpacklo_epi8(low, exponent), b = _mm512_unpackhi_epi8(low, exponent);
  *first = _mm512_shrdi_epi16(a, a, 1), *second = _mm512_shrdi_epi16(b, b, 1);  // the sign goes from the end to the front
  r->escape += __builtin_popcountll(escaped);
}

// Whether this CPU has the instructions.
inline bool can_tight() {
  return level() == 4 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}

// Whether it adds two products of bfloat16 to a float32 at once, too.
inline bool can_pairs() { return can_tight() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace
#pragma GCC pop_options
#endif
