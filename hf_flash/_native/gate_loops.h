// The loop of gate.cpp for one instruction set: included there once for each, in a namespace of its own.

#if LEVEL == 4
typedef float Vec __attribute__((vector_size(64)));
template <int BITS> INLINE void decode(const Sketch *s, int64_t at, Vec *out) {  // group `at`: 64 signed codes as floats
  const __m512i c = _mm512_sub_epi8(codes<BITS>(s, at), _mm512_set1_epi8(static_cast<char>(1 << (BITS - 1))));
  out[0] = (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_castsi512_si128(c)));
  out[1] = (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(c, 1)));
  out[2] = (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(c, 2)));
  out[3] = (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(c, 3)));
}
#elif LEVEL == 3
typedef float Vec __attribute__((vector_size(32)));
template <int BITS> INLINE void decode(const Sketch *s, int64_t at, Vec *out) {
  const __m256i n = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(s->nibbles + at * 32));
  const __m256i spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201ULL));
  for (int half = 0; half < 2; half++) {
    __m256i c = _mm256_and_si256(half ? _mm256_srli_epi16(n, 4) : n, _mm256_set1_epi8(15));
    c = _mm256_slli_epi16(c, BITS - 4);
    for (int k = 0; k < BITS - 4; k++) {
      const __m256i all = _mm256_set1_epi32(static_cast<int>(word(s->planes[k], at) >> (32 * half)));
      const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(all, spread), bit), bit);
      c = _mm256_add_epi8(c, _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(1 << (BITS - 5 - k)))));
    }
    c = _mm256_sub_epi8(c, _mm256_set1_epi8(static_cast<char>(1 << (BITS - 1))));
    const __m128i low = _mm256_castsi256_si128(c), high = _mm256_extracti128_si256(c, 1);
    out[4 * half] = (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low));
    out[4 * half + 1] = (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(low, 8)));
    out[4 * half + 2] = (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high));
    out[4 * half + 3] = (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(high, 8)));
  }
}
#else
typedef float Vec __attribute__((vector_size(16)));
template <int BITS> INLINE void decode(const Sketch *s, int64_t at, Vec *out) {
  const uint8_t *n = s->nibbles + at * 32;
  int8_t c[GROUP];
  for (int j = 0; j < 32; j++) {
    c[j] = static_cast<int8_t>(((n[j] & 15) << (BITS - 4)) - (1 << (BITS - 1)));
    c[j + 32] = static_cast<int8_t>(((n[j] >> 4) << (BITS - 4)) - (1 << (BITS - 1)));
  }
  for (int k = 0; k < BITS - 4; k++) {
    const uint64_t bits = word(s->planes[k], at);
    for (int j = 0; j < GROUP; j++) c[j] = static_cast<int8_t>(c[j] + (static_cast<int>((bits >> j) & 1) << (BITS - 5 - k)));
  }
  float *to = reinterpret_cast<float *>(out);
  for (int j = 0; j < GROUP; j++) to[j] = c[j];
}
#endif

constexpr int W = sizeof(Vec) / sizeof(float), N_VEC = GROUP / W;

INLINE Vec load(const float *from) {
  Vec v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

INLINE Vec product(const Vec *q, const float *x) {
  Vec part = q[0] * load(x), other = q[1] * load(x + W);
  for (int v = 2; v < N_VEC; v += 2) part += q[v] * load(x + v * W), other += q[v + 1] * load(x + (v + 1) * W);
  return part + other;
}

template <int BITS> INLINE Vec group(const Sketch *s, int64_t at, const float *x) {
  Vec q[N_VEC];
  decode<BITS>(s, at, q);
  return product(q, x);
}

// sums[t] += what group g of neuron i gives token t; T tokens, 0 for as many as there are.
template <int BITS, int T> INLINE void add_group(const Sketch *s, const Inputs *in, int64_t i, int64_t g, float step, Vec *sums) {
  Vec q[N_VEC];
  decode<BITS>(s, i * s->groups + g, q);
  for (int64_t t = 0; t < (T ? T : in->T); t++) sums[t] += step * product(q, in->x + (t * s->groups + g) * GROUP);
}

// wanted[i] <- a mark where a token wants neuron i. What has one already is passed over.
template <int BITS> void scan(const Sketch *s, const Inputs *in, int64_t begin, int64_t end, uint8_t *wanted) {
  const int64_t groups = s->groups, ahead = 32;  // groups fetched ahead
  std::vector<float> step(static_cast<size_t>(groups));
  for (int64_t k = begin; k < end; k++) {
    const int64_t i = neuron(in, k);
    if (wanted[i]) continue;
    const uint16_t *stored = s->step + i * groups;
    for (int64_t g = 0; g < groups; g++) step[static_cast<size_t>(g)] = from_bf16(stored[g]);
    Vec sums[MAX_TOKENS] = {};
    if (in->T == 1) {  // its sums stay in registers
      Vec sum{};
      for (int64_t g = 0; g < groups; g++) {
        const int64_t at = i * groups + g;
        fetch(s->nibbles + (at + ahead) * 32);
        sum += step[static_cast<size_t>(g)] * group<BITS>(s, at, in->x + g * GROUP);
      }
      sums[0] = sum;
    } else if (in->T == MAX_TOKENS) {  // theirs too
      for (int64_t g = 0; g < groups; g++) add_group<BITS, MAX_TOKENS>(s, in, i, g, step[static_cast<size_t>(g)], sums);
    } else {
      for (int64_t g = 0; g < groups; g++) add_group<BITS, 0>(s, in, i, g, step[static_cast<size_t>(g)], sums);
    }
    uint8_t any = 0, last = 0;
    for (int64_t t = 0; t < in->T; t++) {
      float score = 0, squares = 0, sure = 0;
      for (int w = 0; w < W; w++) score += sums[t][w];
      for (int64_t g = 0; g < groups; g++) {
        const float sg = step[static_cast<size_t>(g)];
        score += sg * in->constant[t * groups + g];
        squares += sg * sg * in->squares[t * groups + g];
        sure += sg * in->norms[t * groups + g];
      }
      const float v = most(s, in, BITS, in->tail, i, t, score / (1 << (BITS - 4)), squares, sure);
      if (in->near) in->near[i] = v;
      last = reaches(in, v);
      any |= last;
    }
    wanted[i] = last ? in->last_mark : any ? in->mark : 0;
  }
}
