// A few tokens through one FFN with the certified gate, in one call: gate, lookup, reads into slots, the sum of what is in
// DRAM meanwhile, wait, the rest of the sum.
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
  const float *norm, *offset, *upper_offset;  // what a code of 0 stands for, of all bits and of the upper 4
  const Known *known;          // or null
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
  void *batch, *early;  // under way: what a step misses, null between calls; what `look_ahead` guessed
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
  double gate_s, early_s, here_s, wait_s, ffn_s;  // here_s: what of the FFN needs nothing from flash
  double early_begun;                             // as of now()
  // Scratch.
  int64_t *ids;          // [n]: the wanted ones, sorted
  int64_t *who, *slots;  // [n]: the same, those in DRAM first, and where they are
  int64_t *early_ids;    // [n]
  int64_t *spare;        // [n]: whose slots steps may take, those worth least at `spare_time` first; -1 where taken
  uint8_t *marks;        // [n]
  float *near;           // [n]: what the last token's scan found, see gate.cpp
  int32_t *list;         // [n]
  int64_t n_here, n_spare, spare_time, spare_left;  // spare_left: of n_spare those that are not taken
  Counters counters;
};
}

namespace {

enum State { N_SLOTS, N_USED, CLOCK, LARGEST };  // cache.py has the same

// Waits for a batch and forgets it, unless a read failed: the batch says which. A signal's handler can wait: whatever it
// does, nobody may leave before the memory that is read into is full.
int land(Step *s, void **batch, bool *signalled = nullptr) {
  if (!*batch) return DONE;
  int result = SIGNAL;
  while ((result = hf_flash_batch_wait(s->ring, *batch)) == SIGNAL)
    if (signalled) *signalled = true;
  if (result) return result;
  hf_flash_batch_free(*batch);
  *batch = nullptr;
  return DONE;
}

bool has_landed(const Step *s, void *batch) { return !batch || hf_flash_batch_ready(s->ring, batch); }

constexpr int64_t CHUNK = 1 << 14;  // bytes that are loaded between two looks at what has landed

void keep(uint64_t value) { asm volatile("" : : "r"(value)); }  // it is computed though nobody uses it

// Cores that would wait for flash load what they will compute on next into their caches. Returns once all has landed, or
// when there is nothing more to load.
void load_meanwhile(Step *s, const Ahead &ahead) {
  static const int64_t cache = last_cache_bytes() / 2;
  std::atomic<bool> landed{false};
  std::atomic<int64_t> next{0};
  in_parallel(max_threads(), [&](int me) {
    while (!landed.load(std::memory_order_relaxed)) {
      int64_t at = next.fetch_add(CHUNK);
      int k = 0;
      if (at >= cache) return;
      for (; k < 3 && at >= ahead.n_bytes[k]; k++) at -= (ahead.n_bytes[k] + CHUNK - 1) / CHUNK * CHUNK;
      if (k == 3) return;
      const uint8_t *from = ahead.from[k] + at, *end = ahead.from[k] + std::min(at + CHUNK, ahead.n_bytes[k]);
      uint64_t sum = 0;  // loads: of prefetches the core drops what it has no room for
      for (uint64_t word; from < end; from += 64) std::memcpy(&word, from, sizeof word), sum += word;
      keep(sum);
      if (me == 0 && has_landed(s, s->early) && has_landed(s, s->batch)) landed = true;
    }
  });
}

constexpr int64_t SAMPLE = 256;  // neurons by which `nearest` is chosen
constexpr double NEAREST = 0.08;  // share of those not in DRAM that a guess looks at: those that came nearest to firing
constexpr float GUESSED = 0.25;    // how much of its bound a score is given for a guess: what is as near as that is read
const int64_t ARRIVING = INT64_MAX;  // `last` of a neuron that is being read on a guess: its slot cannot be given away

int land_early(Step *s, bool *signalled = nullptr) {
  const int result = land(s, &s->early, signalled);
  for (int64_t i = 0; i < s->n_early && !result; i++)
    if (s->last[s->early_ids[i]] == ARRIVING) s->last[s->early_ids[i]] = s->state[CLOCK] - s->window - 1;
  return result;
}

void use(Step *s, int64_t neuron) {  // the score halves with every half life, and each use adds one
  const double now = static_cast<double>(s->state[CLOCK]) / s->half_life;
  s->key[neuron] = std::log2(1.0 + std::exp2(s->key[neuron] - now)) + now;
  s->last[neuron] = s->state[CLOCK];
}

// The n neurons (fewer if there are no more) whose slots are worth least at a time, these first, of those not used at
// that time; the window's only after all others.
std::vector<int64_t> victims(const Step *s, int64_t time, int64_t n) {
  static thread_local std::vector<std::pair<double, int64_t>> kept;  // what is looked for in every layer is not made anew
  std::vector<std::pair<double, int64_t>> &free = kept;              // whose place is looked up once
  free.clear();
  for (int64_t neuron = 0; neuron < s->n; neuron++) {  // in the order in which their accounts lie
    const int64_t age = time - s->last[neuron];
    if (s->slot_of[neuron] < 0 || age <= 0) continue;
    const double worth = s->key[neuron] + s->lately[std::min(age, s->n_lately - 1)];
    free.emplace_back(worth + (age < s->window ? 1e12 : 0.0), neuron);
  }
  n = std::min(n, static_cast<int64_t>(free.size()));
  std::nth_element(free.begin(), free.begin() + n, free.end());
  std::sort(free.begin(), free.begin() + n);
  std::vector<int64_t> neurons;
  for (int64_t i = 0; i < n; i++) neurons.push_back(free[static_cast<size_t>(i)].second);
  return neurons;
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

// n slots: fresh ones, then as many of those of `old` neurons as are needed.
std::vector<int64_t> fresh_and_old(Step *s, size_t n, const std::vector<int64_t> &old) {
  std::vector<int64_t> slots;
  for (size_t k = 0; slots.size() < n;) {
    const int64_t fresh = fresh_slot(s);
    slots.push_back(fresh >= 0 ? fresh : s->slot_of[old[k++]]);
  }
  return slots;
}

constexpr int64_t SPARE_STEPS = 4;  // that take from what was set aside once

// Have slots set aside for the step at a time: as many as the last one and the guess before it took, and some to choose
// from. Neurons that were used since they were set aside are passed over by who takes.
void set_aside(Step *s, int64_t time, int64_t taken) {
  const int64_t n = taken + taken / 2 - (s->state[N_SLOTS] - s->state[N_USED]), age = time - s->spare_time;
  if (s->spare_time && age >= 0 && age < SPARE_STEPS && s->spare_left >= n) return;
  const std::vector<int64_t> found = n > 0 ? victims(s, time, SPARE_STEPS * n) : std::vector<int64_t>();
  std::copy(found.begin(), found.end(), s->spare);
  s->n_spare = s->spare_left = static_cast<int64_t>(found.size()), s->spare_time = time;
}

// The slot of entry k of what was set aside, or -1 if it is not to be had. It must be given to somebody then.
int64_t take_spare(Step *s, int64_t k) {
  const int64_t neuron = s->spare[k];
  if (neuron < 0 || s->last[neuron] >= s->spare_time || s->slot_of[neuron] < 0) return -1;
  s->spare[k] = -1, s->spare_left--;
  return s->slot_of[neuron];
}

constexpr size_t FEW = 5;  // reads for which alone, while others are under way, the kernel is not called

// What a scan finds is read while it goes on. A slot is given away only if its neuron is known not to be wanted; what
// finds no such slot waits for the end of the scan.
struct Meanwhile {
  Step *s;
  std::vector<int64_t> missing, coming;  // neurons without a slot, sorted; those that have been given one
  int64_t n_seen = 0;
  double spent = 0;

  explicit Meanwhile(Step *step) : s(step) {
    set_aside(s, s->state[CLOCK], s->n_read + s->n_early);
    s->n_read = s->n_bytes = s->n_reads = s->n_early_right = 0;
  }

  void found(int64_t n, int64_t end) {
    const double begun = now();
    for (; n_seen < n; n_seen++) {
      const int64_t neuron = s->ids[n_seen];
      if (s->slot_of[neuron] < 0) missing.push_back(neuron);
      s->last[neuron] = s->state[CLOCK];
    }
    if (missing.size() >= FEW || !(s->batch || s->early)) read(end);
    spent += now() - begun;
  }

  void read(int64_t end) {
    std::vector<int64_t> slots;
    for (int64_t to; slots.size() < missing.size() && (to = fresh_slot(s)) >= 0;) slots.push_back(to);
    for (int64_t k = 0; slots.size() < missing.size() && k < s->n_spare; k++) {
      const int64_t to = s->spare[k] < end ? take_spare(s, k) : -1;  // of those behind nobody knows yet
      if (to >= 0) slots.push_back(to);
    }
    const auto upto = missing.begin() + static_cast<int64_t>(slots.size());
    s->batch = read_into_slots(s, s->batch, std::vector<int64_t>(missing.begin(), upto), slots, &s->n_bytes, &s->n_reads);
    coming.insert(coming.end(), missing.begin(), upto);
    missing.erase(missing.begin(), upto);
    s->n_read += static_cast<int64_t>(slots.size());
  }
};

// Slots for the rest of what is wanted, and reads under way for them. Returns as hf_flash_step does.
int fetch(Step *s, const std::vector<int64_t> &missing) {
  const int64_t n = static_cast<int64_t>(missing.size()), now = s->state[CLOCK];
  s->n_read += n;
  const int64_t n_old = std::max<int64_t>(0, n - (s->state[N_SLOTS] - s->state[N_USED]));
  std::vector<int64_t> old = n_old ? victims(s, now, n_old) : std::vector<int64_t>();
  if (static_cast<int64_t>(old.size()) < n_old) {  // wrong guesses are in the way: wait for them, then they can go
    const int result = land_early(s);
    if (result) return result;
    old = victims(s, now, n_old);
    if (static_cast<int64_t>(old.size()) < n_old) return NO_ROOM;
  }
  s->batch = read_into_slots(s, s->batch, missing, fresh_and_old(s, missing.size(), old), &s->n_bytes, &s->n_reads);
  return DONE;
}

// Everything is under way. `who` <- the wanted neurons, first those that need not be waited for. `coming`, sorted: the
// others, apart from right guesses.
void sort_out(Step *s, const std::vector<int64_t> &coming) {
  int64_t early = 0;
  size_t k = 0;
  s->n_here = 0;
  static thread_local std::vector<int64_t> later;
  later.clear();
  for (int64_t i = 0; i < s->n_wanted; i++) {
    const int64_t neuron = s->ids[i];
    while (early < s->n_early && s->early_ids[early] < neuron) early++;
    const bool is_early = early < s->n_early && s->early_ids[early] == neuron;
    const bool is_coming = k < coming.size() && coming[k] == neuron;
    s->n_early_right += is_early, k += is_coming;
    if (is_early || is_coming) later.push_back(neuron);
    else s->who[s->n_here++] = neuron;
  }
  std::copy(later.begin(), later.end(), s->who + s->n_here);
  for (int64_t i = 0; i < s->n_wanted; i++) s->slots[i] = s->slot_of[s->who[i]];
}

// The step is not to be: no time has passed, nobody is in use, and nothing is under way. What was read stays.
int undo(Step *s, int64_t T) {
  const int early = land_early(s), result = land(s, &s->batch);
  if (early || result) return FAILED;
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

// out [T, d_out] += what neurons begin .. end of `who` make of x [T, d].
void add_ffn(Step *s, const std::vector<float> &x, int64_t T, int dtype, int64_t begin, int64_t end, First first, float *out) {
  const int64_t n = end - begin, *ids = s->who + begin, *slots = s->slots + begin;
  const std::vector<float> gate = gather(s->gate_bias, ids, n), up = gather(s->up_bias, ids, n);
  const float *gate_bias = s->gate_bias ? gate.data() : nullptr, *up_bias = s->up_bias ? up.data() : nullptr;
  const Ffn f{x.data(), T, s->d, s->d_out, s->rows, s->row_bytes, slots, gate_bias, up_bias, static_cast<int>(s->gated),
              static_cast<int>(s->act), dtype, s->threshold, n};
  s->n_fired += s->packed ? packed_ffn(f, ids, static_cast<int>(s->base), s->escapes_start, s->escapes, first, out)
                          : sparse_ffn(f, static_cast<int>(s->dtype), first, out);
}

// flags [n] <- 1 for a neuron that is not in DRAM and not below `cut`; NaN is not below.
CLONES void flag_near(const int64_t *slot_of, const float *near, int64_t n, float cut, uint8_t *flags) {
  for (int64_t i = 0; i < n; i++) flags[i] = static_cast<uint8_t>((slot_of[i] < 0) & !(near[i] < cut));
}

// Neurons that are not in DRAM and came near to firing at the last token: `list` <- them, sorted; returns how many.
int64_t nearest(Step *s) {
  std::vector<float> sample;
  for (int64_t i = 0, by = std::max<int64_t>(1, s->n / SAMPLE); i < s->n; i += by)
    if (s->slot_of[i] < 0) sample.push_back(s->near[i] == s->near[i] ? s->near[i] : INFINITY);  // no order knows NaN
  if (sample.empty()) return 0;
  const auto at = sample.begin() + static_cast<int64_t>(NEAREST * static_cast<double>(sample.size()));
  std::nth_element(sample.begin(), at, sample.end(), std::greater<float>());
  static thread_local std::vector<uint8_t> kept;  // by neuron, in whole words
  std::vector<uint8_t> &flags = kept;
  flags.assign(static_cast<size_t>((s->n + 7) / 8 * 8), 0);
  flag_near(s->slot_of, s->near, s->n, *at, flags.data());
  int64_t n = 0;
  for (int64_t i = 0; i < s->n; i += 8) {
    uint64_t word;
    std::memcpy(&word, flags.data() + i, sizeof word);
    for (; word; word &= word - 1) s->list[n++] = static_cast<int32_t>(i + __builtin_ctzll(word) / 8);
  }
  return n;
}

// `list`, or null: a guess about those, by the upper bits and a part of their bound.
int64_t scan(Step *s, const float *x, int64_t T, int dtype, int64_t *ids, const int32_t *list, int64_t n, Found found,
             void *arg) {
  const float *a = s->arithmetic[dtype], share = GUESSED * GUESSED;  // of a bound's square
  const float tail = !list ? s->tail : share * (s->bits > 4 ? s->upper_tail : s->tail);
  return hf_flash_gate(x, T, s->d, n, s->nibbles, s->planes[0], s->planes[1], s->planes[2], s->planes[3], s->step, s->norm,
                       list ? s->upper_offset : s->offset, s->known, s->gated ? s->gate_bias : s->up_bias,
                       list ? 4 : static_cast<int>(s->bits), tail, a[0], a[1], a[2], a[3], s->bar, s->least, s->most, ids,
                       s->marks, s->upper_tail, list ? nullptr : s->near, list, found, arg);
}

// What the layer behind is guessed to be given; its thread's until the chores are done.
std::vector<float> &guessed_input() {
  static thread_local std::vector<float> kept;
  return kept;
}

// x [d] is this layer's input: the layer behind norms nearly the same residual stream.
void guess_input(const Step *s, const std::vector<float> &x) {
  std::vector<float> &input = guessed_input();
  input.resize(x.size());
  for (size_t j = 0; j < x.size(); j++) input[j] = x[j] * s->scale[j] + s->shift[j];
}

// Guess what the layer behind will likely want: `early_ids` of that; returns how many.
int64_t guess(Step *s, int dtype) {
  Step *to = s->next;
  if (to->early) return 0;  // somebody was stopped in the middle: its own step tidies up
  const double begun = s->early_begun = now();
  const int64_t n_list = nearest(to);
  for (int64_t k = 0; k < n_list; k++) to->marks[to->list[k]] = 0;
  const int64_t n = scan(to, guessed_input().data(), 1, dtype, to->early_ids, to->list, n_list, nullptr, nullptr);
  s->early_s = now() - begun;
  return n;
}

// Start reading the n neurons that were guessed, as far as there are slots that are fresh or outside the window. A wrong
// guess costs a read and a slot.
void read_ahead(Step *s, int64_t n) {
  const int64_t time = s->state[CLOCK] + 1;  // of the step to come
  set_aside(s, time, s->n_read + s->n_early);
  std::vector<int64_t> neurons, slots;
  for (int64_t k = 0; static_cast<int64_t>(neurons.size()) < n;) {
    int64_t slot = fresh_slot(s);
    for (; slot < 0 && k < s->n_spare; k++) {
      if (s->spare[k] >= 0 && time - s->last[s->spare[k]] < s->window) k = s->n_spare;
      else slot = take_spare(s, k);
    }
    if (slot < 0) break;
    const int64_t neuron = s->early_ids[neurons.size()];
    neurons.push_back(neuron), slots.push_back(slot);
    s->last[neuron] = ARRIVING;
  }
  int64_t n_reads = 0;
  s->early_bytes = 0;
  s->early = read_into_slots(s, s->early, neurons, slots, &s->early_bytes, &n_reads);
  s->n_early = static_cast<int64_t>(neurons.size());
}

// What the calling thread does while others compute already: a guess and reads for the layer behind, this step's books, and
// the next one's slots.
void do_chores(const Chores &c) {
  Step *s = c.step;
  if (c.looks) {
    const int64_t n = guess(s, c.dtype);
    if (n) read_ahead(s->next, n);
  }
  for (int64_t i = 0; i < s->n_wanted; i++) use(s, s->ids[i]);
  set_aside(s, s->state[CLOCK] + 1, c.n_taken);
}

// What is in DRAM is computed on while the rest is read.
int compute_and_wait(Step *s, const std::vector<float> &x, int64_t T, int dtype, bool looks, const Ahead *ahead, void *y,
                     bool *signalled, Chores *later) {
  std::vector<float> out(static_cast<size_t>(T * s->d_out), 0.0f);
  struct {
    Chores todo;
    double spent;
  } chores{{s, looks, dtype, s->n_read + s->n_early}, 0.0};
  const auto run = [](void *who) {
    auto *mine = static_cast<decltype(chores) *>(who);
    const double begun = now();
    do_chores(mine->todo);
    mine->spent = now() - begun;
  };
  if (later) *later = chores.todo;
  const First first = later ? First() : First{run, &chores};
  const double begun = now();
  s->n_fired = 0;
  if (s->n_here) add_ffn(s, x, T, dtype, 0, s->n_here, first, out.data());
  else first();
  const double waiting = now();
  s->here_s = waiting - begun - chores.spent;
  if (ahead && !(has_landed(s, s->early) && has_landed(s, s->batch))) load_meanwhile(s, *ahead);
  const int early = land_early(s, signalled), result = land(s, &s->batch, signalled);
  const double computing = now();
  s->wait_s = computing - waiting;
  if (early || result) return FAILED;
  if (s->n_here < s->n_wanted) add_ffn(s, x, T, dtype, s->n_here, s->n_wanted, First(), out.data());
  for (int64_t t = 0; t < T; t++)
    for (int64_t j = 0; j < s->d_out && s->down_bias; j++) out[static_cast<size_t>(t * s->d_out + j)] += s->down_bias[j];
  from_float(out.data(), T * s->d_out, dtype, y);
  s->ffn_s = now() - computing;
  Counters &c = s->counters;
  c.neurons_wanted += s->n_wanted, c.neurons_hit += s->n_wanted - s->n_read - s->n_early_right;
  c.neurons_read += s->n_read + s->n_early_right, c.neurons_early += s->n_early_right, c.neurons_fired += s->n_fired;
  c.bytes_read += s->n_bytes + s->early_bytes, c.n_reads += s->n_reads + s->n_early;
  c.gate_s += s->gate_s, c.wait_s += s->wait_s, c.compute_s += s->here_s + s->ffn_s;
  s->n_early = s->early_bytes = 0;
  return DONE;
}

}  // namespace

extern "C" {

int64_t hf_flash_step_bytes() { return sizeof(Step); }

// y [T, d_out] = the FFN of x [T, d], both of `dtype`. DONE; FAILED: a read did; NO_ROOM: more neurons are wanted than
// there are slots (ids are there): no time has passed, but some of them may have been read.
//
// `looks`: whether to guess what the layer behind will want. Then the caller holds its cache's lock, too. `signalled`, or
// null: is set where a signal came while this waited; its handler has to run. `ahead`, or null: what is looked at after it.
// `later`, or null: <- what is left to do, for hf_flash_chores, before anything else is done with this layer.
int hf_flash_step(Step *s, const void *x, int64_t T, int dtype, void *y, int looks, bool *signalled, const Ahead *ahead,
                  Chores *later) {
  const double begun = now();
  s->state[CLOCK] += T;
  Meanwhile meanwhile(s);
  const auto found = [](void *arg, int64_t n, int64_t end) { static_cast<Meanwhile *>(arg)->found(n, end); };
  const std::vector<float> x32 = to_float(x, T * s->d, dtype);
  std::memset(s->marks, 0, static_cast<size_t>(s->n));
  s->n_wanted = scan(s, x32.data(), T, dtype, s->ids, nullptr, s->n, found, &meanwhile);
  s->state[LARGEST] = std::max(s->state[LARGEST], s->n_wanted);
  s->gate_s = now() - begun - meanwhile.spent, s->early_s = s->here_s = s->wait_s = s->ffn_s = 0;
  const bool fits = s->n_wanted <= s->state[N_SLOTS];
  if (fits) meanwhile.read(s->n);
  const int result = fits ? fetch(s, meanwhile.missing) : NO_ROOM;
  if (result == NO_ROOM) return undo(s, T);
  if (result) return land(s, &s->batch), result;
  std::vector<int64_t> &coming = meanwhile.coming;
  coming.insert(coming.end(), meanwhile.missing.begin(), meanwhile.missing.end());
  std::sort(coming.begin(), coming.end());
  sort_out(s, coming);
  const bool guesses = looks && s->next && T == 1;
  if (guesses) guess_input(s, x32);
  return compute_and_wait(s, x32, T, dtype, guesses, ahead, y, signalled, later);
}

void hf_flash_chores(const Chores *chores) { do_chores(*chores); }

// Wait for what was read early. Returns as hf_flash_step does.
int hf_flash_step_land(Step *s) { return land_early(s); }

}  // extern "C"
