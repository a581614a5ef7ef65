// One bfloat16 token times packed rows, to the bit what torch computes from the same matrix. Reference: F.linear.
//
// On a CPU with AVX512-BF16 torch's library sums each output as a chain of pair products (vdpbf16ps: two bfloat16
// products added to a float32) over 512 inputs, and adds the chains. The chains here are the same ones, with 16
// outputs in a register, so nothing is unpacked to memory. Whether torch does sum so is tested where it matters: see
// ordered.py, which compares both on every shape before it relies on this.
#include "calls.h"
#include "ffn.h"
#include "packed.h"
#include "tight.h"

#pragma GCC optimize("no-associative-math")  // the order is the point

namespace {

// Four registers of chains for 64 outputs: register v has outputs 16 lane + 4 v + k.
INLINE int64_t paired(int64_t k) { return k % 16 / 4 * 16 + k / 16 * 4 + k % 4; }

INLINE uint16_t rounded(float v) { return bits_bf16(round_bf16(v)); }

}  // namespace

#ifdef TIGHT
#define ORDERED 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vbmi,avx512vbmi2,avx512bf16")

namespace {

constexpr int ROWS = 16;        // outputs in a register
constexpr int GROUPS = 4;       // registers summed side by side: a chain waits for itself
constexpr int64_t SOON = 256;   // weights of a row that are fetched before they are decoded
constexpr int NEURONS = 8;      // down rows taken together

// Puts the escapes of a row that lie below `end` in their places of `values` (laned), which begin at weight `from`.
INLINE void patch(const Packed &p, int32_t *at, int32_t last, int64_t from, int64_t end, uint16_t *values) {
  for (; *at < last; ++*at) {
    const int64_t position = p.escapes[*at] >> 16;
    if (position >= end) return;
    values[laned(position - from)] = static_cast<uint16_t>(p.escapes[*at]);
  }
}

// The first escape of a row at or after a weight.
INLINE int32_t escape_from(const Packed &p, int64_t row, int64_t weight) {
  int32_t at = p.start[row];
  while (at < p.start[row + 1] && p.escapes[at] >> 16 < weight) at++;
  return at;
}

// Rows of packed weights from weight `first` on, 64 weights at a time, laned.
struct PackedRows {
  const Packed &p;
  const uint8_t *rows;
  int64_t stride, first;
  struct Row {
    const uint8_t *row;
    int32_t escape, last;
  };

  __attribute__((always_inline)) Row row(int64_t i) const {
    return {rows + i * stride, escape_from(p, i, first), p.start[i + 1]};
  }
  __attribute__((always_inline)) void fetch_soon(int64_t i, int64_t j) const {
    const int64_t w = first + j;
    fetch(rows + i * stride + w);
    if (w % 128 == 0) fetch(rows + i * stride + p.E + w / 2);
  }
  __attribute__((always_inline)) void decode(Row *r, int64_t j, uint16_t *values) const {
    const int64_t w = first + j;
    const uint8_t *low = r->row + w, *code = r->row + p.E + w / 2;
    __m512i a, b;
    decode_lanes(low, code, p.tables, &a, &b);
    _mm512_store_si512(values, a), _mm512_store_si512(values + 32, b);
    if (r->escape < r->last) patch(p, &r->escape, r->last, w, w + BLOCK, values);
  }
};

// The next 64 weights of 16 rows: out[pair_at(k)] has pair k of each. `next`, `then`: the row and weight to fetch.
INLINE void pairs_of(const PackedRows &rows, PackedRows::Row *row, int64_t j, int64_t next, int64_t then, __m512i *out) {
  alignas(64) uint16_t some[ROWS * BLOCK];
  for (int r = 0; r < ROWS; r++) {
    rows.fetch_soon(next + r, then);
    rows.decode(row + r, j, some + r * BLOCK);
  }
  for (int half = 0; half < 2; half++) {
    __m512i in[ROWS];
    for (int r = 0; r < ROWS; r++) in[r] = _mm512_load_si512(some + r * BLOCK + half * BLOCK / 2);
    transpose(in, out + half * ROWS);
  }
}

INLINE int pair_at(int k) { return k / 4 % 2 * ROWS + k / 8 * 4 + k % 4; }

// out[i] = K weights of row i, times x, and the bias, for N registers of rows from i on, as far as there are rows.
template <int N>
void some_products(const PackedRows &rows, int64_t i, int64_t end, int64_t K, const uint16_t *x, const uint16_t *bias, uint16_t *out) {
  __m512i pairs[N][BLOCK / 2];
  PackedRows::Row row[ROWS * N];
  __m512 total[N], chain[N];
  for (int r = 0; r < ROWS * N; r++) row[r] = rows.row(i + r < end ? i + r : end - 1);
  for (int g = 0; g < N; g++) total[g] = chain[g] = _mm512_setzero_ps();
  for (int64_t j = 0; j < K; j += BLOCK) {
    if (j && j % CHAIN == 0)
      for (int g = 0; g < N; g++) total[g] = _mm512_add_ps(total[g], chain[g]), chain[g] = _mm512_setzero_ps();
    const bool same = j + SOON < K;
    const int64_t next = same || i + ROWS * N >= end ? i : i + ROWS * N, then = same ? j + SOON : (j + SOON) % K;
    for (int g = 0; g < N; g++) pairs_of(rows, row + g * ROWS, j, next + g * ROWS, then, pairs[g]);
    for (int k = 0; k < BLOCK / 2; k++) {
      const __m512bh both = pair_of(x + j + 2 * k);
      for (int g = 0; g < N; g++) chain[g] = _mm512_dpbf16_ps(chain[g], (__m512bh)pairs[g][pair_at(k)], both);
    }
  }
  for (int g = 0; g < N; g++) {
    const int64_t from = i + g * ROWS;
    if (from >= end) break;
    put_rounded(_mm512_add_ps(total[g], chain[g]), bias ? bias + from : nullptr, end - from, out + from);
  }
}

// The same for rows begin .. end.
void products(const PackedRows &rows, int64_t begin, int64_t end, int64_t K, const uint16_t *x, const uint16_t *bias, uint16_t *out) {
  for (int64_t j = 0; j < SOON && j < K; j += BLOCK)
    for (int64_t i = begin; i < end && i < begin + ROWS * GROUPS; i++) rows.fetch_soon(i, j);
  int64_t i = begin;
  for (; i + ROWS * (GROUPS - 1) < end; i += ROWS * GROUPS) some_products<GROUPS>(rows, i, end, K, x, bias, out);
  for (; i + ROWS < end; i += ROWS * 2) some_products<2>(rows, i, end, K, x, bias, out);
  if (i < end) some_products<1>(rows, i, end, K, x, bias, out);
}

// What thread `me` takes of n rows: whole registers of them.
struct Share {
  int64_t begin, end;
};

Share share_of(int64_t n, int me, int threads) {
  const int64_t registers = (n + ROWS - 1) / ROWS, end = registers * (me + 1) / threads * ROWS;
  return {registers * me / threads * ROWS, end < n ? end : n};
}

// Adds neurons 0 .. n to the chains and totals of outputs begin .. end (multiples of 64; both in the order of `paired`:
// four registers for 64 outputs).
// Neuron 0 is the block's neuron `number`, which is even.
void sums(const Packed &p, const uint8_t *rows, int64_t stride, int64_t number, int64_t n, int64_t first,
          const uint16_t *h, int64_t begin, int64_t end, float *chain, float *total) {
  for (int64_t i = 0; i < n;) {
    const int64_t in_chain = (number + i) % CHAIN;
    if (in_chain == 0 && number + i > 0)
      for (int64_t j = begin; j < end; j++) total[j] += chain[j], chain[j] = 0;
    int64_t k = NEURONS < n - i ? NEURONS : n - i;
    k = k < CHAIN - in_chain ? k : CHAIN - in_chain;
    const uint8_t *row[NEURONS];
    int32_t at[NEURONS], last[NEURONS];
    alignas(4) uint16_t value[NEURONS] = {};
    for (int r = 0; r < NEURONS; r++) {
      const int64_t mine = i + (r < k ? r : k - 1);
      row[r] = rows + mine * stride, at[r] = escape_from(p, mine, first + begin), last[r] = p.start[mine + 1];
      if (r < k) value[r] = h[mine];
    }
    const int64_t ahead = i + NEURONS < n ? NEURONS * stride : 0;
    for (int64_t j = begin; j < end; j += BLOCK) {
      const int64_t w = first + j;
      __m512 c[4];
      for (int v = 0; v < 4; v++) c[v] = _mm512_loadu_ps(chain + j + 16 * v);
      for (int r = 0; r < NEURONS; r += 2) {
        __m512i part[4] = {};
        for (int s = 0; s < 2 && r + s < k; s++) {
          const uint8_t *low = row[r + s] + w, *code = row[r + s] + p.E + w / 2;
          fetch(low + ahead);
          if (w % 128 == 0) fetch(code + ahead);
          decode_lanes(low, code, p.tables, part + 2 * s, part + 2 * s + 1);
          if (at[r + s] < last[r + s] && p.escapes[at[r + s]] >> 16 < w + BLOCK) {
            alignas(64) uint16_t some[BLOCK];
            _mm512_store_si512(some, part[2 * s]), _mm512_store_si512(some + 32, part[2 * s + 1]);
            patch(p, at + r + s, last[r + s], w, w + BLOCK, some);
            part[2 * s] = _mm512_load_si512(some), part[2 * s + 1] = _mm512_load_si512(some + 32);
          }
        }
        const __m512bh both = pair_of(value + r);
        c[0] = _mm512_dpbf16_ps(c[0], (__m512bh)_mm512_unpacklo_epi16(part[0], part[2]), both);
        c[1] = _mm512_dpbf16_ps(c[1], (__m512bh)_mm512_unpackhi_epi16(part[0], part[2]), both);
        c[2] = _mm512_dpbf16_ps(c[2], (__m512bh)_mm512_unpacklo_epi16(part[1], part[3]), both);
        c[3] = _mm512_dpbf16_ps(c[3], (__m512bh)_mm512_unpackhi_epi16(part[1], part[3]), both);
      }
      for (int v = 0; v < 4; v++) _mm512_storeu_ps(chain + j + 16 * v, c[v]);
    }
    i += k;
  }
}

}  // namespace
#pragma GCC pop_options
#endif

extern "C" {

// Whether this CPU has the instruction.
int hf_flash_ordered() {
#ifdef ORDERED
  return can_pairs();
#else
  return 0;
#endif
}

// out [n] bfloat16 = rows times x [E], and the bias where there is one.
void hf_flash_ordered_matvec(const uint8_t *rows, int64_t stride, int64_t n, int64_t E, int base, const int32_t *start,
                             const uint32_t *escapes, const uint16_t *x, const uint16_t *bias, uint16_t *out) {
#ifdef ORDERED
  const Packed p(E, base, start, escapes);
  const int threads = n * E < 65536 * max_threads() ? 1 : max_threads();
  in_parallel(threads, [&](int me) {
    const auto [begin, end] = share_of(n, me, threads);
    products(PackedRows{p, rows, stride, 0}, begin, end, E, x, bias, out);
  });
#endif
}

// Neurons `number` .. `number + n` of an FFN of one token, in bundles that lie one after the other.
// act: what the activation makes of every bfloat16. h [n]: scratch. sums [2, d_out] float32: zeros at neuron 0, then as
// the last call left them. out [d_out] bfloat16, with the bias, where not null: these are the last neurons.
void hf_flash_ordered_ffn(const uint8_t *rows, int64_t stride, int64_t number, int64_t n, int64_t d, int64_t d_out,
                          int gated, int base, const int32_t *start, const uint32_t *escapes, const uint16_t *x,
                          const uint16_t *act, const uint16_t *gate_bias, const uint16_t *up_bias,
                          const uint16_t *down_bias, uint16_t *h, float *state, uint16_t *out) {
#ifdef ORDERED
  const int64_t down = d * (gated ? 2 : 1);
  const Packed p(down + d_out, base, start, escapes);
  const int threads = n * p.E < 65536 * max_threads() ? 1 : max_threads();
  const int64_t blocks = d_out / BLOCK;
  std::vector<uint16_t> up(static_cast<size_t>(gated ? n : 0));
  in_parallel(threads, [&](int me) {
    const auto [begin, end] = share_of(n, me, threads);
    products(PackedRows{p, rows, stride, 0}, begin, end, d, x, gated ? gate_bias : up_bias, h);
    if (gated) products(PackedRows{p, rows, stride, d}, begin, end, d, x, up_bias, up.data());
    for (int64_t i = begin; i < end; i++) {
      h[i] = act[h[i]];
      if (gated) h[i] = rounded(from_bf16(h[i]) * from_bf16(up[static_cast<size_t>(i)]));
    }
  });
  float *chain = state, *total = state + d_out;
  in_parallel(threads, [&](int me) {
    const int64_t begin = blocks * me / threads * BLOCK, end = blocks * (me + 1) / threads * BLOCK;
    sums(p, rows, stride, number, n, down, h, begin, end, chain, total);
    if (!out) return;
    for (int64_t j = begin; j < end; j++) {
      const int64_t at = j / BLOCK * BLOCK + paired(j % BLOCK);
      const float sum = total[at] + chain[at];
      out[j] = rounded(down_bias ? sum + from_bf16(down_bias[j]) : sum);
    }
  });
#endif
}

}  // extern "C"
