// The scan of a certified gate's sketch. Reference: CertifiedGate.upper in gates/certified.py, which has the bound.
#include "common.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int GROUP = 64, MAX_TOKENS = 8;

struct Sketch {
  const uint8_t *nibbles;      // [n, groups * 32]: upper 4 bits of 64 codes; byte j has those of codes j and j + 32
  const uint64_t *planes[4];   // [n, groups] each: the next bits; bit j is that of code j
  const uint16_t *step;        // [n, groups] bf16: the step of 4 bits
  const float *norm, *bias;    // [n]; bias may be null
  int64_t groups;
  int bits;
};

struct Inputs {
  int64_t T;
  const float *x;                                // [T, groups * 64], zero-padded
  const float *constant, *squares, *norms;       // [T, groups]: what codes leave out; |x_g|^2 and |x_g| from above
  const float *size;                             // [T]: |x|, infinite where the token is not judged
  float log_term, gamma, per_norm, tiny, unit, threshold;  // log_term < 0: the deterministic bound alone
};

INLINE uint64_t word(const uint64_t *plane, int64_t at) {
  uint64_t bits;
  std::memcpy(&bits, plane + at, sizeof bits);
  return bits;
}

INLINE uint8_t judge(const Sketch *s, const Inputs *in, int64_t i, int64_t t, float score, float squares, float sure) {
  const float fine = 1.0f / static_cast<float>(1 << (s->bits - 4));  // steps are those of 4 bits
  float bound = 4 * sure * fine;
  if (in->log_term >= 0) {
    const float h = std::sqrt(in->log_term * squares) * fine;
    bound = h < bound ? h : bound;
  }
  float v = score * fine + bound * (1 + 1.0f / 4096) + in->size[t] * (s->norm[i] * in->per_norm + in->tiny);
  v += in->unit * std::fabs(v);
  if (s->bias) {
    v += s->bias[i] + in->gamma * std::fabs(s->bias[i]);
    v += in->unit * std::fabs(v);
  }
  return !(v <= in->threshold);  // NaN wants every neuron
}

}  // namespace

#define LOOPS "gate_loops.h"
#include "each_level.h"

namespace {

template <int BITS> void scan(const Sketch *s, const Inputs *in, int64_t begin, int64_t end, uint8_t *wanted) {
  CALL(scan<BITS>, s, in, begin, end, wanted);
}

}  // namespace

extern "C" {

// ids [n] <- the neurons that cannot be proved silent for one of T tokens, sorted; recent [n] <- 1 where the last token
// wants it. `offset` [groups * 64] is what a code of 0 stands for, in steps of its own. Returns how many ids there are.
int64_t hf_flash_gate(const float *x, int64_t T, int64_t d, int64_t n, const uint8_t *nibbles, const uint64_t *plane5,
                      const uint64_t *plane6, const uint64_t *plane7, const uint64_t *plane8, const uint16_t *step,
                      const float *norm, const float *offset, const float *bias, int bits, float log_term, float gamma,
                      float per_norm, float tiny, float unit, float threshold, float least, float most, int64_t *ids,
                      uint8_t *recent) {
  const int64_t groups = (d + GROUP - 1) / GROUP;
  const Sketch s{nibbles, {plane5, plane6, plane7, plane8}, step, norm, bias, groups, bits};
  std::vector<float> padded(static_cast<size_t>(T * groups * GROUP), 0.0f), sums(static_cast<size_t>(3 * T * groups)),
      size(static_cast<size_t>(T));
  float *constant = sums.data(), *squares = constant + T * groups, *norms = squares + T * groups;
  for (int64_t t = 0; t < T; t++) {
    float *to = padded.data() + t * groups * GROUP, largest = 0, all = 0;
    std::memcpy(to, x + t * d, static_cast<size_t>(d) * sizeof(float));
    bool finite = true;
    for (int64_t j = 0; j < d; j++) {
      const float a = std::fabs(to[j]);
      largest = a > largest ? a : largest;
      finite &= a <= most;  // false for NaN
    }
    for (int64_t g = 0; g < groups; g++) {
      float c = 0, q = 0;
      for (int j = 0; j < GROUP; j++) {
        const float v = to[g * GROUP + j];
        c += v * offset[g * GROUP + j];
        q += v * v;
      }
      q *= 1 + 1.0f / 65536;
      constant[t * groups + g] = c, squares[t * groups + g] = q, norms[t * groups + g] = std::sqrt(q);
      all += q;
    }
    size[static_cast<size_t>(t)] = finite && (largest == 0 || largest >= least) ? std::sqrt(all) : INFINITY;
  }
  const Inputs in{T, padded.data(), constant, squares, norms, size.data(), log_term, gamma, per_norm, tiny, unit, threshold};
  const int threads = n * groups < 4096 * max_threads() ? 1 : max_threads();
  in_parallel(threads, [&](int me) {
    const int64_t begin = n * me / threads, end = n * (me + 1) / threads;
    switch (bits) {
      case 4: return scan<4>(&s, &in, begin, end, recent);
      case 5: return scan<5>(&s, &in, begin, end, recent);
      case 6: return scan<6>(&s, &in, begin, end, recent);
      case 7: return scan<7>(&s, &in, begin, end, recent);
      default: return scan<8>(&s, &in, begin, end, recent);
    }
  });
  int64_t count = 0;
  for (int64_t i = 0; i < n; i++) {
    ids[count] = i;
    count += recent[i] & 1;
    recent[i] >>= 1;
  }
  return count;
}

}  // extern "C"
