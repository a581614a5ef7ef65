// The certified gate, for those that go on while it scans.
#pragma once
#include <cstdint>

extern "C" {

constexpr uint8_t LAST = 1, PASSED_OVER = 255;  // marks

constexpr int N_DIRECTIONS = 16;

// What is known of the errors of a sketch: gates/known.py. The numbers of the upper 4 bits, and those of all bits.
struct Known {
  const uint16_t *directions;           // [N_DIRECTIONS, groups * 64] bf16
  const int8_t *upper, *all;            // [n, N_DIRECTIONS]
  const float *upper_step, *all_step;   // [n]
};

typedef void (*Found)(void *arg, int64_t n, int64_t end);  // see gate.cpp

int64_t hf_flash_gate(const float *x, int64_t T, int64_t d, int64_t n, const uint8_t *nibbles, const uint64_t *plane5,
                      const uint64_t *plane6, const uint64_t *plane7, const uint64_t *plane8, const uint16_t *step,
                      const float *norm, const float *offset, const Known *known, const float *bias, int bits, float tail, float gamma,
                      float per_norm, float tiny, float unit, float threshold, float least, float most, int64_t *ids,
                      uint8_t *marks, float upper_tail, float *near, const int32_t *list, Found found, void *arg);
}
