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
  const float *norm, *offset, *offset4;  // what a code of 0 stands for: with all bits, with 4
  float arithmetic[3][4];
  float log_term, bar, least, most;
  int64_t bits;
  // The cache: slot of each neuron, neuron in each slot, slots of this layer, and the window's account of neurons.
  int64_t *slot_of, *neuron_of, *owned, *last;
  double *key;
  uint8_t *rows;
  int64_t n_slots, n_used, row_bytes, window, clock;
  double half_life;
  const double *lately;  // [n_lately], by tokens since the last use; the last for all beyond
  int64_t n_lately;
  // Reads.
  void *ring;
  int64_t fd, start, max_gap, max_rows;
  uint8_t *sink;
  void *batch, *early;  // under way: what a step misses, what hf_flash_step_early guessed
  // The FFN.
  int64_t gated, packed, dtype, base, act;
  float threshold;
  const int32_t *escapes_start;
  const uint32_t *escapes;
  const float *gate_bias, *up_bias, *down_bias;  // [n], [n], [d_out], rounded to the dtype of x; or null
  // What was found.
  int64_t n_wanted, n_read, n_bytes, n_reads, n_fired, n_early, n_early_right, early_bytes;
  double gate_s, wait_s, ffn_s;
  // Scratch.
  int64_t *ids, *slots, *early_ids;  // [n]
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

// Waits for a batch and forgets it. 0: it is there; 1: a read failed, and the batch says which; 2: a signal came.
int land(Step *s, void **batch) {
  if (!*batch) return 0;
  const int result = hf_flash_batch_wait(s->ring, *batch);
  if (result) return result;
  hf_flash_batch_free(*batch);
  *batch = nullptr;
  return 0;
}

const int64_t ARRIVING = INT64_MAX;  // `last` of a neuron that is being read on a guess: its slot cannot be given away

int land_early(Step *s) {
  const int result = land(s, &s->early);
  for (int64_t i = 0; i < s->n_early && !result; i++)
    if (s->last[s->early_ids[i]] == ARRIVING) s->last[s->early_ids[i]] = s->clock - s->window - 1;
  return result;
}

void use(Step *s, int64_t neuron) {  // the score halves with every half life, and each use adds one
  const double now = static_cast<double>(s->clock) / s->half_life;
  s->key[neuron] = std::log2(1.0 + std::exp2(s->key[neuron] - now)) + now;
  s->last[neuron] = s->clock;
}

// The n slots (fewer if there are no more) that are worth least, of those that this step does not use; the window's only
// after all others, or not at all.
std::vector<int64_t> victims(const Step *s, int64_t n, bool spare_window) {
  std::vector<std::pair<double, int64_t>> free;
  for (int64_t i = 0; i < s->n_used; i++) {
    const int64_t neuron = s->neuron_of[s->owned[i]], age = s->clock - s->last[neuron];
    if (s->last[neuron] < s->clock && !(age < s->window && spare_window))
      free.emplace_back(s->key[neuron] + s->lately[std::min(age, s->n_lately - 1)] + (age < s->window ? 1e12 : 0.0),
                        s->owned[i]);
  }
  n = std::min(n, static_cast<int64_t>(free.size()));
  std::nth_element(free.begin(), free.begin() + n, free.end());
  std::vector<int64_t> slots;
  for (int64_t i = 0; i < n; i++) slots.push_back(free[static_cast<size_t>(i)].second);
  return slots;
}

// Slots for neurons that are in none: fresh ones, then `old`; and reads into them.
void *read_into_slots(Step *s, const std::vector<int64_t> &missing, const std::vector<int64_t> &old, int64_t *n_bytes,
                      int64_t *n_reads) {
  *n_bytes = *n_reads = 0;
  if (missing.empty()) return nullptr;
  std::vector<int64_t> to;
  for (int64_t slot : old) s->slot_of[s->neuron_of[slot]] = -1;
  const int64_t n = static_cast<int64_t>(missing.size()), fresh = n - static_cast<int64_t>(old.size());
  for (int64_t k = 0; k < n; k++) {
    const int64_t slot = k < fresh ? s->owned[s->n_used + k] : old[static_cast<size_t>(k - fresh)];
    const int64_t neuron = missing[static_cast<size_t>(k)];
    s->slot_of[neuron] = slot, s->neuron_of[slot] = neuron;
    to.push_back(slot);
  }
  s->n_used += fresh;
  return hf_flash_ring_submit_rows(s->ring, static_cast<int>(s->fd), s->start, s->row_bytes, missing.data(), n,
                                   reinterpret_cast<uint64_t>(s->rows), to.data(), s->max_gap, s->max_rows,
                                   reinterpret_cast<uint64_t>(s->sink), n_bytes, n_reads);
}

// Slots of the wanted neurons, and reads under way for those that were in none. Returns as hf_flash_step does.
int fetch(Step *s) {
  std::vector<int64_t> missing;
  int64_t early = 0;
  s->n_early_right = s->n_bytes = s->n_reads = 0;
  for (int64_t i = 0; i < s->n_wanted; i++) {
    const int64_t neuron = s->ids[i];
    if (s->slot_of[neuron] < 0) missing.push_back(neuron);
    use(s, neuron);
    while (early < s->n_early && s->early_ids[early] < neuron) early++;
    s->n_early_right += early < s->n_early && s->early_ids[early] == neuron;
  }
  s->n_read = static_cast<int64_t>(missing.size());
  const int64_t n = std::max<int64_t>(0, s->n_read - (s->n_slots - s->n_used));
  std::vector<int64_t> old = victims(s, n, false);
  if (static_cast<int64_t>(old.size()) < n) {  // wrong guesses are in the way: wait for them, then they can go
    int result = 2;
    while (result == 2) result = land_early(s);
    if (result) return result;
    old = victims(s, n, false);
  }
  s->batch = read_into_slots(s, missing, old, &s->n_bytes, &s->n_reads);
  for (int64_t i = 0; i < s->n_wanted; i++) s->slots[i] = s->slot_of[s->ids[i]];
  return 0;
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
  const double begun = now();
  int result = land_early(s);
  if (!result) result = land(s, &s->batch);
  s->wait_s += now() - begun;
  if (result) return result;
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
  s->clock += T;
  const int result = fetch(s);
  return result ? result : wait_and_compute(s, x, T, dtype, y);
}

// Start reading what the layer will likely want, from an input x that is only like the one to come: scored with 4 bits
// and no margin. Takes only slots that are fresh or outside the window. Returns as hf_flash_step does.
int hf_flash_step_early(Step *s, const void *x, int64_t T, int dtype) {
  const int result = land_early(s);
  if (result) return result;
  s->n_early = s->early_bytes = 0;
  const std::vector<float> x32 = to_float(x, T * s->d, dtype);
  const int64_t n = hf_flash_gate(x32.data(), T, s->d, s->n, s->nibbles, nullptr, nullptr, nullptr, nullptr, s->step, s->norm,
                                  s->offset4, s->gated ? s->gate_bias : s->up_bias, 4, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, s->bar,
                                  s->least, s->most, s->early_ids, s->recent);
  if (n > s->n_slots) return 0;
  s->clock += T;  // the time of the step to come
  std::vector<int64_t> missing;
  for (int64_t i = 0; i < n; i++) {
    const int64_t neuron = s->early_ids[i];
    if (s->slot_of[neuron] < 0) missing.push_back(neuron);
    else s->last[neuron] = s->clock;  // guessed and there: not to be given away for another guess
  }
  const int64_t fresh = std::min(static_cast<int64_t>(missing.size()), s->n_slots - s->n_used);
  const std::vector<int64_t> old = victims(s, static_cast<int64_t>(missing.size()) - fresh, true);
  missing.resize(static_cast<size_t>(fresh) + old.size());
  int64_t n_reads;
  s->early = read_into_slots(s, missing, old, &s->early_bytes, &n_reads);
  s->clock -= T;
  for (int64_t i = 0; i < n; i++) s->last[s->early_ids[i]] = std::min(s->last[s->early_ids[i]], s->clock);
  for (int64_t neuron : missing) s->last[neuron] = ARRIVING;
  s->n_early = static_cast<int64_t>(missing.size());
  std::copy(missing.begin(), missing.end(), s->early_ids);
  return 0;
}

// Wait for what was read early. Returns as hf_flash_step does.
int hf_flash_step_land(Step *s) { return land_early(s); }

int hf_flash_step_on(Step *s, const void *x, int64_t T, int dtype, void *y) { return wait_and_compute(s, x, T, dtype, y); }

}  // extern "C"
