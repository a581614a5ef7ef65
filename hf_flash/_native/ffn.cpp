// The sparse FFN over slots: a few tokens, some neurons, no row copied. Reference: ops.hidden and ops.project.
//
// Four rows at a time: inputs and sums are loaded once for four, and four streams of memory are under way at once, which
// a core needs to keep its memory busy. How many loads it has under way itself depends on how many instructions a line
// takes, so 16-bit numbers, which must be widened, are fetched a little ahead by hand, and bfloat16 is widened where it
// lies, the even numbers of a line and the odd ones. For float32 the hardware does better alone (benchmarks/kernels.py).
// Where the CPU adds two products of bfloat16 to a float32 at once, and inputs are bfloat16 as well, nothing is widened.
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
constexpr int64_t AHEAD = 1536;  // bytes fetched ahead of each row, to the L1

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

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10
#define HAVE_PAIRS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
namespace {
namespace pairs {
#define PAIRS
#include "ffn_loops.h"
#undef PAIRS
}  // namespace pairs
}  // namespace
#pragma GCC pop_options
#endif

namespace {

// Where number k of a block of 32 belongs, as bfloat16 is widened: the even ones, then the odd ones.
constexpr int64_t mixed(int64_t k) { return k % 2 * BLOCK / 2 + k / 2; }

// And where it lands as two rows are paired: of every eight the first four, then of every eight the others.
constexpr int64_t paired(int64_t k) { return k / 4 % 2 * BLOCK / 2 + k / 8 * 4 + k % 4; }

// Adds what lies where PLACE says.
template <int64_t PLACE(int64_t)> void add_in_order(const float *from, int64_t d, float *to) {
  int64_t j = 0;
  for (; j + BLOCK <= d; j += BLOCK)
    for (int64_t k = 0; k < BLOCK; k++) to[j + k] += from[j + PLACE(k)];
  for (; j < d; j++) to[j] += from[j];
}

template <int TYPE> int64_t run(const Ffn &f, First first, float *out) {
  return sum_parts(f.n, f.T * f.d_out, out, first, [&](int64_t begin, int64_t end, float *acc, int64_t *fired) {
    CALL(ffn<TYPE>, &f, f.x, begin, end, acc, fired);
  });
}

int64_t run_mixed(Ffn f, First first, float *out) {
  Floats x(f.T * f.d), sums(f.T * f.d_out);
  for (int64_t t = 0; t < f.T; t++) {
    const float *from = f.x + t * f.d;
    float *to = x.data() + t * f.d;
    int64_t j = 0;
    for (; j + BLOCK <= f.d; j += BLOCK)
      for (int64_t k = 0; k < BLOCK; k++) to[j + mixed(k)] = from[j + k];
    for (; j < f.d; j++) to[j] = from[j];
  }
  f.x = x.data();
  const int64_t fired = run<BF16>(f, first, sums.data());
  for (int64_t t = 0; t < f.T; t++) add_in_order<mixed>(sums.data() + t * f.d_out, f.d_out, out + t * f.d_out);
  return fired;
}

#ifdef HAVE_PAIRS
int64_t run_pairs(const Ffn &f, First first, float *out) {
  Floats bits(f.T * f.d / 2 + 1), sums(f.T * f.d_out);
  uint16_t *x = reinterpret_cast<uint16_t *>(bits.data());
  from_float(f.x, f.T * f.d, BF16, x);
  const auto work = [&](int64_t begin, int64_t end, float *acc, int64_t *fired) {
    pairs::ffn<BF16>(&f, x, begin, end, acc, fired);
  };
  const int64_t fired = sum_parts(f.n, f.T * f.d_out, sums.data(), first, work);
  for (int64_t t = 0; t < f.T; t++) add_in_order<paired>(sums.data() + t * f.d_out, f.d_out, out + t * f.d_out);
  return fired;
}
#endif

int64_t run_bf16(const Ffn &f, First first, float *out) {
#ifdef HAVE_PAIRS
  if (f.round_dtype == BF16 && level() == 4 && __builtin_cpu_supports("avx512bf16")) return run_pairs(f, first, out);
#endif
  return run_mixed(f, first, out);
}

}  // namespace

int64_t sparse_ffn(const Ffn &f, int dtype, First first, float *out) {
  return dtype == BF16 ? run_bf16(f, first, out) : dtype == F16 ? run<F16>(f, first, out) : run<F32>(f, first, out);
}

extern "C" {

int hf_flash_abi() { return 12; }

// out [T, d_out] float32 += the FFN of x over n slots; returns how many of them fired for any token.
int64_t hf_flash_sparse_ffn(const float *x, int64_t T, int64_t d, int64_t d_out, const uint8_t *rows, int64_t stride,
                            const int64_t *slots, int64_t n, const float *gate_bias, const float *up_bias, int gated,
                            int dtype, int round_dtype, int act, float threshold, float *out) {
  const Ffn f{x, T, d, d_out, rows, stride, slots, gate_bias, up_bias, gated, act, round_dtype, threshold, n};
  return sparse_ffn(f, dtype, First(), out);
}

}  // extern "C"
