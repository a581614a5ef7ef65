// What an FFN over slots is asked, however its rows are stored.
#pragma once
#include "common.h"

namespace {

enum Act { RELU = 0, RELU_SQUARED = 1, FATRELU = 2, RELU6 = 3, SILU = 4, GELU = 5, GELU_TANH = 6 };

struct Ffn {
  const float *x;           // [T, d], exact values of the model's dtype
  int64_t T, d, d_out;
  const uint8_t *rows;      // [n_slots, stride]
  int64_t stride;
  const int64_t *slots;     // [n]
  const float *gate_bias, *up_bias;  // [n] or null
  int gated, act, round_dtype;
  float threshold;
  int64_t n;
};

INLINE float activate(float z, int act, float threshold) {
  switch (act) {
    case RELU_SQUARED: { float r = z <= 0 ? 0 : z; return r * r; }  // NaN stays NaN, as in torch
    case FATRELU: return z > threshold ? z : 0;                     // but not here
    case RELU6: { float r = z <= 0 ? 0 : z; return r >= 6 ? 6 : r; }
    case SILU: return z / (1.0f + std::exp(-z));
    case GELU: return 0.5f * z * (1.0f + std::erf(z * 0.70710678118654752f));
    case GELU_TANH: return 0.5f * z * (1.0f + std::tanh(0.79788456080286536f * (z + 0.044715f * z * z * z)));
    default: return z <= 0 ? 0 : z;
  }
}

// Neurons in parts, one a thread, each with sums of its own: work(begin, end, sums, fired). out += all sums.
template <class F> int64_t sum_parts(int64_t n, int64_t n_out, float *out, F work) {
  int threads = max_threads();
  if (n < 16 * threads) threads = 1;
  if (threads == 1) {
    int64_t fired = 0;
    work(0, n, out, &fired);
    return fired;
  }
  const int64_t stride = (n_out + 15) / 16 * 16;
  Floats sums(threads * stride);
  std::vector<int64_t> fired(static_cast<size_t>(threads) * 8, 0);  // a cache line each
  in_parallel(threads, [&](int me) {
    work(n * me / threads, n * (me + 1) / threads, sums.data() + me * stride, &fired[static_cast<size_t>(me) * 8]);
  });
  int64_t total = 0;
  for (int me = 0; me < threads; me++) {
    total += fired[static_cast<size_t>(me) * 8];
    const float *part = sums.data() + me * stride;
    for (int64_t j = 0; j < n_out; j++) out[j] += part[j];
  }
  return total;
}

}  // namespace
