// One token through a layer as far as its FFN, in one call: norm, attention, sum, norm.
#include "calls.h"
#include "common.h"

struct LayerStep {  // layer_step.py has the same fields
  AttentionStep *attention;
  int64_t d;
  float first_eps, second_eps;
};

extern "C" {

int64_t hf_flash_layer_step_bytes() { return sizeof(LayerStep); }

// y [d] = x plus the attention of its norm, z [d] = the norm of that. Weights of the norms, and biases, which an RMSNorm
// does not have (null); the rest as of hf_flash_attention_step.
void hf_flash_layer_step(LayerStep *s, const uint16_t *x, const uint16_t *first_weight, const uint16_t *first_bias,
                         const uint16_t *second_weight, const uint16_t *second_bias, const uint16_t *cos,
                         const uint16_t *sin, uint16_t *keys, uint16_t *values, int64_t kv_head, int64_t n,
                         const uint16_t *q_bias, const uint16_t *k_bias, const uint16_t *v_bias, const uint16_t *o_bias,
                         uint16_t *y, uint16_t *z) {
  hf_flash_norm(x, s->d, first_weight, first_bias, s->first_eps, z);
  hf_flash_attention_step(s->attention, z, cos, sin, keys, values, kv_head, n, q_bias, k_bias, v_bias, o_bias, y);
  for (int64_t i = 0; i < s->d; i++) y[i] = bits_bf16(round_bf16(from_bf16(x[i]) + from_bf16(y[i])));
  hf_flash_norm(y, s->d, second_weight, second_bias, s->second_eps, z);
}

}  // extern "C"
