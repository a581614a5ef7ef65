// The sparse FFN over slots: a few tokens, some neurons, no row copied. Reference: ops.hidden and ops.project.
//
// Four rows at a time: inputs and sums are loaded once for four, and four streams of memory are under way at once, which
// a core needs to keep its memory busy. Rows lie anywhere, so those of 16-bit numbers, which take longer to widen than to
// multiply, are fetched ahead by hand; for float32 the hardware does better (benchmarks/kernels.py).
#include "ffn.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

template <int TYPE> constexpr int SIZE = TYPE == F32 ? 4 : 2;

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

template <int TYPE> int64_t run(const Ffn &f, float *out) {
  return sum_parts(f.n, f.T * f.d_out, out, [&](int64_t begin, int64_t end, float *acc, int64_t *fired) {
    CALL(ffn<TYPE>, &f, begin, end, acc, fired);
  });
}

}  // namespace

extern "C" {

int hf_flash_abi() { return 3; }

// out [T, d_out] float32 += the FFN of x over n slots; returns how many of them fired for any token.
int64_t hf_flash_sparse_ffn(const float *x, int64_t T, int64_t d, int64_t d_out, const uint8_t *rows, int64_t stride,
                            const int64_t *slots, int64_t n, const float *gate_bias, const float *up_bias, int gated,
                            int dtype, int round_dtype, int act, float threshold, float *out) {
  const Ffn f{x, T, d, d_out, rows, stride, slots, gate_bias, up_bias, gated, act, round_dtype, threshold, n};
  return dtype == BF16 ? run<BF16>(f, out) : dtype == F16 ? run<F16>(f, out) : run<F32>(f, out);
}

}  // extern "C"
