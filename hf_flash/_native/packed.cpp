// Rows of bfloat16 in 12 bits a weight: unpacked, multiplied and summed as they are. Reference: packing.py.
//
// A row of E weights is E bytes (sign and mantissa) and E / 2 bytes of exponent codes, 4 bits each: code 0 is exponent
// 0 (zero and subnormal numbers), code c is exponent base + c. What does not fit is an escape: it is stored as a number
// below 2^-126, which adds nothing to a sum, and its true value is added from a list in DRAM.
#include "calls.h"
#include "ffn.h"
#include "packed.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

// Packs rows; returns how many escapes they have, which go to `escapes` where that is not null.
int64_t pack_rows(const uint16_t *from, int64_t from_stride, int64_t n, int64_t E, uint32_t base, uint8_t *rows,
                  int64_t stride, int32_t *start, uint32_t *escapes) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint16_t *w = from + i * from_stride;
    uint8_t *row = rows + i * stride;
    start[i] = static_cast<int32_t>(count);
    for (int64_t j = 0; j < E; j += BLOCK) {
      uint8_t codes[BLOCK];
      for (int64_t k = 0; k < BLOCK; k++) {
        const uint16_t v = w[j + k];
        const uint32_t exponent = (v >> 7) & 255u, code = exponent - base;
        row[j + k] = static_cast<uint8_t>(((v >> 8) & 0x80) | (v & 0x7f));
        const bool fits = exponent == 0 || (code >= 1 && code <= 15);
        codes[k] = static_cast<uint8_t>(exponent && fits ? code : 0);
        if (!fits) {
          if (escapes) escapes[count] = static_cast<uint32_t>(j + k) << 16 | v;
          count++;
        }
      }
      for (int64_t k = 0; k < 32; k++) row[E + j / 2 + k] = static_cast<uint8_t>(codes[k] | codes[k + 32] << 4);
    }
  }
  start[n] = static_cast<int32_t>(count);
  return count;
}

}  // namespace

#define LOOPS "packed_loops.h"
#include "each_level.h"

extern "C" {

// Packs rows; returns how many escapes they have, which go to `escapes` where that is not null.
int64_t hf_flash_pack(const uint16_t *from, int64_t from_stride, int64_t n, int64_t E, int base, uint8_t *rows,
                      int64_t stride, int32_t *start, uint32_t *escapes) {
  return pack_rows(from, from_stride, n, E, static_cast<uint32_t>(base), rows, stride, start, escapes);
}

// counts[e] += how many of n values have exponent e.
void hf_flash_exponents(const uint16_t *values, int64_t n, int64_t *counts) {
  std::vector<int64_t> some(4 * 256, 0);  // four tables: one would wait for itself
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; k++) some[static_cast<size_t>(256 * k + ((values[i + k] >> 7) & 255))]++;
  for (; i < n; i++) some[(values[i] >> 7) & 255]++;
  for (size_t e = 0; e < 256; e++) counts[e] += some[e] + some[256 + e] + some[512 + e] + some[768 + e];
}

void hf_flash_unpack(const uint8_t *rows, int64_t stride, const int64_t *slots, const int64_t *ids, int64_t n, int64_t E,
                     int base, const int32_t *start, const uint32_t *escapes, int64_t from, int64_t upto, uint16_t *out,
                     int64_t out_stride) {
  const Packed p(E, base, start, escapes);
  const int threads = n * (upto - from) < 65536 * max_threads() ? 1 : max_threads();
  in_parallel(threads, [&](int me) {
    CALL(unpack, &p, rows, stride, slots, ids, n * me / threads, n * (me + 1) / threads, from, upto, out, out_stride);
  });
}

// out [T, n] = x [T, E] times the rows, and the bias [n]; x, bias (or null) and out of `dtype`, sums in float32.
void hf_flash_packed_linear(const uint8_t *rows, int64_t stride, int64_t n, int64_t E, int base, const int32_t *start,
                            const uint32_t *escapes, const void *x, const void *bias, int64_t T, int dtype, void *out) {
  const Packed p(E, base, start, escapes);
  Floats mixed = shuffle(to_float(x, T * E, dtype).data(), T, E);
  linear(n, E, T, bias, dtype, out, [&](int64_t begin, int64_t end, float *sums) {
    CALL(matvec, &p, rows, stride, begin, end, mixed.data(), T, n, sums);
  });
}

// out [T, d_out] float32 += the FFN of x over n slots; returns how many of them fired for any token.
int64_t hf_flash_packed_ffn(const float *x, int64_t T, int64_t d, int64_t d_out, const uint8_t *rows, int64_t stride,
                            const int64_t *slots, const int64_t *ids, int64_t n, const float *gate_bias,
                            const float *up_bias, int gated, int base, const int32_t *start, const uint32_t *escapes,
                            int round_dtype, int act, float threshold, float *out) {
  const Ffn f{x, T, d, d_out, rows, stride, slots, gate_bias, up_bias, gated, act, round_dtype, threshold, n};
  return packed_ffn(f, ids, base, start, escapes, First(), out);
}

}  // extern "C"

int64_t packed_ffn(const Ffn &given, const int64_t *ids, int base, const int32_t *start, const uint32_t *escapes,
                   First first, float *out) {
  Ffn f = given;
  Floats mixed = shuffle(f.x, f.T, f.d), sums(f.T * f.d_out);
  f.x = mixed.data();
  const Packed p(f.d * (f.gated ? 2 : 1) + f.d_out, base, start, escapes);
  const auto work = [&](int64_t begin, int64_t end, float *acc, int64_t *some) {
    CALL(ffn, &f, &p, ids, begin, end, acc, some);
  };
  const int64_t fired = sum_parts(f.n, f.T * f.d_out, sums.data(), first, work);
  add_unshuffled(sums.data(), f.T * f.d_out, out);
  return fired;
}
