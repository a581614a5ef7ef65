// Decoder layers, one after the other, for one token: norm, attention, sum, norm, FFN, sum.
#include "calls.h"
#include "common.h"

extern "C" {
struct LayerStep {  // layer_calls.py has the same fields
  AttentionStep *attention;
  int64_t d;
  float first_eps, second_eps;
};

// What a layer does to a token; layer_calls.py has the same fields. Weights of the norms, and biases, which an RMSNorm does
// not have (null); where the attention's are, as of hf_flash_attention_step; y [d] the result, z [d] the FFN's input and
// out [d] its output. The FFN is `step`, which may look ahead, or `sum` over `stream`; or none (null) for this call.
struct LayerCall {
  LayerStep *layer;
  const uint16_t *x, *first_weight, *first_bias, *second_weight, *second_bias, *cos, *sin;
  uint16_t *keys, *values;
  int64_t kv_head, n;
  const uint16_t *q_bias, *k_bias, *v_bias, *o_bias;
  uint16_t *y, *z, *out;
  Step *step;
  Stream *stream;
  Sum *sum;
  int64_t looks;
  LayerCall *next;
  int64_t done;  // by Done
  double begun, attended, fed, stop;  // when: it began, its attention was done, its FFN, and all
};
}

namespace {

enum Done { NOTHING, ATTENDED, SUMMING, WHOLE };  // layer_calls.py has the same; ATTENDED: y is x plus the attention

CLONES void add(uint16_t *y, const uint16_t *x, const uint16_t *more, int64_t d) {
  for (int64_t i = 0; i < d; i++) y[i] = bits_bf16(round_bf16(from_bf16(x[i]) + from_bf16(more[i])));
}

// `meanwhile`: what the step before left to be done.
void attend(LayerCall *c, Chores *meanwhile) {
  const auto first = [](void *who) { hf_flash_chores(static_cast<Chores *>(who)); };
  const LayerStep *s = c->layer;
  hf_flash_norm(c->x, s->d, c->first_weight, c->first_bias, s->first_eps, c->z);
  hf_flash_attention_step(s->attention, c->z, c->cos, c->sin, c->keys, c->values, c->kv_head, c->n, c->q_bias, c->k_bias,
                          c->v_bias, c->o_bias, c->y, meanwhile->step ? +first : nullptr, meanwhile);
  add(c->y, c->x, c->y, s->d);
  hf_flash_norm(c->y, s->d, c->second_weight, c->second_bias, s->second_eps, c->z);
}

int ffn(LayerCall *c, bool *signalled, Chores *later) {
  if (c->step) {
    Ahead ahead;
    if (c->next) hf_flash_attention_looks_at(c->next->layer->attention, &ahead);
    const bool goes_on = c->next && c->next->done == NOTHING;
    return hf_flash_step(c->step, c->z, 1, BF16, c->out, static_cast<int>(c->looks), signalled, &ahead,
                         goes_on ? later : nullptr);
  }
  const bool goes_on = c->done == SUMMING;
  c->done = SUMMING;
  return hf_flash_stream_sum(c->stream, c->sum, goes_on ? nullptr : c->z, goes_on ? nullptr : c->out);
}

}  // namespace

extern "C" {

// Bytes of the structs, for layer_calls.py to compare with its own.
void hf_flash_layer_bytes(int64_t *out) { out[0] = sizeof(LayerStep), out[1] = sizeof(LayerCall); }

// A layer, and those behind it, as far as their FFNs are told. `*at` is the one that this came to. DONE; SIGNAL: call
// again; else what its FFN returned, and the layer is ATTENDED.
int hf_flash_layers(LayerCall **at) {
  bool signalled = false;
  Chores chores;
  for (LayerCall *c = *at; c; c = c->next) {
    *at = c;
    if (signalled) {
      if (chores.step) hf_flash_chores(&chores);
      return SIGNAL;
    }
    if (c->done == NOTHING) {
      c->begun = now();
      attend(c, &chores);
      c->attended = now(), c->done = ATTENDED;
    }
    chores = Chores();
    if (!c->step && !c->sum) break;
    const int result = ffn(c, &signalled, &chores);
    if (result == SIGNAL) return SIGNAL;
    if (result) return c->done = ATTENDED, result;
    c->fed = now();
    add(c->y, c->y, c->out, c->layer->d);
    c->stop = now(), c->done = WHOLE;
  }
  return DONE;
}

}  // extern "C"
