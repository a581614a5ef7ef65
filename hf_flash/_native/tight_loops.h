// Stripes of a tight matrix times a few inputs; tight.cpp includes it twice. With PAIRS inputs are bfloat16, two products
// at a time are added to a float32, and sums are torch's (ordered.cpp says how); without, inputs are float32.

#ifdef PAIRS
using Input = uint16_t;
#else
using Input = float;
#endif

// What lies as far ahead is fetched, a quarter of a tile at once and to the L1: unlike with rows that lie apart (`fetch`)
// that is fastest where a core reads memory from front to back (docs/log.md).
constexpr int64_t SOON = 4 * TILE_BYTES, LINES = TILE_BYTES / 64;

// Adds two columns of 16 rows, times two entries of x.
INLINE void add(__m512i weights, const Input *x, __m512 *sum) {
#ifdef PAIRS
  *sum = _mm512_dpbf16_ps(*sum, (__m512bh)weights, pair_of(x));
#else
  const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  *sum = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(weights, 16), _mm512_set1_ps(x[0]), *sum);
  *sum = _mm512_fmadd_ps((__m512)_mm512_and_si512(weights, odd), _mm512_set1_ps(x[1]), *sum);
#endif
}

// put(t, i, sums of rows i .. i + 16) for the rows of stripe s and T tokens.
template <int T, class Put> INLINE void stripe_products(const Tight &m, int64_t s, const Input *x, Put put) {
  Stripe stripe = stripe_at(m, s);
  __m512 total[T][N_REGISTERS], chain[T][N_REGISTERS];
  for (int t = 0; t < T; t++)
    for (int r = 0; r < N_REGISTERS; r++) total[t][r] = chain[t][r] = _mm512_setzero_ps();
  for (int64_t j = 0; j < m.E; j += TILE_COLUMNS, stripe.tile += TILE_BYTES) {
    if (j && j % CHAIN == 0)
      for (int t = 0; t < T; t++)
        for (int r = 0; r < N_REGISTERS; r++)
          total[t][r] = _mm512_add_ps(total[t][r], chain[t][r]), chain[t][r] = _mm512_setzero_ps();
    for (int64_t c = 0; c < TILE_COLUMNS; c += 4) {
      const int64_t first_line = c * LINES / TILE_COLUMNS, last_line = (c + 4) * LINES / TILE_COLUMNS;
      for (int64_t line = first_line; line < last_line; line++) __builtin_prefetch(stripe.tile + SOON + line * 64);
      for (int r = 0; r < N_REGISTERS; r++) {
        __m512i first, second;
        decode_block(&stripe, c + r, &first, &second);
        for (int t = 0; t < T; t++) add(first, x + t * m.E + j + c, chain[t] + r);
        for (int t = 0; t < T; t++) add(second, x + t * m.E + j + c + 2, chain[t] + r);
      }
    }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < N_REGISTERS; r++)
      if (s * STRIPE + r * REGISTER < m.n) put(t, s * STRIPE + r * REGISTER, _mm512_add_ps(total[t][r], chain[t][r]));
}

// The same for stripes begin .. end and all of T tokens.
template <class Put> void products(const Tight &m, int64_t begin, int64_t end, const Input *x, int64_t T, Put put) {
  for (int64_t t = 0; t < T;) {
    const auto put_at = [&](int64_t k, int64_t i, __m512 sums) { put(t + k, i, sums); };
    const int64_t taken = T - t >= 4 ? 4 : T - t >= 2 ? 2 : 1;
    for (int64_t s = begin; s < end; s++) {
      if (taken == 4) stripe_products<4>(m, s, x + t * m.E, put_at);
      else if (taken == 2) stripe_products<2>(m, s, x + t * m.E, put_at);
      else stripe_products<1>(m, s, x + t * m.E, put_at);
    }
    t += taken;
  }
}
