// The loops of ffn.cpp for one instruction set: included there once for each, in a namespace of its own. With PAIRS for
// bfloat16 alone: inputs and hidden values are bfloat16 too, and two products at a time are added to a float32.

#ifdef PAIRS
using Input = uint16_t;
#else
using Input = float;
#if LEVEL == 4
typedef float Vec __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
INLINE void widen_f16(const uint8_t *at, Vec *out) {
  __m512i both = _mm512_loadu_si512(at);
  asm("" : "+v"(both));  // one load of a line, not two of its halves: a line that is missing is waited for once
  out[0] = (Vec)_mm512_cvtph_ps(_mm512_castsi512_si256(both));
  out[1] = (Vec)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(both, 1));
}
#elif LEVEL == 3
typedef float Vec __attribute__((vector_size(32)));
typedef uint32_t Bits __attribute__((vector_size(32)));
INLINE void widen_f16(const uint8_t *at, Vec *out) {
  for (int half = 0; half < 2; half++)
    out[half] = (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(at) + half));
}
#else
typedef float Vec __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
INLINE void widen_f16(const uint8_t *at, Vec *out) {
#if defined(__aarch64__)
  const float16x8_t both = vreinterpretq_f16_u16(vld1q_u16(reinterpret_cast<const uint16_t *>(at)));
  out[0] = (Vec)vcvt_f32_f16(vget_low_f16(both)), out[1] = (Vec)vcvt_high_f32_f16(both);
#else
  for (int k = 0; k < 8; k++) out[k / 4][k % 4] = one<F16>(at, k);
#endif
}
#endif

constexpr int W = sizeof(Vec) / sizeof(float);

constexpr int PAIRS = BLOCK / (2 * W);
template <int TYPE> constexpr int64_t PAIR_BYTES = 2 * W * SIZE<TYPE>;

template <class V> INLINE V load(const void *from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// As many numbers as two vectors hold. Those of bfloat16 are the even ones, then the odd ones: see `mix`.
template <int TYPE> INLINE void widen(const uint8_t *at, Vec *out) {
  if (TYPE == F16) return widen_f16(at, out);
  if (TYPE == F32) {
    out[0] = load<Vec>(at), out[1] = load<Vec>(at + sizeof(Vec));
  } else {
    const Bits both = load<Bits>(at);
    out[0] = (Vec)(both << 16), out[1] = (Vec)(both & 0xffff0000u);
  }
}

// Where in a block of x, or of the sums, the two vectors of pair p belong.
template <int TYPE> constexpr int64_t place(int p, int half) {
  return TYPE == BF16 ? half * BLOCK / 2 + p * W : (2 * p + half) * W;
}

INLINE float sum(Vec v) {
  float total = 0;
  for (int k = 0; k < W; k++) total += v[k];
  return total;
}
#endif

// Calls block(j, at) for every whole block of d numbers of four rows: number j lies at byte `at`. What comes AHEAD bytes
// later in the same rows is fetched meanwhile and, instead of what lies behind those numbers, the beginning of `next`.
template <int TYPE, class F>
INLINE int64_t walk(const uint8_t *const *rows, const uint8_t *const *next, int64_t d, F block) {
  constexpr int64_t S = SIZE<TYPE>;
  const int64_t end = d / BLOCK * BLOCK, ahead = AHEAD / S < end ? AHEAD / S : end, turn = next ? end - ahead : end;
  int64_t j = 0;
  for (; j < turn; j += BLOCK) {
    for (int r = 0; TYPE != F32 && r < 4; r++) __builtin_prefetch(rows[r] + S * (j + ahead));
    block(j, S * j);
  }
  for (; j < end; j += BLOCK) {
    for (int r = 0; TYPE != F32 && r < 4; r++) __builtin_prefetch(next[r] + S * (j + ahead - end));
    block(j, S * j);
  }
  return end;
}

// dot4: z[r] = rows[r] . x for four rows. add4: y += the sum of h[r] * rows[r] for four rows.
#ifdef PAIRS
INLINE __m512bh whole(const void *at) { return (__m512bh)_mm512_loadu_si512(at); }

template <int TYPE>
INLINE void dot4(const uint8_t *const *rows, const uint8_t *const *next, const Input *x, int64_t d, float *z) {
  __m512 sums[4] = {};
  const int64_t rest = walk<TYPE>(rows, next, d, [&](int64_t j, int64_t at) {
    for (int r = 0; r < 4; r++) sums[r] = _mm512_dpbf16_ps(sums[r], whole(rows[r] + at), whole(x + j));
  });
  for (int r = 0; r < 4; r++) {
    z[r] = _mm512_reduce_add_ps(sums[r]);
    for (int64_t j = rest; j < d; j++) z[r] += one<TYPE>(rows[r], j) * from_bf16(x[j]);
  }
}

// y is where `paired` says.
template <int TYPE>
INLINE void add4(const uint8_t *const *rows, const uint8_t *const *next, const float *h, int64_t d, float *y) {
  __m512i pair[2];
  for (int p = 0; p < 2; p++)
    pair[p] = _mm512_set1_epi32(static_cast<int>(bits_bf16(h[2 * p]) | static_cast<uint32_t>(bits_bf16(h[2 * p + 1])) << 16));
  const int64_t rest = walk<TYPE>(rows, next, d, [&](int64_t j, int64_t at) {
    __m512 y0 = _mm512_loadu_ps(y + j), y1 = _mm512_loadu_ps(y + j + 16);
    for (int p = 0; p < 2; p++) {
      const __m512i a = _mm512_loadu_si512(rows[2 * p] + at), b = _mm512_loadu_si512(rows[2 * p + 1] + at);
      y0 = _mm512_dpbf16_ps(y0, (__m512bh)_mm512_unpacklo_epi16(a, b), (__m512bh)pair[p]);
      y1 = _mm512_dpbf16_ps(y1, (__m512bh)_mm512_unpackhi_epi16(a, b), (__m512bh)pair[p]);
    }
    _mm512_storeu_ps(y + j, y0);
    _mm512_storeu_ps(y + j + 16, y1);
  });
  for (int64_t j = rest; j < d; j++)
    for (int r = 0; r < 4; r++) y[j] += h[r] * one<TYPE>(rows[r], j);
}
#else
template <int TYPE>
INLINE void dot4(const uint8_t *const *rows, const uint8_t *const *next, const float *x, int64_t d, float *z) {
  Vec sums[4][2] = {};
  const int64_t rest = walk<TYPE>(rows, next, d, [&](int64_t j, int64_t at) {
    for (int p = 0; p < PAIRS; p++) {
      const Vec x0 = load<Vec>(x + j + place<TYPE>(p, 0)), x1 = load<Vec>(x + j + place<TYPE>(p, 1));
      for (int r = 0; r < 4; r++) {
        Vec w[2];
        widen<TYPE>(rows[r] + at + p * PAIR_BYTES<TYPE>, w);
        sums[r][0] += w[0] * x0, sums[r][1] += w[1] * x1;
      }
    }
  });
  for (int r = 0; r < 4; r++) {
    z[r] = sum(sums[r][0] + sums[r][1]);
    for (int64_t j = rest; j < d; j++) z[r] += one<TYPE>(rows[r], j) * x[j];
  }
}

template <int TYPE>
INLINE void add4(const uint8_t *const *rows, const uint8_t *const *next, const float *h, int64_t d, float *y) {
  const int64_t rest = walk<TYPE>(rows, next, d, [&](int64_t j, int64_t at) {
    for (int p = 0; p < PAIRS; p++) {
      float *to[2] = {y + j + place<TYPE>(p, 0), y + j + place<TYPE>(p, 1)};
      Vec y0 = load<Vec>(to[0]), y1 = load<Vec>(to[1]);
      for (int r = 0; r < 4; r++) {
        Vec w[2];
        widen<TYPE>(rows[r] + at + p * PAIR_BYTES<TYPE>, w);
        y0 += h[r] * w[0], y1 += h[r] * w[1];
      }
      std::memcpy(to[0], &y0, sizeof y0);
      std::memcpy(to[1], &y1, sizeof y1);
    }
  });
  for (int64_t j = rest; j < d; j++)
    for (int r = 0; r < 4; r++) y[j] += h[r] * one<TYPE>(rows[r], j);
}
#endif

// Four rows at a time: which of them fire is known before the rest of those that do is touched.
template <int TYPE> void ffn(const Ffn *f, const Input *all, int64_t begin, int64_t end, float *acc, int64_t *fired) {
  const int64_t d = f->d, part = d * SIZE<TYPE>;
  const float *bias = f->gated ? f->gate_bias : f->up_bias;
  bool rest = true;  // whether the rest of four rows is likely to be used: that of the last four was
  for (int64_t i = begin; i < end; i += 4) {
    const int64_t n = end - i < 4 ? end - i : 4;
    const uint8_t *rows[4], *firing[4], *next[4];
    for (int64_t r = 0; r < 4; r++) {
      rows[r] = f->rows + f->slots[i + (r < n ? r : n - 1)] * f->stride;
      next[r] = f->rows + f->slots[i + 4 + r < end ? i + 4 + r : i] * f->stride;
    }
    uint32_t any = 0;
    for (int64_t t = 0; t < f->T; t++) {
      const Input *x = all + t * d;
      float z[4], h[4] = {}, up_bias[4] = {};
      int64_t n_firing = 0;
      dot4<TYPE>(rows, rest ? nullptr : next, x, d, z);
      for (int64_t r = 0; r < n; r++) {
        const float v = round_to(bias ? z[r] + bias[i + r] : z[r], f->round_dtype);
        const float a = round_to(activate(v, f->act, f->threshold), f->round_dtype);
        if (a == 0) continue;
        any |= 1u << r;
        up_bias[n_firing] = f->gated && f->up_bias ? f->up_bias[i + r] : 0;
        firing[n_firing] = rows[r] + part;
        h[n_firing++] = a;
      }
      if (n_firing == 0) continue;
      for (int64_t r = n_firing; r < 4; r++) firing[r] = firing[n_firing - 1];  // once more, times 0
      if (f->gated) {
        dot4<TYPE>(firing, nullptr, x, d, z);
        for (int64_t r = 0; r < n_firing; r++)
          h[r] = round_to(h[r] * round_to(z[r] + up_bias[r], f->round_dtype), f->round_dtype);
        for (int64_t r = 0; r < 4; r++) firing[r] += part;
      }
      add4<TYPE>(firing, next, h, f->d_out, acc + t * f->d_out);
    }
    rest = any;
    *fired += __builtin_popcount(any);
  }
}
