// Matrices of bfloat16 in some 11.2 bits a weight, decoded in a register as a product needs them. Reference: tight.py.
//
// 64 rows make a stripe (the last one is filled up), 16 of its columns a tile. Four columns of 16 rows are a block: what
// two steps of a product want side by side, so nothing is transposed, and a stripe's 64 outputs are summed in four
// registers while memory is read from front to back. A tile has four times the four blocks of its next four columns, of
// each weight a byte, mantissa << 1 | sign, and behind all of these the 3 bits of each one's code: codes 1 .. 7 are the
// exponents base + 1 .. base + 7, where base is the row's own; code 0 says that the exponent is the next byte of the
// stripe's escapes.
#pragma once
#include "packed.h"

struct Tight {  // how a matrix [n, E] is kept; attention_step.py has the same fields
  const uint8_t *tiles;  // [stripes, E / 16, TILE_BYTES], and 8 bytes more
  int64_t n, E;
  const uint8_t *base;     // [stripes * 64]
  const int32_t *start;    // [stripes + 1] where a stripe's escapes begin
  const uint8_t *escapes;  // and 64 bytes more
};

struct TightProduct {
  const Tight *matrix;
  const uint16_t *bias;  // [n], or null
  uint16_t *out;         // [n]
};

// One token x [E], bfloat16, times each of some matrices, all at once.
void tight_products(const TightProduct *products, int64_t n, const uint16_t *x, First first);

namespace {

constexpr int N_TIGHT = 7;           // exponents that have a code
constexpr int64_t REGISTER = 16;     // outputs
constexpr int64_t N_REGISTERS = 4;   // of a stripe: one would wait for its own last sum
constexpr int64_t STRIPE = N_REGISTERS * REGISTER;
constexpr int64_t TILE_COLUMNS = 16;
constexpr int64_t N_BLOCKS = STRIPE * TILE_COLUMNS / BLOCK;  // of a tile
constexpr int64_t CODE_BYTES = BLOCK * 3 / 8;
constexpr int64_t TILE_BYTES = N_BLOCKS * (BLOCK + CODE_BYTES);

// Where weight p of a block lies: two columns of 16 rows, then the next two, and of every 8 rows' in turn, so that
// interleaving with the exponents puts them in order.
INLINE int64_t row_of(int64_t p) { return p / 16 * 4 + p % 8 / 2; }
INLINE int64_t column_of(int64_t p) { return p % 16 / 8 * 2 + p % 2; }

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10
#define TIGHT 1
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vbmi,avx512vbmi2")

namespace {

// Where the decoding of a stripe is. Blocks are taken in order: each begins where the escapes of the last one ended.
struct Stripe {
  const uint8_t *tile, *escape;
  __m512i base[N_REGISTERS];  // of each weight of a block
};

INLINE Stripe stripe_at(const Tight &m, int64_t s) {
  const __m512i which = _mm512_set_epi64(  // row_of
      0x0f0f0e0e0d0d0c0c, 0x0f0f0e0e0d0d0c0c, 0x0b0b0a0a09090808, 0x0b0b0a0a09090808, 0x0707060605050404,
      0x0707060605050404, 0x0303020201010000, 0x0303020201010000);
  Stripe out{m.tiles + s * (m.E / TILE_COLUMNS) * TILE_BYTES, m.escapes + m.start[s], {}};
  for (int64_t r = 0; r < N_REGISTERS; r++) {
    const uint8_t *from = m.base + s * STRIPE + r * REGISTER;
    const __m512i bases = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    out.base[r] = _mm512_shuffle_epi8(bases, which);
  }
  return out;
}

// The codes of block b of the tile, and bits above them.
INLINE __m512i codes_of(const uint8_t *tile, int64_t b) {
  const __m512i place = _mm512_set_epi64(  // three bytes of codes for every eight weights
      0x171615, 0x141312, 0x11100f, 0x0e0d0c, 0x0b0a09, 0x080706, 0x050403, 0x020100);
  const __m512i shift = _mm512_set1_epi64(0x15120f0c09060300);
  const uint8_t *at = tile + N_BLOCKS * BLOCK + b * CODE_BYTES;
  const __m512i packed = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(at)));
  return _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(place, packed));
}

INLINE __mmask64 escaped_of(__m512i codes) { return _mm512_testn_epi8_mask(codes, _mm512_set1_epi8(N_TIGHT)); }

// Block b of the tile: `first` has two columns of 16 rows, `second` the next two.
INLINE void decode_block(Stripe *s, int64_t b, __m512i *first, __m512i *second) {
  const __m512i codes = codes_of(s->tile, b), some = _mm512_and_si512(codes, _mm512_set1_epi8(N_TIGHT));
  const __m512i known = _mm512_add_epi8(some, s->base[b % N_REGISTERS]);
  const __mmask64 escaped = escaped_of(codes);
  const __m512i exponent = _mm512_mask_expand_epi8(known, escaped, _mm512_loadu_si512(s->escape));
  const __m512i low = _mm512_loadu_si512(s->tile + b * BLOCK);
  const __m512i l = _mm512_unpacklo_epi8(low, exponent), h = _mm512_unpackhi_epi8(low, exponent);
  *first = _mm512_shrdi_epi16(l, l, 1), *second = _mm512_shrdi_epi16(h, h, 1);  // the sign goes from the end to the front
  s->escape += __builtin_popcountll(escaped);
}

// Those outputs of a register that there are, of `left`.
INLINE __mmask16 outputs(int64_t left) { return static_cast<__mmask16>(left >= REGISTER ? 0xffff : (1 << left) - 1); }

// Whether this CPU has the instructions.
inline bool can_tight() {
  return level() == 4 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}

// Whether it adds two products of bfloat16 to a float32 at once, too.
inline bool can_pairs() { return can_tight() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vbmi,avx512vbmi2,avx512bf16")

namespace {

// Two bfloat16 inputs, for every output of a register.
INLINE __m512bh pair_of(const uint16_t *x) {
  int32_t both;
  std::memcpy(&both, x, 4);
  return (__m512bh)_mm512_set1_epi32(both);
}

// out [left], 16 at most = the sums, and the bias or null, rounded as torch does.
INLINE void put_rounded(__m512 sum, const uint16_t *bias, int64_t left, uint16_t *out) {
  const __mmask16 mine = outputs(left);
  if (bias) {
    const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mine, bias));
    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)));
  }
  _mm256_mask_storeu_epi16(out, mine, (__m256i)_mm512_cvtneps_pbh(sum));
}

}  // namespace
#pragma GCC pop_options
#endif
