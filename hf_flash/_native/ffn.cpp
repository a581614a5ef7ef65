// The sparse FFN over slots: a few tokens, some neurons, no row copied. Reference: ops.hidden and ops.project.
#include "ffn.h"

namespace {

// Four rows at a time: four sums under way hide the latency of an addition, and x or y is loaded once for four. Rows of 16-bit
// numbers, which take arithmetic to widen, are prefetched piece by piece while those before them are used (`next`, may be
// null). Float32 rows are not: there the hardware's own prefetching is faster (30 GB/s against 25; benchmarks/kernels.py).
constexpr int QUAD = 4, BLOCK = 16;  // rows of a step; rows whose activations are known before any down row is read
constexpr int64_t PIECE = 512;       // elements

template <class W> INLINE void prefetch(const uint8_t *const *next, int64_t at, int64_t n) {
  if (!next || sizeof(W) == 4) return;
  for (int r = 0; r < QUAD; r++) {
    for (int64_t p = 0; p < n * static_cast<int64_t>(sizeof(W)); p += 64) {
      __builtin_prefetch(next[r] + at * static_cast<int64_t>(sizeof(W)) + p, 0, 2);
    }
  }
}

// One instance per stored dtype: W is the element, LOAD(w) its float value.
#define DEFINE_STEPS(NAME, W, LOAD)                                                                               \
  CLONES void dot4_##NAME(const uint8_t *const *rows, const uint8_t *const *next, const float *x, int64_t d, float *z) { \
    const W *a = reinterpret_cast<const W *>(rows[0]), *b = reinterpret_cast<const W *>(rows[1]);                 \
    const W *c = reinterpret_cast<const W *>(rows[2]), *e = reinterpret_cast<const W *>(rows[3]);                 \
    z[0] = z[1] = z[2] = z[3] = 0;                                                                                \
    for (int64_t from = 0; from < d; from += PIECE) {                                                             \
      const int64_t to = from + PIECE < d ? from + PIECE : d;                                                     \
      prefetch<W>(next, from, to - from);                                                                         \
      float za = 0, zb = 0, zc = 0, ze = 0;                                                                       \
      for (int64_t j = from; j < to; j++) {                                                                       \
        za += LOAD(a[j]) * x[j], zb += LOAD(b[j]) * x[j], zc += LOAD(c[j]) * x[j], ze += LOAD(e[j]) * x[j];       \
      }                                                                                                           \
      z[0] += za, z[1] += zb, z[2] += zc, z[3] += ze;                                                             \
    }                                                                                                             \
  }                                                                                                               \
  CLONES void add4_##NAME(const uint8_t *const *rows, const uint8_t *const *next, const float *h, int64_t d, float *y) { \
    const W *a = reinterpret_cast<const W *>(rows[0]), *b = reinterpret_cast<const W *>(rows[1]);                 \
    const W *c = reinterpret_cast<const W *>(rows[2]), *e = reinterpret_cast<const W *>(rows[3]);                 \
    const float ha = h[0], hb = h[1], hc = h[2], he = h[3];                                                       \
    for (int64_t from = 0; from < d; from += PIECE) {                                                             \
      const int64_t to = from + PIECE < d ? from + PIECE : d;                                                     \
      prefetch<W>(next, from, to - from);                                                                         \
      for (int64_t j = from; j < to; j++) {                                                                       \
        y[j] += ha * LOAD(a[j]) + hb * LOAD(b[j]) + hc * LOAD(c[j]) + he * LOAD(e[j]);                            \
      }                                                                                                           \
    }                                                                                                             \
  }                                                                                                               \
  CLONES void add1_##NAME(const uint8_t *row, float h, int64_t d, float *y) {                                     \
    const W *a = reinterpret_cast<const W *>(row);                                                                \
    for (int64_t j = 0; j < d; j++) y[j] += h * LOAD(a[j]);                                                       \
  }

#define LOAD_F32(w) (w)
DEFINE_STEPS(f32, float, LOAD_F32)
DEFINE_STEPS(f16, uint16_t, from_f16)
DEFINE_STEPS(bf16, uint16_t, from_bf16)

struct Steps {
  int64_t element;
  void (*dot4)(const uint8_t *const *, const uint8_t *const *, const float *, int64_t, float *);
  void (*add4)(const uint8_t *const *, const uint8_t *const *, const float *, int64_t, float *);
  void (*add1)(const uint8_t *, float, int64_t, float *);
};
const Steps STEPS[] = {{4, dot4_f32, add4_f32, add1_f32}, {2, dot4_f16, add4_f16, add1_f16},
                       {2, dot4_bf16, add4_bf16, add1_bf16}};

// Up to BLOCK places in memory, the last repeated so that whole steps can be taken.
struct Places {
  const uint8_t *at[BLOCK + QUAD];
  int n = 0;

  void add(const uint8_t *place) { at[n++] = place; }
  void fill() {
    for (int k = n; n && k < n + QUAD; k++) at[k] = at[n - 1];
  }
};

// z[k] = row k . x; while the last rows are read, those at `then` are prefetched.
void dots(const Steps &s, const Places &rows, const Places &then, const float *x, int64_t d, float *z) {
  for (int k = 0; k < rows.n; k += QUAD) {
    const bool more = k + QUAD < rows.n;
    s.dot4(rows.at + k, more ? rows.at + k + QUAD : then.n ? then.at : nullptr, x, d, z + k);
  }
}

// y += sum of h[k] * row k.
void adds(const Steps &s, const Places &rows, const Places &then, const float *h, int64_t d, float *y) {
  int k = 0;
  for (; k + QUAD <= rows.n; k += QUAD) {
    const bool more = k + QUAD < rows.n;
    s.add4(rows.at + k, more ? rows.at + k + QUAD : then.n ? then.at : nullptr, h + k, d, y);
  }
  for (; k < rows.n; k++) s.add1(rows.at[k], h[k], d, y);
}

// Neurons begin .. begin + n (n <= BLOCK) of one token; `fires` is set for those that fire. A silent neuron costs its first
// row only: neither its up row (where there is a gate) nor its down row is touched.
void one_token(const Ffn *f, const Steps &s, int64_t begin, int n, const Places &first, const Places &then, int64_t t,
               float *y, bool *fires) {
  const float *x = f->x + t * f->d, *bias = f->gated ? f->gate_bias : f->up_bias;
  const int64_t row = f->d * s.element;
  float z[BLOCK + QUAD], h[BLOCK], u[BLOCK + QUAD];
  int who[BLOCK];
  Places up, down;
  const Places none{};
  dots(s, first, none, x, f->d, z);
  for (int k = 0; k < n; k++) {
    const float v = round_to(bias ? z[k] + bias[begin + k] : z[k], f->round_dtype);
    const float a = round_to(activate(v, f->act, f->threshold), f->round_dtype);
    if (a == 0) continue;
    who[up.n] = k, h[up.n] = a;
    up.add(first.at[k] + row);
    down.add(first.at[k] + (f->gated ? 2 : 1) * row);
    fires[k] = true;
  }
  up.fill(), down.fill();
  if (f->gated) {
    dots(s, up, down, x, f->d, u);
    for (int k = 0; k < up.n; k++) {
      const float v = f->up_bias ? u[k] + f->up_bias[begin + who[k]] : u[k];
      h[k] = round_to(h[k] * round_to(v, f->round_dtype), f->round_dtype);
    }
  }
  adds(s, down, then, h, f->d_out, y);
}

void ffn_range(const Ffn *f, const Steps &s, int64_t begin, int64_t end, float *acc, int64_t *fired) {
  auto places = [&](int64_t from) {
    Places p;
    for (int64_t i = from; i < end && i < from + BLOCK; i++) p.add(f->rows + f->slots[i] * f->stride);
    p.fill();
    return p;
  };
  Places here = places(begin);
  for (int64_t i = begin; i < end; i += BLOCK) {
    const Places next = places(i + BLOCK), none{};
    bool fires[BLOCK] = {};
    for (int64_t t = 0; t < f->T; t++) {
      one_token(f, s, i, here.n, here, t + 1 < f->T ? none : next, t, acc + t * f->d_out, fires);
    }
    for (bool fire : fires) *fired += fire;
    here = next;
  }
}

}  // namespace

extern "C" {

int hf_flash_abi() { return 2; }

// out [T, d_out] float32 += the FFN of x over n slots; returns how many of them fired for any token.
int64_t hf_flash_sparse_ffn(const float *x, int64_t T, int64_t d, int64_t d_out, const uint8_t *rows, int64_t stride,
                            const int64_t *slots, int64_t n, const float *gate_bias, const float *up_bias, int gated,
                            int dtype, int round_dtype, int act, float threshold, float *out) {
  Ffn f{x, T, d, d_out, rows, stride, slots, gate_bias, up_bias, gated, act, round_dtype, threshold, n};
  const Steps &steps = STEPS[dtype];
  return sum_parts(n, T * d_out, out, [&](int64_t begin, int64_t end, float *acc, int64_t *fired) {
    ffn_range(&f, steps, begin, end, acc, fired);
  });
}

}  // extern "C"
