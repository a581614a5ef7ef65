// Matrices in some 11.2 bits a weight (tight.h): packed, unpacked and multiplied as they are. Where the CPU lacks the
// instructions, tight.py does not ask.
#include "calls.h"
#include "tight.h"

namespace {

// The first of the N_TIGHT neighbours that leave the fewest of these weights out.
int best_base(const uint16_t *w, int64_t E) {
  int64_t counts[256] = {};
  for (int64_t j = 0; j < E; j++) counts[(w[j] >> 7) & 255]++;
  int64_t inside = 0, most = -1;
  for (int e = 1; e < N_TIGHT; e++) inside += counts[e];
  int best = 1;
  for (int base = 1; base + N_TIGHT <= 256; base++) {
    inside += counts[base + N_TIGHT - 1] - (base > 1 ? counts[base - 1] : 0);
    if (inside > most) most = inside, best = base;
  }
  return best;
}

}  // namespace

#ifdef TIGHT
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vbmi,avx512vbmi2")
namespace {

#include "tight_loops.h"

// Rows ids[begin] .. ids[end], or begin .. end, to bfloat16.
void unpack(const Tight &m, const int64_t *ids, int64_t begin, int64_t end, uint16_t *out, int64_t out_stride) {
  const __m512i front = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), back = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  for (int64_t i = begin; i < end; i++) {
    TightRow row = tight_row(m, ids ? ids[i] : i);
    const int64_t ahead = !ids && i + 1 < end ? m.stride : 0;
    uint16_t *to = out + i * out_stride;
    for (int64_t j = 0, code = m.E; j < m.E; j += BLOCK, code += CODE_BYTES, to += BLOCK) {
      __m512i a, b;
      fetch(row.row + ahead + j);
      fetch(row.row + ahead + code);
      decode_lanes(&row, j, code, &a, &b);
      _mm512_storeu_si512(to, _mm512_permutex2var_epi64(a, front, b));
      _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi64(a, back, b));
    }
  }
}

}  // namespace
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vbmi,avx512vbmi2,avx512bf16")
namespace {
namespace pairs {
#define PAIRS
#include "tight_loops.h"
#undef PAIRS
}  // namespace pairs
}  // namespace
#pragma GCC pop_options
#endif

extern "C" {

// Whether the calls below that compute may be made.
int hf_flash_tight() {
#ifdef TIGHT
  return can_tight();
#else
  return 0;
#endif
}

// Packs n rows of E bfloat16 and chooses their bases; returns how many escapes they have, which go to `escapes` where
// that is not null.
int64_t hf_flash_tight_pack(const uint16_t *from, int64_t from_stride, int64_t n, int64_t E, uint8_t *rows, int64_t stride,
                            uint8_t *base, int32_t *start, uint8_t *escapes) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint16_t *w = from + i * from_stride;
    uint8_t *low = rows + i * stride, *code = low + E;
    base[i] = static_cast<uint8_t>(best_base(w, E));
    start[i] = static_cast<int32_t>(count);
    for (int64_t j = 0; j < E; j += 8, code += 3) {
      uint32_t codes = 0;
      for (int64_t k = 0; k < 8; k++) {
        const uint16_t v = w[j + k];
        const uint32_t exponent = (v >> 7) & 255u, c = exponent - base[i];
        const bool fits = c < static_cast<uint32_t>(N_TIGHT);
        low[j + k] = static_cast<uint8_t>((v & 0x7f) << 1 | v >> 15);
        codes |= (fits ? c : 7u) << (3 * k);
        if (fits) continue;
        if (escapes) escapes[count] = static_cast<uint8_t>(exponent);
        count++;
      }
      code[0] = static_cast<uint8_t>(codes), code[1] = static_cast<uint8_t>(codes >> 8);
      code[2] = static_cast<uint8_t>(codes >> 16);
    }
  }
  start[n] = static_cast<int32_t>(count);
  return count;
}

// out [n, E] bfloat16 = rows `ids`, or the first n.
void hf_flash_tight_unpack(const uint8_t *rows, int64_t stride, int64_t E, const uint8_t *base, const int32_t *start,
                           const uint8_t *escapes, const int64_t *ids, int64_t n, uint16_t *out, int64_t out_stride) {
#ifdef TIGHT
  const Tight m{rows, stride, E, base, start, escapes};
  const int threads = n * E < 65536 * max_threads() ? 1 : max_threads();
  in_parallel(threads, [&](int me) { unpack(m, ids, n * me / threads, n * (me + 1) / threads, out, out_stride); });
#endif
}

// out [T, n] = x [T, E] times the rows, and the bias [n]; x, bias (or null) and out of `dtype`, sums in float32.
void hf_flash_tight_linear(const uint8_t *rows, int64_t stride, int64_t n, int64_t E, const uint8_t *base,
                           const int32_t *start, const uint8_t *escapes, const void *x, const void *bias, int64_t T,
                           int dtype, void *out) {
#ifdef TIGHT
  const Tight m{rows, stride, E, base, start, escapes};
  if (dtype == BF16 && can_pairs()) {
    Floats laid(T * E / 2);
    uint16_t *to = reinterpret_cast<uint16_t *>(laid.data());
    for (int64_t j = 0; j < T * E; j++) to[j / BLOCK * BLOCK + laned(j % BLOCK)] = static_cast<const uint16_t *>(x)[j];
    return linear(n, E, T, bias, dtype, out,
                  [&](int64_t begin, int64_t end, float *sums) { pairs::matvec(m, begin, end, to, T, n, sums); });
  }
  Floats mixed = shuffle(to_float(x, T * E, dtype).data(), T, E);
  linear(n, E, T, bias, dtype, out,
         [&](int64_t begin, int64_t end, float *sums) { matvec(m, begin, end, mixed.data(), T, n, sums); });
#endif
}

}  // extern "C"
