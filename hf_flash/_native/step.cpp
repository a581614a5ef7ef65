// A few tokens through one FFN with the certified gate, in one call: gate, lookup, reads into slots, wait, sum.
//
// The arrays are those of cache.py and window.py, which do the same in Python where this cannot be had (no io_uring, many
// tokens) and are its reference. Whoever calls holds the cache's lock.
#include <algorithm>
#include <utility>

#include "calls.h"
#include "ffn.h"
#include "gate.h"

extern "C" {
struct Step {  // step.py has the same fields in the same order
  int64_t d, d_out, n;
  // The gate: certified.py. Arithmetic's part by dtype of x (float32, float16, bfloat16): gamma, per_norm, tiny, unit.
  const uint8_t *nibbles;
  const uint64_t *planes[4];
  const uint16_t *step;
  const float *norm, *offset, *offset4;  // what a code of 0 stands for: with all bits, with 4
  float arithmetic[3][4];
  float tail, bar, least, most;
  int64_t bits;
  float upper_tail;  // `tail` where the upper 4 bits decide alone
  // The cache: slot of each neuron, neuron in each slot, slots of this layer, and the window's account of neurons.
  int64_t *slot_of, *neuron_of, *owned, *last;
  double *key;
  uint8_t *rows;
  int64_t *state;  // by State
  int64_t row_bytes, window;
  double half_life;
  const double *lately;  // [n_lately], by tokens since the last use; the last for all beyond
  int64_t n_lately;
  // Reads.
  void *ring;
  int64_t fd, start, max_gap, max_rows;
  uint8_t *sink;
  void *batch, *early;  // under way: what a step misses, what `look_ahead` guessed
  // The layer behind, whose input is guessed to be this one's times `scale` plus `shift`; null for none.
  Step *next;
  const float *scale, *shift;
  // The FFN.
  int64_t gated, packed, dtype, base, act;
  float threshold;
  const int32_t *escapes_start;
  const uint32_t *escapes;
  const float *gate_bias, *up_bias, *down_bias;  // [n], [n], [d_out], rounded to the dtype of x; or null
  // What was found.
  int64_t n_wanted, n_read, n_bytes, n_reads, n_fired, n_early, n_early_right, early_bytes;
  double gate_s, early_s, wait_s, ffn_s;
  // Scratch.
  int64_t *ids, *slots, *early_ids;  // [n]
  uint8_t *marks;        // [n]
  float *near;           // [n]: what the last token's scan found, see gate.cpp
  int32_t *list;         // [n]
  Counters counters;
};
}

namespace {

enum State { N_SLOTS, N_USED, CLOCK, LARGEST };  // cache.py has the same

// Waits for a batch and forgets it. 0: it is there; 1: a read failed, and the batch says which; 2: a signal came.
int land(Step *s, void **batch) {
  if (!*batch) return 0;
  const int result = hf_flash_batch_wait(s->ring, *batch);
  if (result) return result;
  hf_flash_batch_free(*batch);
  *batch = nullptr;
  return 0;
}

constexpr int64_t SAMPLE = 256;  // neurons by which `nearest` is chosen
constexpr int64_t GUESSES = 8;   // that are read together
constexpr int64_t VICTIMS = 64;  // looked for together
constexpr double NEAREST = 0.25;  // share of those not in DRAM that a guess looks at: those that came nearest to firing
const int64_t ARRIVING = INT64_MAX;  // `last` of a neuron that is being read on a guess: its slot cannot be given away

int land_early(Step *s) {
  const int result = land(s, &s->early);
  for (int64_t i = 0; i < s->n_early && !result; i++)
    if (s->last[s->early_ids[i]] == ARRIVING) s->last[s->early_ids[i]] = s->state[CLOCK] - s->window - 1;
  return result;
}

void use(Step *s, int64_t neuron) {  // the score halves with every half life, and each use adds one
  const double now = static_cast<double>(s->state[CLOCK]) / s->half_life;
  s->key[neuron] = std::log2(1.0 + std::exp2(s->key[neuron] - now)) + now;
  s->last[neuron] = s->state[CLOCK];
}

// The n slots (fewer if there are no more) that are worth least, these first, of those that this step does not use; the window's only
// after all others, or not at all.
std::vector<int64_t> victims(const Step *s, int64_t n, bool spare_window) {
  static thread_local std::vector<std::pair<double, int64_t>> free;  // what is looked for in every layer is not made anew
  free.clear();
  for (int64_t neuron = 0; neuron < s->n; neuron++) {  // in the order in which their accounts lie
    const int64_t age = s->state[CLOCK] - s->last[neuron];
    if (s->slot_of[neuron] < 0 || age <= 0 || (age < s->window && spare_window)) continue;
    const double worth = s->key[neuron] + s->lately[std::min(age, s->n_lately - 1)];
    free.emplace_back(worth + (age < s->window ? 1e12 : 0.0), s->slot_of[neuron]);
  }
  n = std::min(n, static_cast<int64_t>(free.size()));
  std::nth_element(free.begin(), free.begin() + n, free.end());
  std::sort(free.begin(), free.begin() + n);
  std::vector<int64_t> slots;
  for (int64_t i = 0; i < n; i++) slots.push_back(free[static_cast<size_t>(i)].second);
  return slots;
}

int64_t fresh_slot(Step *s) {
  if (s->state[N_USED] >= s->state[N_SLOTS]) return -1;
  s->counters.cache_bytes += s->row_bytes;
  return s->owned[s->state[N_USED]++];
}

// The slots are those neurons' from now on, and what lies on flash is read into them; adds to what `batch` reads.
void *read_into_slots(Step *s, void *batch, const std::vector<int64_t> &neurons, const std::vector<int64_t> &slots,
                      int64_t *n_bytes, int64_t *n_reads) {
  if (neurons.empty()) return batch;
  for (size_t k = 0; k < slots.size(); k++) {
    if (s->neuron_of[slots[k]] >= 0) s->slot_of[s->neuron_of[slots[k]]] = -1;
    s->slot_of[neurons[k]] = slots[k], s->neuron_of[slots[k]] = neurons[k];
  }
  int64_t bytes, reads;
  batch = hf_flash_ring_submit_rows(s->ring, batch, static_cast<int>(s->fd), s->start, s->row_bytes, neurons.data(),
                                    static_cast<int64_t>(neurons.size()), reinterpret_cast<uint64_t>(s->rows), slots.data(),
                                    s->max_gap, s->max_rows, reinterpret_cast<uint64_t>(s->sink), &bytes, &reads);
  *n_bytes += bytes, *n_reads += reads;
  return batch;
}

// n slots: fresh ones, then as many of `old` as are needed.
std::vector<int64_t> fresh_and_old(Step *s, size_t n, const std::vector<int64_t> &old) {
  std::vector<int64_t> slots;
  for (size_t k = 0; slots.size() < n;) {
    const int64_t fresh = fresh_slot(s);
    slots.push_back(fresh >= 0 ? fresh : old[k++]);
  }
  return slots;
}

// What a scan finds is read while it goes on. A slot is given away only if its neuron is known not to be wanted; what
// finds no such slot waits for the end of the scan.
struct Meanwhile {
  Step *s;
  std::vector<int64_t> old, missing;  // slots worth least, -1 where taken; neurons without a slot, sorted
  int64_t n_seen = 0, n_likely;
  bool looked = false;
  double spent = 0;

  explicit Meanwhile(Step *step) : s(step), n_likely(s->n_read + s->n_read / 2) {  // as last time, and some to choose from
    s->n_read = s->n_bytes = s->n_reads = s->n_early_right = 0;
  }

  int64_t slot(int64_t end) {
    const int64_t fresh = fresh_slot(s);
    if (fresh < 0 && !looked) old = victims(s, n_likely, false), looked = true;  // the other threads are scanning
    for (size_t k = 0; fresh < 0 && k < old.size(); k++) {
      if (old[k] < 0) continue;
      const int64_t neuron = s->neuron_of[old[k]];
      if (neuron < end && s->last[neuron] < s->state[CLOCK]) return std::exchange(old[k], -1);
    }
    return fresh;
  }

  void found(int64_t n, int64_t end) {
    const double begun = now();
    for (; n_seen < n; n_seen++) {
      const int64_t neuron = s->ids[n_seen];
      if (s->slot_of[neuron] < 0) missing.push_back(neuron);
      s->last[neuron] = s->state[CLOCK];
    }
    std::vector<int64_t> slots;
    for (int64_t to; slots.size() < missing.size() && (to = slot(end)) >= 0;) slots.push_back(to);
    const auto upto = missing.begin() + static_cast<int64_t>(slots.size());
    s->batch = read_into_slots(s, s->batch, std::vector<int64_t>(missing.begin(), upto), slots, &s->n_bytes, &s->n_reads);
    missing.erase(missing.begin(), upto);
    s->n_read += static_cast<int64_t>(slots.size());
    spent += now() - begun;
  }
};

// Slots for the rest of what is wanted, and reads under way for them. Returns as hf_flash_step does.
int fetch(Step *s, const std::vector<int64_t> &missing) {
  int64_t early = 0;
  for (int64_t i = 0; i < s->n_wanted; i++) {
    const int64_t neuron = s->ids[i];
    use(s, neuron);
    while (early < s->n_early && s->early_ids[early] < neuron) early++;
    s->n_early_right += early < s->n_early && s->early_ids[early] == neuron;
  }
  const int64_t n = static_cast<int64_t>(missing.size());
  s->n_read += n;
  const int64_t n_old = std::max<int64_t>(0, n - (s->state[N_SLOTS] - s->state[N_USED]));
  std::vector<int64_t> old = victims(s, n_old, false);
  if (static_cast<int64_t>(old.size()) < n_old) {  // wrong guesses are in the way: wait for them, then they can go
    int result = SIGNAL;
    while (result == SIGNAL) result = land_early(s);
    if (result) return result;
    old = victims(s, n_old, false);
    if (static_cast<int64_t>(old.size()) < n_old) return NO_ROOM;
  }
  s->batch = read_into_slots(s, s->batch, missing, fresh_and_old(s, missing.size(), old), &s->n_bytes, &s->n_reads);
  for (int64_t i = 0; i < s->n_wanted; i++) s->slots[i] = s->slot_of[s->ids[i]];
  return 0;
}

// The step is not to be: no time has passed, nobody is in use, and nothing is under way. What was read stays.
int undo(Step *s, int64_t T) {
  int result = SIGNAL;
  while (result == SIGNAL) result = land_early(s);
  if (result) return result;
  result = SIGNAL;
  while (result == SIGNAL) result = land(s, &s->batch);
  if (result) return result;
  s->state[CLOCK] -= T;
  for (int64_t i = 0; i < s->n_wanted; i++) s->last[s->ids[i]] = std::min(s->last[s->ids[i]], s->state[CLOCK]);
  s->counters.bytes_read += s->n_bytes, s->counters.n_reads += s->n_reads;
  return NO_ROOM;
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
  for (int64_t t = 0; t < T; t++)
    for (int64_t j = 0; j < s->d_out && s->down_bias; j++) out[static_cast<size_t>(t * s->d_out + j)] += s->down_bias[j];
  from_float(out.data(), T * s->d_out, dtype, y);
  s->ffn_s = now() - begun;
}

// Neurons that are not in DRAM and came near to firing at the last token: `list` <- them, sorted; returns how many.
int64_t nearest(Step *s) {
  std::vector<float> sample;
  for (int64_t i = 0, by = std::max<int64_t>(1, s->n / SAMPLE); i < s->n; i += by)
    if (s->slot_of[i] < 0) sample.push_back(s->near[i] == s->near[i] ? s->near[i] : INFINITY);  // no order knows NaN
  if (sample.empty()) return 0;
  const auto at = sample.begin() + static_cast<int64_t>(NEAREST * static_cast<double>(sample.size()));
  std::nth_element(sample.begin(), at, sample.end(), std::greater<float>());
  const float cut = *at;
  int64_t n = 0;
  for (int64_t i = 0; i < s->n; i++) {
    s->list[n] = static_cast<int32_t>(i);
    n += s->slot_of[i] < 0 && !(s->near[i] < cut);  // NaN is near, too
  }
  return n;
}

int64_t scan(Step *s, const float *x, int64_t T, int dtype, int64_t *ids, const int32_t *list, int64_t n, Found found,
             void *arg) {
  const float *a = s->arithmetic[dtype];
  return hf_flash_gate(x, T, s->d, n, s->nibbles, s->planes[0], s->planes[1], s->planes[2], s->planes[3], s->step, s->norm,
                       s->offset, s->gated ? s->gate_bias : s->up_bias, static_cast<int>(s->bits), s->tail, a[0], a[1], a[2],
                       a[3], s->bar, s->least, s->most, ids, s->marks, s->upper_tail, list ? nullptr : s->near, list, found,
                       arg);
}

// What is guessed is read while the guessing goes on, as far as there are slots that are fresh or outside the window.
struct Guess {
  Step *s;
  std::vector<int64_t> old = {}, neurons = {}, slots = {};  // slots worth least; what will be read, and where to
  size_t n_old = 0;  // how many of `old` are taken
  int64_t n_seen = 0;

  int64_t slot() {
    const int64_t fresh = fresh_slot(s);
    if (fresh >= 0) return fresh;
    if (n_old == old.size()) {
      read();  // they must have their slots before others are looked for
      old = victims(s, VICTIMS, true), n_old = 0;  // the other threads are scanning
    }
    return n_old < old.size() ? old[n_old++] : -1;
  }

  void read() {
    int64_t n_reads = 0;
    s->early = read_into_slots(s, s->early, neurons, slots, &s->early_bytes, &n_reads);
    neurons.clear(), slots.clear();
  }

  void found(int64_t n, bool all) {
    if (n - n_seen < GUESSES && !all) return;  // a call for the reads costs as much as some of them
    for (int64_t to; n_seen < n && (to = slot()) >= 0; n_seen++) {
      neurons.push_back(s->early_ids[n_seen]), slots.push_back(to);
      s->last[s->early_ids[n_seen]] = ARRIVING;
    }
    read();
  }
};

// Start reading what the layer behind will likely want, while this one waits for what it has found. x [d] is this
// layer's input: the layer behind norms nearly the same residual stream. A wrong guess costs a read and a slot.
void look_ahead(Step *s, const float *x, int dtype) {
  Step *to = s->next;
  if (to->early) return;  // somebody was stopped in the middle: its own step tidies up
  const double begun = now();
  std::vector<float> guess(static_cast<size_t>(s->d));
  for (size_t j = 0; j < guess.size(); j++) guess[j] = x[j] * s->scale[j] + s->shift[j];
  const int64_t n_list = nearest(to);
  for (int64_t k = 0; k < n_list; k++) to->marks[to->list[k]] = 0;
  Guess meanwhile{to};
  auto found = [&](int64_t n, int64_t end) { meanwhile.found(n, end == n_list); };
  const Found call = [](void *arg, int64_t n_found, int64_t end) { (*static_cast<decltype(found) *>(arg))(n_found, end); };
  to->early_bytes = 0;
  to->state[CLOCK]++;  // the time of the step to come
  scan(to, guess.data(), 1, dtype, to->early_ids, to->list, n_list, call, &found);
  to->state[CLOCK]--;
  to->n_early = meanwhile.n_seen;
  s->early_s = now() - begun;
}

int wait_and_compute(Step *s, const void *x, int64_t T, int dtype, void *y) {
  const double begun = now();
  int result = land_early(s);
  if (!result) result = land(s, &s->batch);
  s->wait_s += now() - begun;
  if (result) return result;
  compute(s, x, T, dtype, y);
  Counters &c = s->counters;
  c.neurons_wanted += s->n_wanted, c.neurons_hit += s->n_wanted - s->n_read - s->n_early_right;
  c.neurons_read += s->n_read + s->n_early_right, c.neurons_early += s->n_early_right, c.neurons_fired += s->n_fired;
  c.bytes_read += s->n_bytes + s->early_bytes, c.n_reads += s->n_reads + s->n_early;
  c.gate_s += s->gate_s, c.wait_s += s->wait_s, c.compute_s += s->ffn_s;
  s->n_early = s->early_bytes = 0;
  return 0;
}

}  // namespace

extern "C" {

int64_t hf_flash_step_bytes() { return sizeof(Step); }

// y [T, d_out] = the FFN of x [T, d], both of `dtype`. 0: done; 1: a read failed; 2: a signal came, call
// hf_flash_step_on; 3: more neurons are wanted than there are slots (ids are there): no time has passed, but
// some of them may have been read.
//
// `looks`: whether to guess what the layer behind will want. Then the caller holds its cache's lock, too.
int hf_flash_step(Step *s, const void *x, int64_t T, int dtype, void *y, int looks) {
  const double begun = now();
  s->state[CLOCK] += T;
  Meanwhile meanwhile(s);
  const auto found = [](void *arg, int64_t n, int64_t end) { static_cast<Meanwhile *>(arg)->found(n, end); };
  const std::vector<float> x32 = to_float(x, T * s->d, dtype);
  std::memset(s->marks, 0, static_cast<size_t>(s->n));
  s->n_wanted = scan(s, x32.data(), T, dtype, s->ids, nullptr, s->n, found, &meanwhile);
  s->state[LARGEST] = std::max(s->state[LARGEST], s->n_wanted);
  s->gate_s = now() - begun - meanwhile.spent, s->early_s = s->wait_s = s->ffn_s = 0;
  const int result = s->n_wanted > s->state[N_SLOTS] ? NO_ROOM : fetch(s, meanwhile.missing);
  if (result == NO_ROOM) return undo(s, T);
  if (result) return result;
  if (looks && s->next && T == 1) look_ahead(s, x32.data(), dtype);
  return wait_and_compute(s, x, T, dtype, y);
}

// Wait for what was read early. Returns as hf_flash_step does.
int hf_flash_step_land(Step *s) { return land_early(s); }

int hf_flash_step_on(Step *s, const void *x, int64_t T, int dtype, void *y) { return wait_and_compute(s, x, T, dtype, y); }

}  // extern "C"
