// The scan of a certified gate's sketch. Reference: CertifiedGate.upper in gates/certified.py, which has the bound.
#include "common.h"

namespace {

struct Scan {
  const float *x;          // [T, groups * 64], zero-padded
  const float *xx, *xn;    // [T, groups]: squared norms and norms per group, from above
  const float *size;       // [T]: |x|, infinite where the token is not judged
  int64_t T, groups;
  const uint8_t *codes;    // [n, groups * 8 * bits]
  const uint16_t *step, *error;  // [n, groups] bf16
  const float *slack, *bias;     // [n]; what arithmetic may add per |x|; bias may be null
  int bits;
  float log_delta, gamma, unit, threshold;  // ln(1/delta)/2, or < 0 for the deterministic bound alone
  uint8_t *wanted, *recent;      // [n] any token wants it; the last token does
};

constexpr int GROUP = 64;

INLINE void unpack(const uint8_t *codes, int bits, float *out, int64_t groups) {
  if (bits == 8) {
    for (int64_t j = 0; j < groups * GROUP; j++) out[j] = static_cast<float>(static_cast<int>(codes[j]) - 128);
    return;
  }
  const int half = 1 << (bits - 1);
  if (bits == 4) {
    for (int64_t j = 0; j < groups * GROUP / 2; j++) {
      out[2 * j] = static_cast<float>((codes[j] & 15) - half);
      out[2 * j + 1] = static_cast<float>((codes[j] >> 4) - half);
    }
    return;
  }
  const uint64_t mask = (1u << bits) - 1;
  for (int64_t e = 0; e < groups * GROUP / 8; e++) {
    uint64_t word = 0;
    for (int b = 0; b < bits; b++) word |= static_cast<uint64_t>(codes[e * bits + b]) << (8 * b);
    for (int k = 0; k < 8; k++) out[e * 8 + k] = static_cast<float>(static_cast<int>((word >> (k * bits)) & mask) - half);
  }
}

CLONES void scan_range(const Scan *s, int64_t begin, int64_t end, float *row) {
  const int64_t groups = s->groups, bytes = groups * 8 * s->bits;
  for (int64_t i = begin; i < end; i++) {
    unpack(s->codes + i * bytes, s->bits, row, groups);
    const uint16_t *step = s->step + i * groups, *error = s->error + i * groups;
    bool any = false, last = false;
    for (int64_t t = 0; t < s->T; t++) {
      const float *x = s->x + t * groups * GROUP;
      float score = 0, squares = 0, sure = 0;
      for (int64_t g = 0; g < groups; g++) {
        float dot = 0;
        for (int j = 0; j < GROUP; j++) dot += row[g * GROUP + j] * x[g * GROUP + j];
        const float sg = from_bf16(step[g]);
        score += sg * dot;
        squares += sg * sg * s->xx[t * groups + g];
        sure += from_bf16(error[g]) * s->xn[t * groups + g];
      }
      float bound = sure;
      if (s->log_delta >= 0) {
        const float h = std::sqrt(s->log_delta * squares);
        bound = h < sure ? h : sure;
      }
      float v = score + bound * (1 + 1.0f / 4096) + s->size[t] * s->slack[i];
      v += s->unit * std::fabs(v);
      if (s->bias) {
        v += s->bias[i] + s->gamma * std::fabs(s->bias[i]);
        v += s->unit * std::fabs(v);
      }
      last = !(v <= s->threshold);  // NaN wants every neuron
      any |= last;
    }
    s->wanted[i] = any;
    s->recent[i] = last;
  }
}

}  // namespace

extern "C" {

// Marks the neurons that cannot be proved silent; see gates/certified.py for the bound.
void hf_flash_gate_scan(const float *x, const float *xx, const float *xn, const float *size, int64_t T, int64_t groups,
                        int64_t n, const uint8_t *codes, const uint16_t *step, const uint16_t *error, const float *slack,
                        const float *bias, int bits, float log_delta, float gamma, float unit, float threshold,
                        uint8_t *wanted, uint8_t *recent) {
  Scan s{x, xx, xn, size, T, groups, codes, step, error, slack, bias, bits, log_delta, gamma, unit, threshold, wanted, recent};
  int threads = max_threads();
  if (n * groups < 4096 * threads) threads = 1;
  std::vector<float> rows(static_cast<size_t>(threads) * groups * GROUP);
  in_parallel(threads, [&](int me) {
    scan_range(&s, n * me / threads, n * (me + 1) / threads, rows.data() + static_cast<size_t>(me) * groups * GROUP);
  });
}

}  // extern "C"
