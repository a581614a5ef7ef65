// The loops of ffn.cpp for one instruction set: included there once for each, in a namespace of its own.

#if LEVEL == 4
typedef float Vec __attribute__((vector_size(64)));
template <int TYPE> INLINE Vec widen(const uint8_t *at) {  // as many numbers as a vector has floats
  if (TYPE == F32) return (Vec)_mm512_loadu_ps(reinterpret_cast<const float *>(at));
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at));
  return TYPE == F16 ? (Vec)_mm512_cvtph_ps(half) : (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
}
#elif LEVEL == 3
typedef float Vec __attribute__((vector_size(32)));
template <int TYPE> INLINE Vec widen(const uint8_t *at) {
  if (TYPE == F32) return (Vec)_mm256_loadu_ps(reinterpret_cast<const float *>(at));
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(at));
  return TYPE == F16 ? (Vec)_mm256_cvtph_ps(half) : (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
}
#elif defined(__aarch64__)
typedef float Vec __attribute__((vector_size(16)));
template <int TYPE> INLINE Vec widen(const uint8_t *at) {
  if (TYPE == F32) return (Vec)vld1q_f32(reinterpret_cast<const float *>(at));
  const uint16x4_t half = vld1_u16(reinterpret_cast<const uint16_t *>(at));
  return TYPE == F16 ? (Vec)vcvt_f32_f16(vreinterpret_f16_u16(half)) : (Vec)vshll_n_u16(half, 16);
}
#else
typedef float Vec __attribute__((vector_size(16)));
template <int TYPE> INLINE Vec widen(const uint8_t *at) {
  Vec out;
  for (int k = 0; k < 4; k++) out[k] = one<TYPE>(at, k);
  return out;
}
#endif

constexpr int W = sizeof(Vec) / sizeof(float);

INLINE Vec load(const float *from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

INLINE float sum(Vec v) {
  float total = 0;
  for (int k = 0; k < W; k++) total += v[k];
  return total;
}

template <int TYPE> INLINE void fetch_ahead(const uint8_t *next) {  // what four rows on is used where this is now
  if (TYPE != F32)
    for (int p = 0; p < 2 * W * SIZE<TYPE>; p += 64) __builtin_prefetch(next + p);
}

// z[r] = rows[r] . x for four rows.
template <int TYPE>
INLINE void dot4(const uint8_t *const *rows, const uint8_t *const *next, const float *x, int64_t d, float *z) {
  constexpr int B = W * SIZE<TYPE>;
  Vec sums[4][2] = {};
  int64_t j = 0, at = 0;
  for (; j + 2 * W <= d; j += 2 * W, at += 2 * B) {
    const Vec x0 = load(x + j), x1 = load(x + j + W);
    for (int r = 0; r < 4; r++) {
      fetch_ahead<TYPE>(next[r] + at);
      sums[r][0] += widen<TYPE>(rows[r] + at) * x0;
      sums[r][1] += widen<TYPE>(rows[r] + at + B) * x1;
    }
  }
  for (int r = 0; r < 4; r++) {
    z[r] = sum(sums[r][0] + sums[r][1]);
    for (int64_t i = j; i < d; i++) z[r] += one<TYPE>(rows[r], i) * x[i];
  }
}

// y += the sum of h[r] * rows[r] for four rows.
template <int TYPE>
INLINE void add4(const uint8_t *const *rows, const uint8_t *const *next, const float *h, int64_t d, float *y) {
  constexpr int B = W * SIZE<TYPE>;
  int64_t j = 0, at = 0;
  for (; j + 2 * W <= d; j += 2 * W, at += 2 * B) {
    Vec y0 = load(y + j), y1 = load(y + j + W);
    for (int r = 0; r < 4; r++) {
      fetch_ahead<TYPE>(next[r] + at);
      y0 += h[r] * widen<TYPE>(rows[r] + at);
      y1 += h[r] * widen<TYPE>(rows[r] + at + B);
    }
    std::memcpy(y + j, &y0, sizeof y0);
    std::memcpy(y + j + W, &y1, sizeof y1);
  }
  for (; j < d; j++)
    for (int r = 0; r < 4; r++) y[j] += h[r] * one<TYPE>(rows[r], j);
}

// Rows q .. q + 3 of a list, at a byte of each, and what is fetched meanwhile: the four after them, or `then` (four).
INLINE void four(const uint8_t *const *list, int64_t n, int64_t q, int64_t at, const uint8_t *const *then,
                 const uint8_t **rows, const uint8_t **next) {
  for (int64_t r = 0; r < 4; r++) {
    rows[r] = list[q + r < n ? q + r : n - 1] + at;
    next[r] = q + 4 >= n ? then[r] : list[q + 4 + r < n ? q + 4 + r : n - 1] + at;
  }
}

// Some rows at a time: which of them fire is known before the rest of those that do is touched.
template <int TYPE> void ffn(const Ffn *f, int64_t begin, int64_t end, float *acc, int64_t *fired) {
  constexpr int64_t SOME = 4;
  const int64_t d = f->d, part = d * SIZE<TYPE>, down = f->gated ? 2 * part : part;
  const float *bias = f->gated ? f->gate_bias : f->up_bias;
  const uint8_t *list[SOME], *firing[SOME], *rows[4], *next[4], *later[4], *rest[4];
  for (int64_t i = begin; i < end; i += SOME) {
    const int64_t n = end - i < SOME ? end - i : SOME;
    for (int64_t k = 0; k < n; k++) list[k] = f->rows + f->slots[i + k] * f->stride;
    for (int64_t r = 0; r < 4; r++) {  // after these rows' first parts: likely the other parts of the first ones
      rest[r] = list[r < n ? r : 0] + part;
      later[r] = f->rows + f->slots[i + SOME + r < end ? i + SOME + r : i] * f->stride;
    }
    uint32_t any = 0;
    for (int64_t t = 0; t < f->T; t++) {
      const float *x = f->x + t * d;
      float h[SOME + 4] = {}, u[SOME + 4], up_bias[SOME];
      int64_t n_firing = 0;
      for (int64_t q = 0; q < n; q += 4) {
        float z[4];
        four(list, n, q, 0, rest, rows, next);
        dot4<TYPE>(rows, next, x, d, z);
        for (int64_t r = 0; r < 4 && q + r < n; r++) {
          const float v = round_to(bias ? z[r] + bias[i + q + r] : z[r], f->round_dtype);
          const float a = round_to(activate(v, f->act, f->threshold), f->round_dtype);
          if (a == 0) continue;
          any |= 1u << (q + r);
          up_bias[n_firing] = f->gated && f->up_bias ? f->up_bias[i + q + r] : 0;
          firing[n_firing] = list[q + r];
          h[n_firing++] = a;
        }
      }
      for (int64_t q = 0; f->gated && q < n_firing; q += 4) {
        four(firing, n_firing, q, part, rest, rows, next);
        dot4<TYPE>(rows, next, x, d, u + q);
      }
      for (int64_t k = 0; f->gated && k < n_firing; k++)
        h[k] = round_to(h[k] * round_to(u[k] + up_bias[k], f->round_dtype), f->round_dtype);
      for (int64_t q = 0; q < n_firing; q += 4) {
        four(firing, n_firing, q, down, later, rows, next);
        add4<TYPE>(rows, next, h + q, f->d_out, acc + t * f->d_out);
      }
    }
    *fired += __builtin_popcount(any);
  }
}
