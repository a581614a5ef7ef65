// The sparse FFN over slots: a few tokens, some neurons, no row copied. Reference: ops.hidden and ops.project.
//
// Four rows at a time: inputs and sums are loaded once for four, and four streams of memory are under way at once, which
// a core needs to keep its memory busy. How many loads it has under way itself depends on how many instructions a line
// takes, so 16-bit numbers, which must be widened, are fetched a little ahead by hand, and bfloat16 is widened where it
// lies, the even numbers of a line and the odd ones. For float32 the hardware does better alone (benchmarks/kernels.py).
#include "calls.h"
#include "ffn.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

template <int TYPE> constexpr int SIZE = TYPE == F32 ? 4 : 2;
constexpr int64_t BLOCK = 32;    // numbers of a row that the loops take at a time
constexpr int64_t AHEAD = 1536;  // bytes fetched ahead of each row

template <int TYPE> INLINE float one(const uint8_t *at, int64_t k) {  // number k from `at`
  if (TYPE == F32) {
    float v;
    std::memcpy(&v, at + 4 * k, 4);
    return v;
  }
  uint16_t bits;
  std::memcpy(&bits, at + 2 * k, 2);
  return TYPE == F16 ? any_f16(bits) : from_bf16(bits);
}

}  // namespace

#define LOOPS "ffn_loops.h"
#include "each_level.h"

namespace {

// Every whole block of 32: the even ones, then the odd ones, as bfloat16 is widened. Or back.
void mix(const float *from, int64_t d, float *to) {
  int64_t j = 0;
  for (; j + BLOCK <= d; j += BLOCK)
    for (int64_t k = 0; k < BLOCK / 2; k++) to[j + k] = from[j + 2 * k], to[j + BLOCK / 2 + k] = from[j + 2 * k + 1];
  for (; j < d; j++) to[j] = from[j];
}

void add_unmixed(const float *from, int64_t d, float *to) {
  int64_t j = 0;
  for (; j + BLOCK <= d; j += BLOCK)
    for (int64_t k = 0; k < BLOCK / 2; k++) to[j + 2 * k] += from[j + k], to[j + 2 * k + 1] += from[j + BLOCK / 2 + k];
  for (; j < d; j++) to[j] += from[j];
}

template <int TYPE> int64_t run(const Ffn &f, float *out) {
  return sum_parts(f.n, f.T * f.d_out, out, [&](int64_t begin, int64_t end, float *acc, int64_t *fired) {
    CALL(ffn<TYPE>, &f, begin, end, acc, fired);
  });
}

int64_t run_mixed(Ffn f, float *out) {
  Floats x(f.T * f.d), sums(f.T * f.d_out);
  for (int64_t t = 0; t < f.T; t++) mix(f.x + t * f.d, f.d, x.data() + t * f.d);
  f.x = x.data();
  const int64_t fired = run<BF16>(f, sums.data());
  for (int64_t t = 0; t < f.T; t++) add_unmixed(sums.data() + t * f.d_out, f.d_out, out + t * f.d_out);
  return fired;
}

}  // namespace

extern "C" {

int hf_flash_abi() { return 9; }

// out [T, d_out] float32 += the FFN of x over n slots; returns how many of them fired for any token.
int64_t hf_flash_sparse_ffn(const float *x, int64_t T, int64_t d, int64_t d_out, const uint8_t *rows, int64_t stride,
                            const int64_t *slots, int64_t n, const float *gate_bias, const float *up_bias, int gated,
                            int dtype, int round_dtype, int act, float threshold, float *out) {
  const Ffn f{x, T, d, d_out, rows, stride, slots, gate_bias, up_bias, gated, act, round_dtype, threshold, n};
  return dtype == BF16 ? run_mixed(f, out) : dtype == F16 ? run<F16>(f, out) : run<F32>(f, out);
}

}  // extern "C"
