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

constexpr int W = sizeof(Vec) / sizeof(float), STRIP = 4 * W;  // numbers of a step: four sums hide the latency of one

INLINE Vec load(const float *from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <int TYPE> INLINE void fetch_ahead(const uint8_t *next) {  // a strip of the next row, while this one is used
  for (int p = 0; p < STRIP * SIZE<TYPE>; p += 64) __builtin_prefetch(next + p);
}

template <int TYPE> INLINE float dot(const uint8_t *row, const uint8_t *next, const float *x, int64_t d) {
  constexpr int B = W * SIZE<TYPE>;
  Vec a{}, b{}, c{}, e{};
  int64_t j = 0;
  for (; j + STRIP <= d; j += STRIP, row += 4 * B, next += 4 * B) {
    fetch_ahead<TYPE>(next);
    a += widen<TYPE>(row) * load(x + j);
    b += widen<TYPE>(row + B) * load(x + j + W);
    c += widen<TYPE>(row + 2 * B) * load(x + j + 2 * W);
    e += widen<TYPE>(row + 3 * B) * load(x + j + 3 * W);
  }
  const Vec all = (a + b) + (c + e);
  float total = 0;
  for (int k = 0; k < W; k++) total += all[k];
  for (int k = 0; j < d; j++, k++) total += one<TYPE>(row, k) * x[j];
  return total;
}

template <int TYPE> INLINE void add(const uint8_t *row, const uint8_t *next, float h, float *y, int64_t d) {
  constexpr int B = W * SIZE<TYPE>;
  int64_t j = 0;
  for (; j + STRIP <= d; j += STRIP, row += 4 * B, next += 4 * B) {
    fetch_ahead<TYPE>(next);
    for (int k = 0; k < 4; k++) {
      const Vec out = load(y + j + k * W) + h * widen<TYPE>(row + k * B);
      std::memcpy(y + j + k * W, &out, sizeof out);
    }
  }
  for (int k = 0; j < d; j++, k++) y[j] += h * one<TYPE>(row, k);
}

template <int TYPE> void ffn(const Ffn *f, int64_t begin, int64_t end, float *acc, int64_t *fired) {
  const int64_t d = f->d, part = d * SIZE<TYPE>, up = f->gated ? part : 0, down = up + part;
  for (int64_t i = begin; i < end; i++) {
    const uint8_t *row = f->rows + f->slots[i] * f->stride, *next = f->rows + f->slots[i + 1 < end ? i + 1 : i] * f->stride;
    bool any = false;
    for (int64_t t = 0; t < f->T; t++) {
      const float *x = f->x + t * d;
      float z = dot<TYPE>(row, next, x, d);
      const float *bias = f->gated ? f->gate_bias : f->up_bias;
      z = round_to(bias ? z + bias[i] : z, f->round_dtype);
      float h = round_to(activate(z, f->act, f->threshold), f->round_dtype);
      if (h == 0) continue;  // silent: neither up nor down is touched
      if (f->gated) {
        const float u = dot<TYPE>(row + up, next + up, x, d);
        h = round_to(h * round_to(f->up_bias ? u + f->up_bias[i] : u, f->round_dtype), f->round_dtype);
      }
      any = true;
      add<TYPE>(row + down, next + down, h, acc + t * f->d_out, f->d_out);
    }
    *fired += any;
  }
}
