// What an FFN over slots is asked, however its rows are stored.
#pragma once
#include <memory>

#include "common.h"

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

// out [T, d_out] float32 += the FFN; returns how many neurons fired for any token. `dtype`: of the rows, which are packed
// (packed.h) for the second.
int64_t sparse_ffn(const Ffn &f, int dtype, First first, float *out);
int64_t packed_ffn(const Ffn &f, const int64_t *ids, int base, const int32_t *start, const uint32_t *escapes, First first,
                   float *out);

namespace {

enum Act { RELU = 0, RELU_SQUARED = 1, FATRELU = 2, RELU6 = 3, SILU = 4, GELU = 5, GELU_TANH = 6 };

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

constexpr int64_t PART = 32;  // neurons, at least

CLONES void add_all(const float *from, int64_t n, float *to) {
  for (int64_t i = 0; i < n; i++) to[i] += from[i];
}

// Neurons in parts, taken by whoever is free, each with sums of its own: work(begin, end, sums, fired). out += all sums, in
// the order of the parts, which depend on nothing but n and the number of threads.
template <class F> int64_t sum_parts(int64_t n, int64_t n_out, float *out, First first, F work) {
  int threads = max_threads();
  if (n < 16 * threads) threads = 1;
  if (threads == 1) {
    int64_t fired = 0;
    first();
    work(0, n, out, &fired);
    return fired;
  }
  const int64_t few = n / PART < 4 * threads ? n / PART : 4 * threads, parts = few > threads ? few : threads;
  const int64_t stride = (n_out + 15) / 16 * 16;
  static thread_local std::unique_ptr<Floats> kept;  // from call to call: it is not asked for and given back each time
  static thread_local int64_t n_kept = 0;
  if (n_kept < parts * stride) kept.reset(new Floats(n_kept = parts * stride));
  float *sums = kept->data();
  std::vector<int64_t> fired(static_cast<size_t>(parts) * 8, 0);  // a cache line each
  std::atomic<int64_t> next{0};
  in_parallel(threads, [&](int me) {
    if (me == 0) first();
    for (int64_t k; (k = next.fetch_add(1)) < parts;) {
      std::fill_n(sums + k * stride, n_out, 0.0f);
      work(n * k / parts, n * (k + 1) / parts, sums + k * stride, &fired[static_cast<size_t>(k) * 8]);
    }
  });
  int64_t total = 0;
  for (int64_t k = 0; k < parts; k++) {
    total += fired[static_cast<size_t>(k) * 8];
    add_all(sums + k * stride, n_out, out);
  }
  return total;
}

}  // namespace
