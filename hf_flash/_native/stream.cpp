// The ring of stream.py for io_uring: chunks of a layer are waited for, read ahead and summed up with no Python between.
//
// stream.py does the same for every reader and is the reference: which chunk follows which, when a read is started, what
// is dropped. Here all of the ring's state lives in the structs below, so a signal between two lines of Python loses nothing.
// Whoever calls holds the stream's lock. While a caller computes, a thread of the ring (uring.cpp) starts the next burst;
// what both look at is theirs by `Helper::mutex`.
#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>

#include "calls.h"

extern "C" {
struct Unit {  // rows that are streamed; ring.py has the fields of these structs in the same order
  int64_t fd, start, n_rows, row_bytes, step;  // step: rows of a chunk
  int64_t next;                // the unit that is read ahead after this one, -1 where nothing of this one is read any more
  int64_t first, keep, begun;  // rows that are pinned; that will be, once the first pass is through; whether that began
  int64_t *stays;              // of each chunk: the slot in which it stays, WANTED where it shall, else NOT_WANTED
};

struct Slot {  // one buffer
  uint8_t *memory, *rows;
  void *batch;  // null: nothing is under way
  int64_t unit, row, n;
  int64_t taken;  // whoever called is using it
  int64_t bytes, burst;
  int64_t kept;  // its chunk stays in it
  double begun;
};

struct Event {  // for trace.py
  int64_t kind, unit, bytes;
  uint64_t thread;  // as Python's threading.get_ident() has it
  double start, stop;
};

struct Log {
  int64_t n, most;
  Event events[1];  // [most]
};

struct Stream {
  void *ring;  // null: the reader is closed, which has waited for everything
  Unit *units;
  int64_t n_units;
  Slot *slots;
  int64_t n_slots;
  int64_t *line, n_line;  // slots with reads under way, in the order in which they will be asked for
  int64_t last;           // the unit that was asked for last, -1 before the first
  int64_t n_burst, burst;  // reads that are started together; number of the burst of which nothing has landed yet
  void *failed;           // what was being read when a call returned FAILED
  Counters counters;
  Log *log;  // null: nobody wants to know
  void *helper;  // null: the next burst is started by whoever takes a chunk
};

struct Sum {  // packed_sum.py
  int64_t unit, n_pinned, row;  // row: the neuron to go on with
  const uint8_t *pinned;        // [n_pinned] rows that are in DRAM
  int64_t d, d_out, n, stride, gated, base;
  const int32_t *start;
  const uint32_t *escapes;
  const void *x, *gate_bias, *up_bias, *down_bias;
  void *out;
  const uint16_t *table;  // ordered sums of bfloat16: what the activation makes of each; null: float32 sums, all float
  uint16_t *h;
  float *sums;
  int64_t n_tokens, dtype, act;
  float threshold;
  const int64_t *numbers;
};
}

namespace {

enum { WAIT = 0, SUBMIT = 1, READ = 2, ARITHMETIC = 3, STREAM = 4 };

enum { WANTED = -1, NOT_WANTED = -2 };

constexpr int64_t ALIGN = 4096;

struct Helper {
  std::mutex mutex;
  void *watch = nullptr;
};

using Hold = std::unique_lock<std::mutex>;

Hold hold(const Stream *s) { return s->helper ? Hold(static_cast<Helper *>(s->helper)->mutex) : Hold(); }

void note(Stream *s, int64_t kind, int64_t unit, double start, int64_t bytes = 0) {
  if (s->log && s->log->n < s->log->most)
    s->log->events[s->log->n++] = Event{kind, unit, bytes, static_cast<uint64_t>(pthread_self()), start, now()};
}

bool is_free(const Slot &slot) { return !slot.taken && !slot.batch && !slot.kept; }

int64_t n_free(const Stream *s) { return std::count_if(s->slots, s->slots + s->n_slots, is_free); }

Slot *free_slot(Stream *s) {
  Slot *end = s->slots + s->n_slots, *slot = std::find_if(s->slots, end, is_free);
  return slot == end ? nullptr : slot;
}

int64_t &stays(const Stream *s, int64_t unit, int64_t row) { return s->units[unit].stays[row / s->units[unit].step]; }

// The chunk to read ahead after the one at *row of *unit; false where everything else stays in DRAM.
bool following(const Stream *s, int64_t *unit, int64_t *row) {
  for (int64_t n_left = s->n_units;;) {
    *row += s->units[*unit].step;
    while (*row >= s->units[*unit].n_rows) {
      if (n_left-- == 0) return false;
      if (s->units[*unit].next >= 0) *unit = s->units[*unit].next;
      const Unit &u = s->units[*unit];
      *row = u.begun ? u.keep : u.first;
    }
    if (stays(s, *unit, *row) < 0) return true;
  }
}

// noted: by a caller, whose the log is, and not by the ring's thread.
void schedule(Stream *s, int64_t unit, int64_t row, bool noted = true) {
  Slot *slot = free_slot(s);
  if (!slot) return;
  Unit &u = s->units[unit];
  u.begun = 1;
  const int64_t n = row + u.step < u.n_rows ? u.step : u.n_rows - row;
  const int64_t begin = u.start + row * u.row_bytes, aligned = begin / ALIGN * ALIGN;
  const int64_t need = begin - aligned + n * u.row_bytes, length = (need + ALIGN - 1) / ALIGN * ALIGN;
  const int fd = static_cast<int>(u.fd);
  const int64_t first[2] = {0, 1};
  const uint64_t address = reinterpret_cast<uint64_t>(slot->memory);
  slot->begun = now();
  slot->unit = unit, slot->row = row, slot->n = n, slot->bytes = length, slot->burst = s->burst;
  slot->rows = slot->memory + (begin - aligned);
  slot->batch = hf_flash_ring_submit(s->ring, 1, &fd, &aligned, &need, first, &address, &length);
  s->line[s->n_line++] = slot - s->slots;
  s->counters.bytes_read += length, s->counters.n_reads++;
  if (noted) note(s, SUBMIT, unit, slot->begun, length);
}

// Start up to n reads behind those under way, as far as buffers are free.
void read_ahead(Stream *s, int64_t n, bool noted = true) {
  for (n = std::min(n, n_free(s)); n > 0; n--) {
    const Slot &last = s->slots[s->line[s->n_line - 1]];
    int64_t unit = last.unit, row = last.row;
    if (!following(s, &unit, &row)) return;
    schedule(s, unit, row, noted);
  }
}

// The next burst, once the one before has begun to land.
void refill(Stream *s) {
  if (s->n_line && s->slots[s->line[s->n_line - 1]].burst != s->burst) read_ahead(s, s->n_burst);
}

Slot *front(Stream *s) { return s->slots + s->line[0]; }

// Called by the ring's thread: start the next burst, though nobody waits yet.
void landed_meanwhile(void *stream) {
  Stream *s = static_cast<Stream *>(stream);
  const Hold held = hold(s);
  for (int64_t i = 0; i < s->n_line; i++) {
    const Slot &slot = s->slots[s->line[i]];
    if (slot.burst < s->burst) continue;
    if (hf_flash_batch_ready(s->ring, slot.batch)) s->burst++, read_ahead(s, s->n_burst, false);
    return;
  }
}

void landed(Stream *s) { s->burst += front(s)->burst == s->burst; }  // the first of the line, whatever became of it

void leave_line(Stream *s) {
  note(s, READ, front(s)->unit, front(s)->begun, front(s)->bytes);
  front(s)->batch = nullptr;
  s->n_line--;
  std::memmove(s->line, s->line + 1, static_cast<size_t>(s->n_line) * sizeof *s->line);
}

// Wait for the first of the line and forget it, whatever became of it.
int drop_front(Stream *s) {
  void *batch = front(s)->batch;
  if (s->ring && hf_flash_batch_wait(s->ring, batch) == SIGNAL) return SIGNAL;
  landed(s);
  leave_line(s);
  hf_flash_batch_free(batch);
  return DONE;
}

int drop_all(Stream *s) {
  while (s->n_line)
    if (drop_front(s) == SIGNAL) return SIGNAL;
  return DONE;
}

bool is(const Slot &slot, int64_t unit, int64_t row) { return slot.unit == unit && slot.row == row; }

// The chunk's rows, landed, in *taken, with reads of what follows under way. After SIGNAL call it again.
int take(Stream *s, int64_t unit, int64_t row, Slot **taken) {
  Hold held = hold(s);
  if (const int64_t number = stays(s, unit, row); number >= 0) {
    refill(s);
    *taken = s->slots + number;
    (*taken)->taken = 1;
    return DONE;
  }
  bool there = false;
  for (int64_t i = 0; i < s->n_line; i++) there = there || is(s->slots[s->line[i]], unit, row);
  if (!there) {
    if (drop_all(s) == SIGNAL) return SIGNAL;
    schedule(s, unit, row);
    if (!s->n_line) return NO_ROOM;
    read_ahead(s, s->n_burst - 1);
  }
  while (!is(*front(s), unit, row))
    if (drop_front(s) == SIGNAL) return SIGNAL;
  refill(s);
  const double waiting = now();
  void *batch = front(s)->batch;
  if (held) held.unlock();
  const int result = hf_flash_batch_wait(s->ring, batch);
  if (held.mutex()) held.lock();
  if (result != SIGNAL) {
    landed(s);
    refill(s);
    *taken = front(s);
    leave_line(s);
    if (result == DONE) {
      hf_flash_batch_free(batch);
      (*taken)->taken = 1;
    } else {
      s->failed = batch;
    }
  }
  s->counters.wait_s += now() - waiting;
  note(s, WAIT, unit, waiting);
  return result;
}

// Learn that a unit follows the one before.
void comes(Stream *s, int64_t unit) {
  const Hold held = hold(s);
  if (s->units[unit].next < 0) return;
  if (s->last >= 0 && s->units[s->last].next >= 0) s->units[s->last].next = unit;
  s->last = unit;
}

void give(Stream *s, Slot *slot) {
  const Hold held = hold(s);
  slot->taken = 0;
  if (int64_t &number = stays(s, slot->unit, slot->row); number == WANTED) number = slot - s->slots, slot->kept = 1;
  if (s->ring) refill(s);
}

void add(const Sum *f, const uint8_t *rows, int64_t number, int64_t n) {
  const int gated = static_cast<int>(f->gated), base = static_cast<int>(f->base);
  if (f->table) {
    const uint16_t *gate = static_cast<const uint16_t *>(f->gate_bias), *up = static_cast<const uint16_t *>(f->up_bias);
    if (number == 0) std::memset(f->sums, 0, static_cast<size_t>(2 * f->d_out) * sizeof *f->sums);
    hf_flash_ordered_ffn(rows, f->stride, number, n, f->d, f->d_out, gated, base, f->start + number, f->escapes,
                         static_cast<const uint16_t *>(f->x), f->table, gate ? gate + number : nullptr,
                         up ? up + number : nullptr, static_cast<const uint16_t *>(f->down_bias), f->h, f->sums,
                         number + n == f->n ? static_cast<uint16_t *>(f->out) : nullptr);
    return;
  }
  const float *gate = static_cast<const float *>(f->gate_bias), *up = static_cast<const float *>(f->up_bias);
  hf_flash_packed_ffn(static_cast<const float *>(f->x), f->n_tokens, f->d, f->d_out, rows, f->stride, f->numbers, f->numbers,
                      n, gate ? gate + number : nullptr, up ? up + number : nullptr, gated, base, f->start + number,
                      f->escapes, static_cast<int>(f->dtype), static_cast<int>(f->act), f->threshold,
                      static_cast<float *>(f->out));
}

void add_noted(Stream *s, const Sum *f, const uint8_t *rows, int64_t number, int64_t n) {
  const double begun = now();
  add(f, rows, number, n);
  note(s, ARITHMETIC, f->unit, begun);
}

}  // namespace

extern "C" {

// Bytes of the structs, for ring.py and packed_sum.py to compare with theirs.
void hf_flash_stream_bytes(int64_t *out) {
  out[0] = sizeof(Unit), out[1] = sizeof(Slot), out[2] = sizeof(Event), out[3] = sizeof(Stream), out[4] = sizeof(Sum);
}

void hf_flash_stream_comes(Stream *s, int64_t unit) { comes(s, unit); }

// Wait for the chunk at `row` of a unit; *slot is the caller's until it is given back. 0: it is there; 1: its read
// failed, see `failed`; 2: a signal came, call again; 3: the caller holds every buffer.
int hf_flash_stream_take(Stream *s, int64_t unit, int64_t row, int64_t *slot) {
  Slot *taken;
  const int result = take(s, unit, row, &taken);
  if (result == DONE) *slot = taken - s->slots;
  return result;
}

void hf_flash_stream_give(Stream *s, int64_t slot) { give(s, s->slots + slot); }

// Wait for all reads and forget them. 0, or 2: a signal came, call again.
int hf_flash_stream_drop(Stream *s) {
  const Hold held = hold(s);
  return drop_all(s);
}

// Let the ring's thread start bursts from now on, if it has one.
void hf_flash_stream_watch(Stream *s) {
  if (s->helper || !s->ring) return;
  Helper *helper = new Helper;
  s->helper = helper;  // before it is watched: whoever is called looks there
  helper->watch = hf_flash_ring_watch(s->ring, landed_meanwhile, s);
  if (!helper->watch) s->helper = nullptr, delete helper;
}

// Returns once that thread has left the stream alone, for good.
void hf_flash_stream_unwatch(Stream *s) {
  Helper *helper = static_cast<Helper *>(s->helper);
  if (!helper) return;
  hf_flash_ring_unwatch(helper->watch, s);
  s->helper = nullptr;
  delete helper;
}

// Add neurons `number` .. `number + n`, which lie at `rows`, of x to `out`. Those of 0 come first, those that end at `n` last.
void hf_flash_sum_add(Sum *f, const void *x, void *out, const uint8_t *rows, int64_t number, int64_t n) {
  f->x = x, f->out = out;
  add(f, rows, number, n);
}

// Add a whole unit: what is pinned, then what is streamed. After 2 the next call goes on where this one was, x and out null.
// Returns as hf_flash_stream_take does.
int hf_flash_stream_sum(Stream *s, Sum *f, const void *x, void *out) {
  Counters &c = s->counters;
  const double begun = now(), waited = c.wait_s;
  int result = DONE;
  if (x) {
    f->x = x, f->out = out;
    comes(s, f->unit);
    if (f->n_pinned) add_noted(s, f, f->pinned, 0, f->n_pinned);
    f->row = f->n_pinned;
    c.neurons_wanted += f->n, c.neurons_hit += f->n_pinned;
  }
  while (f->row < f->n) {
    Slot *slot;
    result = take(s, f->unit, f->row, &slot);
    if (result) break;
    add_noted(s, f, slot->rows, slot->row, slot->n);
    f->row += slot->n, (slot->kept ? c.neurons_hit : c.neurons_read) += slot->n;
    give(s, slot);
  }
  c.compute_s += now() - begun - (c.wait_s - waited);
  note(s, STREAM, f->unit, begun);
  return result;
}

}  // extern "C"
