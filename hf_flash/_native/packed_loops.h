// The loops of packed.cpp for one instruction set: included there once for each, in a namespace of its own.
//
// A block of 64 weights is decoded in 16-byte lanes. A table look-up gives both bytes of each bfloat16 but for sign and
// mantissa; interleaved, they are 8 bfloat16 in a register, of which the even ones shifted up and the odd ones masked
// are float32. So floats come out in the order of `shuffled`, and inputs and sums are kept in that order.

#if LEVEL == 4
typedef float Vec __attribute__((vector_size(64)));
INLINE void decode(const uint8_t *low, const uint8_t *code, const Tables &t, Vec *out) {
  __m512i first, second;
  decode_lanes(low, code, t, &first, &second);
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  out[0] = (Vec)_mm512_slli_epi32(first, 16), out[1] = (Vec)_mm512_and_si512(first, odd);
  out[2] = (Vec)_mm512_slli_epi32(second, 16), out[3] = (Vec)_mm512_and_si512(second, odd);
}
#elif LEVEL == 3
typedef float Vec __attribute__((vector_size(32)));
INLINE void decode(const uint8_t *low, const uint8_t *code, const Tables &t, Vec *out) {
  const __m256i n = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(code)), nibble = _mm256_set1_epi8(15);
  const __m256i high_of = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)t.high));
  const __m256i low_of = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)t.low));
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int half = 0; half < 2; half++) {
    const __m256i l = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(low + 32 * half));
    const __m256i c = _mm256_and_si256(half ? _mm256_srli_epi16(n, 4) : n, nibble);
    const __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(high_of, c), _mm256_and_si256(l, _mm256_set1_epi8(-128)));
    const __m256i down = _mm256_or_si256(_mm256_shuffle_epi8(low_of, c), _mm256_and_si256(l, _mm256_set1_epi8(127)));
    const __m256i first = _mm256_unpacklo_epi8(down, high), second = _mm256_unpackhi_epi8(down, high);
    out[half] = (Vec)_mm256_slli_epi32(first, 16), out[2 + half] = (Vec)_mm256_and_si256(first, odd);
    out[4 + half] = (Vec)_mm256_slli_epi32(second, 16), out[6 + half] = (Vec)_mm256_and_si256(second, odd);
  }
}
#elif LEVEL == 1 && defined(__aarch64__)
typedef float Vec __attribute__((vector_size(16)));
INLINE void decode(const uint8_t *low, const uint8_t *code, const Tables &t, Vec *out) {
  const uint8x16_t high_of = vld1q_u8(t.high), low_of = vld1q_u8(t.low);
  const uint32x4_t odd = vdupq_n_u32(0xffff0000u);
  for (int lane = 0; lane < 4; lane++) {
    const uint8x16_t l = vld1q_u8(low + 16 * lane), n = vld1q_u8(code + 16 * (lane % 2));
    const uint8x16_t c = lane < 2 ? vandq_u8(n, vdupq_n_u8(15)) : vshrq_n_u8(n, 4);
    const uint8x16_t high = vorrq_u8(vqtbl1q_u8(high_of, c), vandq_u8(l, vdupq_n_u8(0x80)));
    const uint8x16_t down = vorrq_u8(vqtbl1q_u8(low_of, c), vandq_u8(l, vdupq_n_u8(0x7f)));
    const uint32x4_t first = vreinterpretq_u32_u8(vzip1q_u8(down, high));
    const uint32x4_t second = vreinterpretq_u32_u8(vzip2q_u8(down, high));
    out[lane] = (Vec)vshlq_n_u32(first, 16), out[4 + lane] = (Vec)vandq_u32(first, odd);
    out[8 + lane] = (Vec)vshlq_n_u32(second, 16), out[12 + lane] = (Vec)vandq_u32(second, odd);
  }
}
#else
typedef float Vec __attribute__((vector_size(16)));
INLINE void decode(const uint8_t *low, const uint8_t *code, const Tables &t, Vec *out) {
  float *to = reinterpret_cast<float *>(out);
  for (int j = 0; j < BLOCK; j++) {
    const int c = j < 32 ? code[j] & 15 : code[j - 32] >> 4;
    to[shuffled(j)] = from_bf16(static_cast<uint16_t>((t.high[c] | (low[j] & 0x80)) << 8 | t.low[c] | (low[j] & 0x7f)));
  }
}
#endif

constexpr int N_VEC = BLOCK / (sizeof(Vec) / sizeof(float));

INLINE Vec load(const float *from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Block j of a row, to the L1: rows lie anywhere, and it is there 20 % sooner than by way of the L2.
INLINE void fetch_block(const Packed *p, const uint8_t *row, int64_t j) {
  __builtin_prefetch(row + j);
  if (j % (2 * BLOCK) == 0) __builtin_prefetch(row + p->E + j / 2);
}

// w . x of weights begin .. end of a row (multiples of 64), escapes apart; x is shuffled.
// What is at `next` in the same place is fetched meanwhile.
INLINE float dot(const Packed *p, const uint8_t *row, int64_t begin, int64_t end, const float *x, const uint8_t *next) {
  Vec sums[4] = {};
  for (int64_t j = begin; j < end; j += BLOCK, x += BLOCK) {
    Vec w[N_VEC];
    fetch_block(p, next, j);
    decode(row + j, row + p->E + j / 2, p->tables, w);
    for (int v = 0; v < N_VEC; v++) sums[v % 4] += w[v] * load(x + v * (BLOCK / N_VEC));
  }
  const Vec all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float total = 0;
  for (int k = 0; k < BLOCK / N_VEC; k++) total += all[k];
  return total;
}

// y += h * w, y shuffled.
INLINE void add(const Packed *p, const uint8_t *row, int64_t begin, int64_t end, float h, float *y, const uint8_t *next) {
  for (int64_t j = begin; j < end; j += BLOCK, y += BLOCK) {
    Vec w[N_VEC];
    fetch_block(p, next, j);
    decode(row + j, row + p->E + j / 2, p->tables, w);
    for (int v = 0; v < N_VEC; v++) {
      const Vec out = load(y + v * (BLOCK / N_VEC)) + h * w[v];
      std::memcpy(y + v * (BLOCK / N_VEC), &out, sizeof out);
    }
  }
}

INLINE float escaped(const Packed *p, int64_t row, int64_t begin, int64_t end, const float *x) {
  float total = 0;
  for (int32_t k = p->start[row]; k < p->start[row + 1]; k++) {
    const int64_t at = p->escapes[k] >> 16;
    if (at >= begin && at < end) total += from_bf16(static_cast<uint16_t>(p->escapes[k])) * x[shuffled(at - begin)];
  }
  return total;
}

// out[i] = row i . x, rows that follow each other, side by side: as many streams of memory.
template <int ROWS>
INLINE void dots(const Packed *p, const uint8_t *rows, int64_t stride, const float *x, const uint8_t *next, float *out) {
  Vec sums[ROWS][2] = {};
  for (int64_t j = 0; j < p->E; j += BLOCK, x += BLOCK) {
    for (int i = 0; i < ROWS; i++) {
      const uint8_t *row = rows + i * stride;
      Vec w[N_VEC];
      fetch(next + i * stride + j);
      if (j % (2 * BLOCK) == 0) fetch(next + i * stride + p->E + j / 2);
      decode(row + j, row + p->E + j / 2, p->tables, w);
      for (int v = 0; v < N_VEC; v++) sums[i][v % 2] += w[v] * load(x + v * (BLOCK / N_VEC));
    }
  }
  for (int i = 0; i < ROWS; i++) {
    const Vec all = sums[i][0] + sums[i][1];
    out[i] = 0;
    for (int k = 0; k < BLOCK / N_VEC; k++) out[i] += all[k];
  }
}

// out[t, i] = row i . x[t] for rows begin .. end; x is shuffled.
void matvec(const Packed *p, const uint8_t *rows, int64_t stride, int64_t begin, int64_t end, const float *x, int64_t T,
            int64_t n, float *out) {
  constexpr int64_t ROWS = 4;
  int64_t i = begin;
  for (; T == 1 && i + ROWS <= end; i += ROWS) {
    const uint8_t *row = rows + i * stride;
    dots<ROWS>(p, row, stride, x, row + stride * (i + 2 * ROWS <= end ? ROWS : 0), out + i);
    for (int64_t k = i; k < i + ROWS; k++) out[k] += escaped(p, k, 0, p->E, x);
  }
  for (; i < end; i++) {
    const uint8_t *row = rows + i * stride, *next = row + stride * (i + 1 < end);
    for (int64_t t = 0; t < T; t++)
      out[t * n + i] = dot(p, row, 0, p->E, x + t * p->E, next) + escaped(p, i, 0, p->E, x + t * p->E);
  }
}

// acc (shuffled) += the FFN of x (shuffled) over neurons begin .. end.
void ffn(const Ffn *f, const Packed *p, const int64_t *ids, int64_t begin, int64_t end, float *acc, int64_t *fired) {
  const int64_t d = f->d, up = f->gated ? d : 0, down = up + d;
  for (int64_t i = begin; i < end; i++) {
    const uint8_t *row = f->rows + f->slots[i] * f->stride;
    const uint8_t *next = f->rows + f->slots[i + 1 < end ? i + 1 : i] * f->stride;
    const int64_t id = ids[i];
    const bool special = p->start[id] < p->start[id + 1];
    bool any = false;
    for (int64_t t = 0; t < f->T; t++) {
      const float *x = f->x + t * d;
      float z = dot(p, row, 0, d, x, next);
      if (special) z += escaped(p, id, 0, d, x);
      const float *bias = f->gated ? f->gate_bias : f->up_bias;
      z = round_to(bias ? z + bias[i] : z, f->round_dtype);
      float h = round_to(activate(z, f->act, f->threshold), f->round_dtype);
      if (h == 0) continue;  // silent: neither up nor down is touched
      if (f->gated) {
        float u = dot(p, row, up, down, x, next);
        if (special) u += escaped(p, id, up, down, x);
        h = round_to(h * round_to(f->up_bias ? u + f->up_bias[i] : u, f->round_dtype), f->round_dtype);
      }
      any = true;
      float *y = acc + t * f->d_out;
      add(p, row, down, down + f->d_out, h, y, next);
      for (int32_t k = p->start[id]; k < p->start[id + 1]; k++) {
        const int64_t at = static_cast<int64_t>(p->escapes[k] >> 16) - down;
        if (at >= 0) y[shuffled(at)] += h * from_bf16(static_cast<uint16_t>(p->escapes[k]));
      }
    }
    *fired += any;
  }
}

// Weights from .. to (multiples of 64) of rows begin .. end, which are those of `slots` or lie one after the other, to
// bfloat16; `ids` says whose escapes they have.
void unpack(const Packed *p, const uint8_t *rows, int64_t stride, const int64_t *slots, const int64_t *ids, int64_t begin,
            int64_t end, int64_t from, int64_t upto, uint16_t *out, int64_t out_stride) {
  for (int64_t i = begin; i < end; i++) {
    const int64_t then = i + 1 < end ? i + 1 : i;
    const uint8_t *row = rows + (slots ? slots[i] : i) * stride, *next = rows + (slots ? slots[then] : then) * stride;
    uint16_t *to = out + i * out_stride - from;
    for (int64_t j = from; j < upto; j += BLOCK) {
      const uint8_t *low = row + j, *code = row + p->E + j / 2;
      fetch(next + j);
      fetch(next + p->E + j / 2);
#if LEVEL == 4
      __m512i first, second;
      decode_lanes(low, code, p->tables, &first, &second);
      const __m512i front = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), back = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
      _mm512_storeu_si512(to + j, _mm512_permutex2var_epi64(first, front, second));
      _mm512_storeu_si512(to + j + 32, _mm512_permutex2var_epi64(first, back, second));
#else
      for (int k = 0; k < BLOCK; k++) {
        const uint32_t c = k < 32 ? code[k] & 15 : code[k - 32] >> 4, exponent = c ? c + p->base : 0;
        to[j + k] = static_cast<uint16_t>((low[k] & 0x80u) << 8 | (low[k] & 0x7fu) | exponent << 7);
      }
#endif
    }
    const int64_t id = ids ? ids[i] : i;
    for (int32_t k = p->start[id]; k < p->start[id + 1]; k++) {
      const int64_t at = p->escapes[k] >> 16;
      if (at >= from && at < upto) to[at] = static_cast<uint16_t>(p->escapes[k]);
    }
  }
}
