// Matrices in some 11.2 bits a weight (tight.h): packed, unpacked and multiplied as they are. Where the CPU lacks the
// instructions, tight.py does not ask.
#include "calls.h"
#include "tight.h"

#pragma GCC optimize("no-associative-math")  // the order of sums is the point, as in ordered.cpp

namespace {

// One less than the first of the N_TIGHT neighbours that leave the fewest of these weights out.
int best_base(const uint16_t *w, int64_t E) {
  int64_t counts[256] = {};
  for (int64_t j = 0; j < E; j++) counts[(w[j] >> 7) & 255]++;
  int64_t inside = 0, most = -1;
  for (int e = 1; e < N_TIGHT; e++) inside += counts[e];
  int best = 0;
  for (int base = 0; base + N_TIGHT < 256; base++) {
    inside += counts[base + N_TIGHT] - (base ? counts[base] : 0);
    if (inside > most) most = inside, best = base;
  }
  return best;
}

int64_t stripes_of(int64_t n) { return (n + STRIPE - 1) / STRIPE; }

// Four columns of 16 rows, `stride` apart, to a block; returns how many escapes it wrote.
int64_t pack_block(const uint16_t *w, int64_t stride, const uint8_t *base, uint8_t *low, uint8_t *code, uint8_t *escapes) {
  uint8_t *const first = escapes;
  for (int64_t p = 0; p < BLOCK; p += 8, code += 3) {
    uint32_t codes = 0;
    for (int64_t k = 0; k < 8; k++) {
      const int64_t row = row_of(p + k);
      const uint16_t v = w[row * stride + column_of(p + k)];
      const uint32_t exponent = (v >> 7) & 255u, c = exponent - base[row];
      const bool fits = c - 1 < static_cast<uint32_t>(N_TIGHT);
      low[p + k] = static_cast<uint8_t>((v & 0x7f) << 1 | v >> 15);
      codes |= (fits ? c : 0u) << (3 * k);
      *escapes = static_cast<uint8_t>(exponent);
      escapes += !fits;
    }
    code[0] = static_cast<uint8_t>(codes), code[1] = static_cast<uint8_t>(codes >> 8);
    code[2] = static_cast<uint8_t>(codes >> 16);
  }
  return escapes - first;
}

}  // namespace

#ifdef TIGHT
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vbmi,avx512vbmi2")
namespace {

#include "tight_loops.h"

// sums [T, n] = stripes begin .. end times x [T, E].
void sums_of(const Tight &m, int64_t begin, int64_t end, const float *x, int64_t T, float *sums) {
  products(m, begin, end, x, T, [&](int64_t t, int64_t i, __m512 sum) {
    _mm512_mask_storeu_ps(sums + t * m.n + i, outputs(m.n - i), sum);
  });
}

// Rows of one stripe, from row `from` of it to `end`, to bfloat16; out has row `from`.
void unpack_stripe(const Tight &m, int64_t s, int64_t from, int64_t end, uint16_t *out, int64_t out_stride) {
  Stripe stripe = stripe_at(m, s);
  for (int64_t j = 0; j < m.E; j += 2 * TILE_COLUMNS) {
    __m512i pairs[N_REGISTERS][REGISTER], rows[REGISTER];  // two columns of 16 rows each
    for (int64_t k = 0; k < REGISTER; k += N_BLOCKS / 2, stripe.tile += TILE_BYTES) {
      for (int64_t line = 0; line < TILE_BYTES; line += 64) fetch(stripe.tile + 2 * TILE_BYTES + line);
      for (int64_t b = 0; b < N_BLOCKS; b++) {
        __m512i *to = pairs[b % N_REGISTERS] + k + b / N_REGISTERS * 2;
        decode_block(&stripe, b, to, to + 1);
      }
    }
    for (int64_t r = 0; r < N_REGISTERS; r++) {
      transpose(pairs[r], rows);
      const int64_t first = r * REGISTER;
      for (int64_t i = from > first ? from : first; i < end && i < first + REGISTER; i++)
        _mm512_storeu_si512(out + (i - from) * out_stride + j, rows[i - first]);
    }
  }
}

// Row i alone: of the others its escapes have to be counted.
void unpack_row(const Tight &m, int64_t i, uint16_t *out) {
  Stripe stripe = stripe_at(m, i / STRIPE);
  for (int64_t j = 0; j < m.E; j += TILE_COLUMNS, stripe.tile += TILE_BYTES) {
    for (int64_t b = 0; b < N_BLOCKS; b++) {
      if (b % N_REGISTERS != i % STRIPE / REGISTER) {
        stripe.escape += __builtin_popcountll(escaped_of(codes_of(stripe.tile, b)));
        continue;
      }
      alignas(64) uint32_t pairs[2][REGISTER];
      __m512i first, second;
      decode_block(&stripe, b, &first, &second);
      _mm512_store_si512(pairs[0], first), _mm512_store_si512(pairs[1], second);
      std::memcpy(out, &pairs[0][i % REGISTER], 4), std::memcpy(out + 2, &pairs[1][i % REGISTER], 4);
      out += 4;
    }
  }
}

}  // namespace
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vbmi,avx512vbmi2,avx512bf16")
namespace {
namespace pairs {
#define PAIRS
#include "tight_loops.h"
#undef PAIRS

// Rows of stripe s times x [T, E], and the bias [n] or null, to out [T, n]: all bfloat16, rounded as torch does.
void linear(const Tight &m, int64_t s, const uint16_t *x, const uint16_t *bias, int64_t T, uint16_t *out) {
  products(m, s, s + 1, x, T, [&](int64_t t, int64_t i, __m512 sum) {
    put_rounded(sum, bias ? bias + i : nullptr, m.n - i, out + t * m.n + i);
  });
}

}  // namespace pairs
}  // namespace
#pragma GCC pop_options

namespace {

void all_pairs(const TightProduct *products, int64_t n, const uint16_t *x, int64_t T, First first) {
  int64_t n_stripes = 0, n_weights = 0;
  for (int64_t k = 0; k < n; k++)
    n_stripes += stripes_of(products[k].matrix->n), n_weights += products[k].matrix->n * products[k].matrix->E;
  in_shares(n_weights < 65536 * max_threads() ? 1 : max_threads(), n_stripes, first, [&](int64_t s) {
    const TightProduct *p = products;
    for (; s >= stripes_of(p->matrix->n); p++) s -= stripes_of(p->matrix->n);
    pairs::linear(*p->matrix, s, x, p->bias, T, p->out);
  });
}

}  // namespace
#endif

void tight_products(const TightProduct *products, int64_t n, const uint16_t *x, First first) {
#ifdef TIGHT
  if (can_pairs()) return all_pairs(products, n, x, 1, first);
#endif
  first();
  for (int64_t k = 0; k < n; k++) {
    const Tight &m = *products[k].matrix;
    hf_flash_tight_linear(m.tiles, m.n, m.E, m.base, m.start, m.escapes, x, products[k].bias, 1, BF16, products[k].out);
  }
}

extern "C" {

// Whether the calls below that compute may be made.
int hf_flash_tight() {
#ifdef TIGHT
  return can_tight();
#else
  return 0;
#endif
}

// Packs n rows of E bfloat16 and chooses their bases; returns how many escapes they have. `escapes` has room for as many
// as there are weights, and one more.
int64_t hf_flash_tight_pack(const uint16_t *from, int64_t from_stride, int64_t n, int64_t E, uint8_t *tiles, uint8_t *base,
                            int32_t *start, uint8_t *escapes) {
  std::vector<uint16_t> filled;  // the last stripe, where rows are missing; weights that are no escapes
  int64_t count = 0;
  for (int64_t s = 0; s < stripes_of(n); s++, base += STRIPE) {
    const int64_t rows = n - s * STRIPE < STRIPE ? n - s * STRIPE : STRIPE;
    const uint16_t *w = from + s * STRIPE * from_stride;
    int64_t stride = from_stride;
    if (rows < STRIPE) {
      filled.assign(static_cast<size_t>(STRIPE * E), 1 << 7);
      for (int64_t r = 0; r < rows; r++) std::memcpy(filled.data() + r * E, w + r * stride, static_cast<size_t>(E) * 2);
      w = filled.data(), stride = E;
    }
    start[s] = static_cast<int32_t>(count);
    for (int64_t r = 0; r < STRIPE; r++) base[r] = static_cast<uint8_t>(best_base(w + r * stride, E));
    for (int64_t j = 0; j < E; j += TILE_COLUMNS, tiles += TILE_BYTES) {
      for (int64_t b = 0; b < N_BLOCKS; b++) {
        const int64_t row = b % N_REGISTERS * REGISTER, column = j + b / N_REGISTERS * 4;
        count += pack_block(w + row * stride + column, stride, base + row, tiles + b * BLOCK,
                            tiles + N_BLOCKS * BLOCK + b * CODE_BYTES, escapes + count);
      }
    }
  }
  start[stripes_of(n)] = static_cast<int32_t>(count);
  return count;
}

// out [k, E] bfloat16 = rows `ids`, or rows first .. first + k.
void hf_flash_tight_unpack(const uint8_t *tiles, int64_t n, int64_t E, const uint8_t *base, const int32_t *start,
                           const uint8_t *escapes, const int64_t *ids, int64_t first, int64_t k, uint16_t *out,
                           int64_t out_stride) {
#ifdef TIGHT
  const Tight m{tiles, n, E, base, start, escapes};
  const int threads = k * E < 65536 * max_threads() ? 1 : max_threads();
  if (ids) {
    in_parallel(threads, [&](int me) {
      for (int64_t i = k * me / threads; i < k * (me + 1) / threads; i++) unpack_row(m, ids[i], out + i * out_stride);
    });
    return;
  }
  const int64_t from = first / STRIPE, n_stripes = stripes_of(first + k) - from;
  in_parallel(threads, [&](int me) {
    for (int64_t s = from + n_stripes * me / threads; s < from + n_stripes * (me + 1) / threads; s++) {
      const int64_t begin = first > s * STRIPE ? first : s * STRIPE;
      const int64_t end = first + k < (s + 1) * STRIPE ? first + k : (s + 1) * STRIPE;
      unpack_stripe(m, s, begin - s * STRIPE, end - s * STRIPE, out + (begin - first) * out_stride, out_stride);
    }
  });
#endif
}

// out [T, n] = x [T, E] times the rows, and the bias [n]; x, bias (or null) and out of `dtype`, sums in float32.
void hf_flash_tight_linear(const uint8_t *tiles, int64_t n, int64_t E, const uint8_t *base, const int32_t *start,
                           const uint8_t *escapes, const void *x, const void *bias, int64_t T, int dtype, void *out) {
#ifdef TIGHT
  const Tight m{tiles, n, E, base, start, escapes};
  if (dtype == BF16 && can_pairs()) {
    const TightProduct one{&m, static_cast<const uint16_t *>(bias), static_cast<uint16_t *>(out)};
    return all_pairs(&one, 1, static_cast<const uint16_t *>(x), T, First());
  }
  const std::vector<float> inputs = to_float(x, T * E, dtype);
  linear(n, E, T, bias, dtype, out, [&](int64_t begin, int64_t end, float *sums) {
    sums_of(m, begin / STRIPE, stripes_of(end), inputs.data(), T, sums);
  });
#endif
}

}  // extern "C"
