// Rows in 11.2 bits times a few inputs; tight.cpp includes it twice. With PAIRS inputs are bfloat16 in the order in which
// weights are decoded (laned), and two products at a time are added to a float32; without, float32, shuffled.

#ifdef PAIRS
using Input = uint16_t;
#else
using Input = float;
#endif

// out[t, i .. i + ROWS] = rows times x[t] for T tokens; the rows after them are fetched meanwhile.
template <int ROWS, int T>
INLINE void dots(const Tight &m, int64_t i, int64_t ahead, const Input *x, int64_t n, float *out) {
  TightRow row[ROWS];
  __m512 sums[T][ROWS][2];
  for (int r = 0; r < ROWS; r++) row[r] = tight_row(m, i + r);
  for (int t = 0; t < T; t++)
    for (int r = 0; r < ROWS; r++) sums[t][r][0] = sums[t][r][1] = _mm512_setzero_ps();
#ifndef PAIRS
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
#endif
  for (int64_t j = 0, code = m.E; j < m.E; j += BLOCK, code += CODE_BYTES, x += BLOCK) {
    for (int r = 0; r < ROWS; r++) {
      __m512i a, b;
      fetch(row[r].row + ahead + j);
      fetch(row[r].row + ahead + code);
      decode_lanes(row + r, j, code, &a, &b);
#ifdef PAIRS
      for (int t = 0; t < T; t++) {
        const __m512i *at = reinterpret_cast<const __m512i *>(x + t * m.E);
        sums[t][r][0] = _mm512_dpbf16_ps(sums[t][r][0], (__m512bh)a, (__m512bh)_mm512_load_si512(at));
        sums[t][r][1] = _mm512_dpbf16_ps(sums[t][r][1], (__m512bh)b, (__m512bh)_mm512_load_si512(at + 1));
      }
#else
      const __m512 w[4] = {(__m512)_mm512_slli_epi32(a, 16), (__m512)_mm512_and_si512(a, odd),
                           (__m512)_mm512_slli_epi32(b, 16), (__m512)_mm512_and_si512(b, odd)};
      for (int t = 0; t < T; t++)
        for (int v = 0; v < 4; v++)
          sums[t][r][v % 2] = _mm512_fmadd_ps(w[v], _mm512_load_ps(x + t * m.E + 16 * v), sums[t][r][v % 2]);
#endif
    }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < ROWS; r++) out[t * n + i + r] = _mm512_reduce_add_ps(_mm512_add_ps(sums[t][r][0], sums[t][r][1]));
}

// The same for rows begin .. end and some tokens; returns how many of T it took.
template <int ROWS, int TOKENS>
int64_t take(const Tight &m, int64_t begin, int64_t end, const Input *x, int64_t T, int64_t n, float *out) {
  if (T < TOKENS) return 0;
  int64_t i = begin;
  for (; i + ROWS <= end; i += ROWS)
    dots<ROWS, TOKENS>(m, i, ROWS * m.stride, x, n, out);
  for (; i < end; i++) dots<1, TOKENS>(m, i, 0, x, n, out);
  return TOKENS;
}

// out[t, i] = row i . x[t] for rows begin .. end.
inline void matvec(const Tight &m, int64_t begin, int64_t end, const Input *x, int64_t T, int64_t n, float *out) {
  for (int64_t t = 0; t < T;) {
    const Input *from = x + t * m.E;
    float *to = out + t * n;
    int64_t taken = take<2, 4>(m, begin, end, from, T - t, n, to);
    if (!taken) taken = take<2, 2>(m, begin, end, from, T - t, n, to);
    if (!taken) taken = take<4, 1>(m, begin, end, from, T - t, n, to);
    t += taken;
  }
}
