// Native kernels of hf_flash: the sparse FFN over slots, and the scan of a certified gate's sketch.
//
// Pointers and sizes in, nothing of torch's C++ ABI, no Python in the loops. Called through ctypes, which releases the
// GIL. Threads are OpenMP's, resolved at load time from the runtime that torch brought along, so both share one pool
// and torch.set_num_threads() governs both. Loops are plain C++ that the compiler vectorizes, once per instruction set
// (function multiversioning), so one binary runs everywhere. Each function has its torch reference in ops.py and
// gates/certified.py; tests/test_native.py compares them.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

enum DType { F32 = 0, F16 = 1, BF16 = 2 };
enum Act { RELU = 0, RELU_SQUARED = 1, FATRELU = 2, RELU6 = 3 };

INLINE float from_bf16(uint16_t v) {
  uint32_t bits = static_cast<uint32_t>(v) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

INLINE float from_f16(uint16_t v) {  // finite values; a few integer operations, so that every compiler vectorizes it
  uint32_t bits = static_cast<uint32_t>(v & 0x7fffu) << 13, sign = static_cast<uint32_t>(v & 0x8000u) << 16;
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  magnitude *= 0x1p112f;  // moves the exponent from half's bias to float's, subnormals included
  std::memcpy(&bits, &magnitude, 4);
  bits |= sign;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

INLINE float round_bf16(float v) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return v;
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

INLINE float round_f16(float v) {  // to nearest, ties to even; overflow to infinity as the dense model has it
  const float a = std::fabs(v);
  if (!(a < 65520.0f)) return a != a ? v : std::copysign(INFINITY, v);
  if (a < 0x1p-14f) return std::copysign(std::rint(a * 0x1p24f) * 0x1p-24f, v);  // subnormal: multiples of 2^-24
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = (bits + 0xfffu + ((bits >> 13) & 1u)) & 0xffffe000u;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

INLINE float round_to(float v, int dtype) {
  if (dtype == BF16) return round_bf16(v);
  if (dtype == F16) return round_f16(v);
  return v;
}

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
    default: return z <= 0 ? 0 : z;
  }
}

// One instance per stored dtype: W is the element, LOAD(w) its float value.
#define DEFINE_FFN(NAME, W, LOAD)                                                                       \
  CLONES void NAME(const Ffn *f, int64_t begin, int64_t end, float *acc, int64_t *fired) {              \
    const int64_t d = f->d, d_out = f->d_out;                                                           \
    for (int64_t i = begin; i < end; i++) {                                                             \
      const W *row = reinterpret_cast<const W *>(f->rows + f->slots[i] * f->stride);                    \
      if (i + 1 < end) {                                                                                \
        const uint8_t *next = f->rows + f->slots[i + 1] * f->stride;                                    \
        for (int p = 0; p < 512; p += 64) __builtin_prefetch(next + p);                                 \
      }                                                                                                 \
      const W *up = row + (f->gated ? d : 0), *down = up + d;                                           \
      bool any = false;                                                                                 \
      for (int64_t t = 0; t < f->T; t++) {                                                              \
        const float *x = f->x + t * d;                                                                  \
        float z = 0;                                                                                    \
        for (int64_t j = 0; j < d; j++) z += LOAD(row[j]) * x[j];                                       \
        const float *bias = f->gated ? f->gate_bias : f->up_bias;                                       \
        z = round_to(bias ? z + bias[i] : z, f->round_dtype);                                           \
        float h = round_to(activate(z, f->act, f->threshold), f->round_dtype);                          \
        if (h == 0) continue; /* silent: neither up nor down is touched */                              \
        if (f->gated) {                                                                                 \
          float u = 0;                                                                                  \
          for (int64_t j = 0; j < d; j++) u += LOAD(up[j]) * x[j];                                      \
          h = round_to(h * round_to(f->up_bias ? u + f->up_bias[i] : u, f->round_dtype), f->round_dtype); \
        }                                                                                               \
        any = true;                                                                                     \
        float *y = acc + t * d_out;                                                                     \
        for (int64_t j = 0; j < d_out; j++) y[j] += h * LOAD(down[j]);                                  \
      }                                                                                                 \
      *fired += any;                                                                                    \
    }                                                                                                   \
  }

#define LOAD_F32(w) (w)
DEFINE_FFN(ffn_f32, float, LOAD_F32)
DEFINE_FFN(ffn_f16, uint16_t, from_f16)
DEFINE_FFN(ffn_bf16, uint16_t, from_bf16)

struct Scan {
  const float *x;          // [T, groups * 64], zero-padded
  const float *xx, *xn;    // [T, groups]: squared norms and norms per group, from above
  const float *size;       // [T]: |x|, infinite where the token is not judged
  int64_t T, groups;
  const uint8_t *codes;    // [n, groups * 8 * bits]
  const uint16_t *step, *error;  // [n, groups] bf16
  const float *slack, *bias;     // [n]; what arithmetic may add per |x|; bias may be null
  int bits;
  float log_delta, gamma, unit, threshold;  // ln(1/delta)/2, or < 0 for the deterministic bound alone
  uint8_t *wanted, *recent;      // [n] any token wants it; the last token does
};

constexpr int GROUP = 64;

INLINE void unpack(const uint8_t *codes, int bits, float *out, int64_t groups) {
  if (bits == 8) {
    for (int64_t j = 0; j < groups * GROUP; j++) out[j] = static_cast<float>(static_cast<int>(codes[j]) - 128);
    return;
  }
  const int half = 1 << (bits - 1);
  if (bits == 4) {
    for (int64_t j = 0; j < groups * GROUP / 2; j++) {
      out[2 * j] = static_cast<float>((codes[j] & 15) - half);
      out[2 * j + 1] = static_cast<float>((codes[j] >> 4) - half);
    }
    return;
  }
  const uint64_t mask = (1u << bits) - 1;
  for (int64_t e = 0; e < groups * GROUP / 8; e++) {
    uint64_t word = 0;
    for (int b = 0; b < bits; b++) word |= static_cast<uint64_t>(codes[e * bits + b]) << (8 * b);
    for (int k = 0; k < 8; k++) out[e * 8 + k] = static_cast<float>(static_cast<int>((word >> (k * bits)) & mask) - half);
  }
}

CLONES void scan_range(const Scan *s, int64_t begin, int64_t end, float *row) {
  const int64_t groups = s->groups, bytes = groups * 8 * s->bits;
  for (int64_t i = begin; i < end; i++) {
    unpack(s->codes + i * bytes, s->bits, row, groups);
    const uint16_t *step = s->step + i * groups, *error = s->error + i * groups;
    bool any = false, last = false;
    for (int64_t t = 0; t < s->T; t++) {
      const float *x = s->x + t * groups * GROUP;
      float score = 0, squares = 0, sure = 0;
      for (int64_t g = 0; g < groups; g++) {
        float dot = 0;
        for (int j = 0; j < GROUP; j++) dot += row[g * GROUP + j] * x[g * GROUP + j];
        const float sg = from_bf16(step[g]);
        score += sg * dot;
        squares += sg * sg * s->xx[t * groups + g];
        sure += from_bf16(error[g]) * s->xn[t * groups + g];
      }
      float bound = sure;
      if (s->log_delta >= 0) {
        const float h = std::sqrt(s->log_delta * squares);
        bound = h < sure ? h : sure;
      }
      float v = score + bound * (1 + 1.0f / 4096) + s->size[t] * s->slack[i];
      v += s->unit * std::fabs(v);
      if (s->bias) {
        v += s->bias[i] + s->gamma * std::fabs(s->bias[i]);
        v += s->unit * std::fabs(v);
      }
      last = !(v <= s->threshold);  // NaN wants every neuron
      any |= last;
    }
    s->wanted[i] = any;
    s->recent[i] = last;
  }
}

}  // namespace

extern "C" {

int hf_flash_abi() { return 1; }

// out [T, d_out] float32 += the FFN of x over n slots; returns how many of them fired for any token.
int64_t hf_flash_sparse_ffn(const float *x, int64_t T, int64_t d, int64_t d_out, const uint8_t *rows, int64_t stride,
                            const int64_t *slots, int64_t n, const float *gate_bias, const float *up_bias, int gated,
                            int dtype, int round_dtype, int act, float threshold, float *out) {
  Ffn f{x, T, d, d_out, rows, stride, slots, gate_bias, up_bias, gated, act, round_dtype, threshold, n};
  auto kernel = dtype == BF16 ? ffn_bf16 : dtype == F16 ? ffn_f16 : ffn_f32;
  int threads = 1;
#ifdef _OPENMP
  threads = omp_get_max_threads();
#endif
  if (n < 16 * threads) threads = 1;
  std::vector<float> acc(static_cast<size_t>(threads) * T * d_out, 0.0f);
  std::vector<int64_t> fired(threads * 8, 0);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
  {
    int me = 0;
#ifdef _OPENMP
    me = omp_get_thread_num();
#endif
    kernel(&f, n * me / threads, n * (me + 1) / threads, acc.data() + static_cast<size_t>(me) * T * d_out, &fired[me * 8]);
  }
  int64_t total = 0;
  for (int me = 0; me < threads; me++) {
    total += fired[me * 8];
    const float *part = acc.data() + static_cast<size_t>(me) * T * d_out;
    for (int64_t j = 0; j < T * d_out; j++) out[j] += part[j];
  }
  return total;
}

// Marks the neurons that cannot be proved silent; see gates/certified.py for the bound.
void hf_flash_gate_scan(const float *x, const float *xx, const float *xn, const float *size, int64_t T, int64_t groups,
                        int64_t n, const uint8_t *codes, const uint16_t *step, const uint16_t *error, const float *slack,
                        const float *bias, int bits, float log_delta, float gamma, float unit, float threshold,
                        uint8_t *wanted, uint8_t *recent) {
  Scan s{x, xx, xn, size, T, groups, codes, step, error, slack, bias, bits, log_delta, gamma, unit, threshold, wanted, recent};
  int threads = 1;
#ifdef _OPENMP
  threads = omp_get_max_threads();
#endif
  if (n * groups < 4096 * threads) threads = 1;
  std::vector<float> rows(static_cast<size_t>(threads) * groups * GROUP);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
  {
    int me = 0;
#ifdef _OPENMP
    me = omp_get_thread_num();
#endif
    scan_range(&s, n * me / threads, n * (me + 1) / threads, rows.data() + static_cast<size_t>(me) * groups * GROUP);
  }
}

}  // extern "C"
