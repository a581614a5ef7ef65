// A few tokens through one FFN with the certified gate, in one call: gate, lookup, reads into slots, wait, sum.
//
// The arrays are those of cache.py and window.py, which do the same in Python where this cannot be had (no io_uring, many
// tokens) and are its reference. Whoever calls holds the cache's lock.
#include <algorithm>
#include <chrono>

#include "ffn.h"

extern "C" {
int64_t hf_flash_gate(const float *, int64_t, int64_t, int64_t, const uint8_t *, const uint64_t *, const uint64_t *,
                      const uint64_t *, const uint64_t *, const uint16_t *, const float *, const float *, const float *,
                      int, float, float, float, float, float, float, float, float, int64_t *, uint8_t *);
void *hf_flash_ring_submit_rows(void *, int, int64_t, int64_t, const int64_t *, int64_t, uint64_t, const int64_t *,
                                int64_t, int64_t, uint64_t, int64_t *, int64_t *);
int hf_flash_batch_wait(void *, void *);
void hf_flash_batch_free(void *);
int64_t hf_flash_sparse_ffn(const float *, int64_t, int64_t, int64_t, const uint8_t *, int64_t, const int64_t *, int64_t,
                            const float *, const float *, int, int, int, int, float, float *);
int64_t hf_flash_packed_ffn(const float *, int64_t, int64_t, int64_t, const uint8_t *, int64_t, const int64_t *,
                            const int64_t *, int64_t, const float *, const float *, int, int, const int32_t *,
                            const uint32_t *, int, int, float, float *);

struct Step {  // step.py has the same fields in the same order
  int64_t d, d_out, n;
  // The gate: certified.py. Arithmetic's part by dtype of x (float32, float16, bfloat16): gamma, per_norm, tiny, unit.
  const uint8_t *nibbles;
  const uint64_t *planes[4];
  const uint16_t *step;
  const float *norm, *offset;
  float arithmetic[3][4];
  float log_term, bar, least, most;
  int64_t bits;
  // The cache: slots, what is in them, and the window's account of their use.
  int64_t *slot_of, *neuron_of, *last;
  double *key;
  uint8_t *rows;
  int64_t n_slots, n_used, row_bytes, window, clock;
  double half_life;
  // Reads.
  void *ring;
  int64_t fd, start, max_gap, max_rows;
  uint8_t *sink;
  void *batch;
  // The FFN.
  int64_t gated, packed, dtype, base, act;
  float threshold;
  const int32_t *escapes_start;
  const uint32_t *escapes;
  const float *gate_bias, *up_bias, *down_bias;  // [n], [n], [d_out], rounded to the dtype of x; or null
  // What was found.
  int64_t n_wanted, n_read, n_bytes, n_reads, n_fired;
  double gate_s, wait_s, ffn_s;
  // Scratch.
  int64_t *ids, *slots;  // [n]
  uint8_t *recent;       // [n]
};
}

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::vector<float> to_float(const void *x, int64_t n, int dtype) {
  std::vector<float> out(static_cast<size_t>(n));
  const uint16_t *half = static_cast<const uint16_t *>(x);
  if (dtype == F32) std::memcpy(out.data(), x, static_cast<size_t>(n) * 4);
  for (int64_t i = 0; i < n && dtype != F32; i++)
    out[static_cast<size_t>(i)] = dtype == BF16 ? from_bf16(half[i]) : any_f16(half[i]);
  return out;
}

void use(Step *s, int64_t slot) {  // the score halves with every half life, and each use adds one
  const double now = static_cast<double>(s->clock) / s->half_life;
  s->key[slot] = std::log2(1.0 + std::exp2(s->key[slot] - now)) + now;
  s->last[slot] = s->clock;
}

// The n slots that are worth least, of those that this step does not use; the window's only after all others.
std::vector<int64_t> victims(const Step *s, int64_t n) {
  std::vector<int64_t> free;
  for (int64_t i = 0; i < s->n_used; i++)
    if (s->last[i] != s->clock) free.push_back(i);
  const auto worse = [s](int64_t a, int64_t b) {
    const bool recent_a = s->clock - s->last[a] < s->window, recent_b = s->clock - s->last[b] < s->window;
    return recent_a != recent_b ? recent_b : s->key[a] != s->key[b] ? s->key[a] < s->key[b] : a < b;
  };
  if (n < static_cast<int64_t>(free.size())) std::nth_element(free.begin(), free.begin() + n, free.end(), worse);
  free.resize(static_cast<size_t>(n));
  return free;
}

// Slots of the wanted neurons, and reads under way for those that were in none.
void fetch(Step *s, const int64_t *ids, int64_t n, int64_t *slots) {
  std::vector<int64_t> missing, to;
  for (int64_t i = 0; i < n; i++) {
    slots[i] = s->slot_of[ids[i]];
    if (slots[i] < 0) missing.push_back(ids[i]);
    else use(s, slots[i]);
  }
  const int64_t n_missing = static_cast<int64_t>(missing.size());
  const int64_t fresh = std::min(n_missing, s->n_slots - s->n_used);
  const std::vector<int64_t> old = victims(s, n_missing - fresh);
  for (int64_t slot : old) {
    if (s->neuron_of[slot] >= 0) s->slot_of[s->neuron_of[slot]] = -1;
    s->key[slot] = -1e300;
  }
  for (int64_t k = 0; k < n_missing; k++) {
    const int64_t slot = k < fresh ? s->n_used + k : old[static_cast<size_t>(k - fresh)];
    to.push_back(slot);
    s->slot_of[missing[static_cast<size_t>(k)]] = slot;
    s->neuron_of[slot] = missing[static_cast<size_t>(k)];
    use(s, slot);
  }
  s->n_used += fresh;
  for (int64_t i = 0; i < n; i++) slots[i] = s->slot_of[ids[i]];
  s->n_read = n_missing, s->n_bytes = s->n_reads = 0;
  if (n_missing)
    s->batch = hf_flash_ring_submit_rows(s->ring, static_cast<int>(s->fd), s->start, s->row_bytes, missing.data(),
                                         n_missing, reinterpret_cast<uint64_t>(s->rows), to.data(), s->max_gap,
                                         s->max_rows, reinterpret_cast<uint64_t>(s->sink), &s->n_bytes, &s->n_reads);
}

std::vector<float> gather(const float *bias, const int64_t *ids, int64_t n) {
  std::vector<float> out(static_cast<size_t>(bias ? n : 0));
  for (size_t i = 0; i < out.size(); i++) out[i] = bias[ids[i]];
  return out;
}

void compute(Step *s, const void *x, int64_t T, int dtype, void *y) {
  const double begun = now();
  const std::vector<float> x32 = to_float(x, T * s->d, dtype);
  const std::vector<float> gate = gather(s->gate_bias, s->ids, s->n_wanted), up = gather(s->up_bias, s->ids, s->n_wanted);
  const float *gate_bias = s->gate_bias ? gate.data() : nullptr, *up_bias = s->up_bias ? up.data() : nullptr;
  std::vector<float> out(static_cast<size_t>(T * s->d_out), 0.0f);
  const int gated = static_cast<int>(s->gated), act = static_cast<int>(s->act);
  s->n_fired = s->packed ? hf_flash_packed_ffn(x32.data(), T, s->d, s->d_out, s->rows, s->row_bytes, s->slots, s->ids,
                                               s->n_wanted, gate_bias, up_bias, gated, static_cast<int>(s->base),
                                               s->escapes_start, s->escapes, dtype, act, s->threshold, out.data())
                         : hf_flash_sparse_ffn(x32.data(), T, s->d, s->d_out, s->rows, s->row_bytes, s->slots,
                                               s->n_wanted, gate_bias, up_bias, gated, static_cast<int>(s->dtype), dtype,
                                               act, s->threshold, out.data());
  for (int64_t t = 0; t < T; t++) {
    for (int64_t j = 0; j < s->d_out; j++) {
      const int64_t at = t * s->d_out + j;
      const float v = round_to(out[static_cast<size_t>(at)] + (s->down_bias ? s->down_bias[j] : 0.0f), dtype);
      if (dtype == F32) static_cast<float *>(y)[at] = v;
      else static_cast<uint16_t *>(y)[at] = dtype == BF16 ? bits_bf16(v) : bits_f16(v);
    }
  }
  s->ffn_s = now() - begun;
}

int wait_and_compute(Step *s, const void *x, int64_t T, int dtype, void *y) {
  if (s->batch) {
    const double begun = now();
    const int result = hf_flash_batch_wait(s->ring, s->batch);
    s->wait_s += now() - begun;
    if (result) return result;  // 1: a read failed, the batch says which; 2: a signal
    hf_flash_batch_free(s->batch);
    s->batch = nullptr;
  }
  compute(s, x, T, dtype, y);
  return 0;
}

}  // namespace

extern "C" {

int64_t hf_flash_step_bytes() { return sizeof(Step); }

// y [T, d_out] = the FFN of x [T, d], both of `dtype`. 0: done; 1: a read failed; 2: a signal came, call
// hf_flash_step_on; 3: more neurons are wanted than there are slots, nothing was changed (ids and recent are there).
int hf_flash_step(Step *s, const void *x, int64_t T, int dtype, void *y) {
  const double begun = now();
  const float *a = s->arithmetic[dtype];
  {
    const std::vector<float> x32 = to_float(x, T * s->d, dtype);
    s->n_wanted = hf_flash_gate(x32.data(), T, s->d, s->n, s->nibbles, s->planes[0], s->planes[1], s->planes[2],
                                s->planes[3], s->step, s->norm, s->offset, s->gated ? s->gate_bias : s->up_bias,
                                static_cast<int>(s->bits), s->log_term, a[0], a[1], a[2], a[3], s->bar, s->least, s->most,
                                s->ids, s->recent);
  }
  s->gate_s = now() - begun, s->wait_s = s->ffn_s = 0;
  if (s->n_wanted > s->n_slots) return 3;
  s->clock += T > 1 ? T : 1;
  fetch(s, s->ids, s->n_wanted, s->slots);
  return wait_and_compute(s, x, T, dtype, y);
}

int hf_flash_step_on(Step *s, const void *x, int64_t T, int dtype, void *y) { return wait_and_compute(s, x, T, dtype, y); }

}  // extern "C"
