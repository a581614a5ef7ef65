// One token through an attention, from its first projection to its last, in one call: what the modules that
// attention_step.py names do one after the other, with the same kernels and the same roundings in between.
#include "calls.h"
#include "tight.h"

struct AttentionStep {  // attention_step.py has the same fields
  Tight q, k, v, o;
  int64_t n_heads, n_shared, D;
  float q_scale, scale;  // of the queries, and of their products with the keys
};

namespace {

INLINE uint16_t times(uint16_t a, float b) { return bits_bf16(round_bf16(from_bf16(a) * b)); }

CLONES void scale_all(uint16_t *x, int64_t n, float by) {
  for (int64_t i = 0; i < n; i++) x[i] = times(x[i], by);
}

// out [n, D], heads `out_head` apart = x * cos + rotate_half(x) * sin, each product and the sum rounded; x as it is
// without cos.
CLONES void rotate(const uint16_t *x, const uint16_t *cos, const uint16_t *sin, int64_t n, int64_t D, uint16_t *out,
            int64_t out_head) {
  for (int64_t h = 0; h < n; h++, x += D, out += out_head) {
    if (!cos) {
      std::memcpy(out, x, static_cast<size_t>(D) * sizeof *x);
      continue;
    }
    const auto turn = [&](int64_t i, float half) __attribute__((always_inline)) {
      const float turned = round_bf16(half * from_bf16(sin[i])), kept = from_bf16(times(x[i], from_bf16(cos[i])));
      out[i] = bits_bf16(round_bf16(kept + turned));
    };
    for (int64_t i = 0; i < D / 2; i++) turn(i, -from_bf16(x[i + D / 2]));
    for (int64_t i = D / 2; i < D; i++) turn(i, from_bf16(x[i - D / 2]));
  }
}

}  // namespace

extern "C" {

// What it looks at first.
void hf_flash_attention_looks_at(const AttentionStep *s, Ahead *out) {
  const Tight *first[] = {&s->k, &s->v, &s->q};
  for (int i = 0; i < 3; i++) out->from[i] = first[i]->tiles, out->n_bytes[i] = first[i]->n * first[i]->E * 11 / 8;
}

int64_t hf_flash_attention_step_bytes() { return sizeof(AttentionStep); }

// out = the attention of x [E], as the token behind n others. Its keys and values are written behind theirs: to row n of
// each head of `keys` and `values`, whose heads are `kv_head` elements apart. cos, sin: [D], or null. Biases or null.
// first(who), or null: what the calling thread does while others begin.
void hf_flash_attention_step(AttentionStep *s, const uint16_t *x, const uint16_t *cos, const uint16_t *sin,
                             uint16_t *keys, uint16_t *values, int64_t kv_head, int64_t n, const uint16_t *q_bias,
                             const uint16_t *k_bias, const uint16_t *v_bias, const uint16_t *o_bias, uint16_t *out,
                             void (*first)(void *), void *who) {
  const int64_t D = s->D, width = s->n_heads * D, shared = s->n_shared * D;
  std::vector<uint16_t> heads(static_cast<size_t>(width + 2 * shared)), query(static_cast<size_t>(width));
  uint16_t *row = heads.data(), *key = row + width, *value = key + shared;
  const TightProduct from_x[] = {{&s->k, k_bias, key}, {&s->v, v_bias, value}, {&s->q, q_bias, row}};
  tight_products(from_x, 3, x, First{first, who});
  rotate(key, cos, sin, s->n_shared, D, keys + n * D, kv_head);
  rotate(value, nullptr, nullptr, s->n_shared, D, values + n * D, kv_head);
  if (s->q_scale != 1.0f) scale_all(row, width, s->q_scale);
  rotate(row, cos, sin, s->n_heads, D, query.data(), D);
  hf_flash_attend(query.data(), keys, values, width, D, 0, kv_head, D, 0, kv_head, D, 1, s->n_heads,
                  s->n_heads / s->n_shared, n + 1, D, s->scale, row);
  const TightProduct last{&s->o, o_bias, out};
  tight_products(&last, 1, row, First());
}

}  // extern "C"
