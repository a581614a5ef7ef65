// What the files of this folder call of each other besides the gate, and what Python calls as a module; the definitions
// include it too, and so are compared.
#pragma once
#include <chrono>
#include <cstdint>

// Results of calls; native.py has the same. SIGNAL, of those that wait: its handler has to run, then call again.
enum { DONE = 0, FAILED = 1, SIGNAL = 2, NO_ROOM = 3 };

struct Counters {  // FlashStats has their meaning, stats.py the same fields; they only grow
  int64_t neurons_wanted, neurons_hit, neurons_read, neurons_early, neurons_fired, bytes_read, n_reads, cache_bytes;
  double gate_s, wait_s, compute_s;
};

static inline double now() {  // seconds
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Memory that is looked at next, in that order.
struct Ahead {
  const uint8_t *from[3] = {};
  int64_t n_bytes[3] = {};
};

struct AttentionStep;
struct LayerCall;
struct Step;
struct Stream;
struct Sum;

// What a step leaves to be done while others compute: step.cpp.
struct Chores {
  Step *step = nullptr;  // null: nothing
  bool looks = false;    // guess what the layer behind will want, and read it
  int dtype = 0;
  int64_t n_taken = 0;
};

extern "C" {
void hf_flash_attend(const uint16_t *q, const uint16_t *k, const uint16_t *v, int64_t q_batch, int64_t q_head,
                     int64_t k_batch, int64_t k_head, int64_t k_token, int64_t v_batch, int64_t v_head, int64_t v_token,
                     int64_t B, int64_t H, int64_t group, int64_t n, int64_t D, float scale, uint16_t *out);
void hf_flash_attention_step(AttentionStep *s, const uint16_t *x, const uint16_t *cos, const uint16_t *sin,
                             uint16_t *keys, uint16_t *values, int64_t kv_head, int64_t n, const uint16_t *q_bias,
                             const uint16_t *k_bias, const uint16_t *v_bias, const uint16_t *o_bias, uint16_t *out,
                             void (*first)(void *), void *who);
void hf_flash_attention_looks_at(const AttentionStep *s, Ahead *out);
void hf_flash_norm(const uint16_t *x, int64_t d, const uint16_t *weight, const uint16_t *bias, float eps, uint16_t *out);
int hf_flash_layers(LayerCall **at);
int hf_flash_step(Step *s, const void *x, int64_t T, int dtype, void *y, int looks, bool *signalled, const Ahead *ahead,
                  Chores *later);
void hf_flash_chores(const Chores *chores);
int hf_flash_stream_sum(Stream *s, Sum *f, const void *x, void *out);
void hf_flash_tight_linear(const uint8_t *tiles, int64_t n, int64_t E, const uint8_t *base, const int32_t *start,
                           const uint8_t *escapes, const void *x, const void *bias, int64_t T, int dtype, void *out);
void hf_flash_packed_linear(const uint8_t *rows, int64_t stride, int64_t n, int64_t E, int base, const int32_t *start,
                            const uint32_t *escapes, const void *x, const void *bias, int64_t T, int dtype, void *out);
void hf_flash_ordered_matvec(const uint8_t *rows, int64_t stride, int64_t n, int64_t E, int base, const int32_t *start,
                             const uint32_t *escapes, const uint16_t *x, const uint16_t *bias, uint16_t *out);
void *hf_flash_ring_submit(void *ring, int64_t n, const int *fds, const int64_t *offsets, const int64_t *need,
                           const int64_t *first, const uint64_t *addresses, const int64_t *lengths);
void *hf_flash_ring_submit_rows(void *ring, void *batch, int fd, int64_t start, int64_t row_bytes, const int64_t *rows,
                                int64_t n, uint64_t base, const int64_t *slots, int64_t max_gap, int64_t max_rows,
                                uint64_t sink, int64_t *n_bytes, int64_t *n_reads);
int hf_flash_batch_wait(void *ring, void *batch);
int hf_flash_batch_ready(void *ring, void *batch);
void *hf_flash_ring_watch(void *ring, void (*call)(void *), void *who);
void hf_flash_ring_unwatch(void *watch, void *who);
void hf_flash_batch_free(void *batch);
int64_t hf_flash_sparse_ffn(const float *x, int64_t T, int64_t d, int64_t d_out, const uint8_t *rows, int64_t stride,
                            const int64_t *slots, int64_t n, const float *gate_bias, const float *up_bias, int gated,
                            int dtype, int round_dtype, int act, float threshold, float *out);
int64_t hf_flash_packed_ffn(const float *x, int64_t T, int64_t d, int64_t d_out, const uint8_t *rows, int64_t stride,
                            const int64_t *slots, const int64_t *ids, int64_t n, const float *gate_bias,
                            const float *up_bias, int gated, int base, const int32_t *start, const uint32_t *escapes,
                            int round_dtype, int act, float threshold, float *out);
void hf_flash_ordered_ffn(const uint8_t *rows, int64_t stride, int64_t number, int64_t n, int64_t d, int64_t d_out,
                          int gated, int base, const int32_t *start, const uint32_t *escapes, const uint16_t *x,
                          const uint16_t *table, const uint16_t *gate_bias, const uint16_t *up_bias,
                          const uint16_t *down_bias, uint16_t *h, float *sums, uint16_t *out);
}
