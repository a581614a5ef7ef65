// The sparse FFN over slots: a few tokens, some neurons, no row copied. Reference: ops.hidden and ops.project.
#include "ffn.h"

namespace {

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

}  // namespace

extern "C" {

int hf_flash_abi() { return 2; }

// out [T, d_out] float32 += the FFN of x over n slots; returns how many of them fired for any token.
int64_t hf_flash_sparse_ffn(const float *x, int64_t T, int64_t d, int64_t d_out, const uint8_t *rows, int64_t stride,
                            const int64_t *slots, int64_t n, const float *gate_bias, const float *up_bias, int gated,
                            int dtype, int round_dtype, int act, float threshold, float *out) {
  Ffn f{x, T, d, d_out, rows, stride, slots, gate_bias, up_bias, gated, act, round_dtype, threshold, n};
  auto kernel = dtype == BF16 ? ffn_bf16 : dtype == F16 ? ffn_f16 : ffn_f32;
  return sum_parts(n, T * d_out, out, [&](int64_t begin, int64_t end, float *acc, int64_t *fired) {
    kernel(&f, begin, end, acc, fired);
  });
}

}  // extern "C"
