// What the kernels share: number formats, multiversioning, threads.
//
// Pointers and sizes in, nothing of torch's C++ ABI, no Python in the loops. Called through ctypes, which releases the
// GIL. Threads are OpenMP's, resolved at load time from the runtime that torch brought along, so both share one pool
// and torch.set_num_threads() governs both. Loops are plain C++ that the compiler vectorizes, once per instruction set
// (function multiversioning), so one binary runs everywhere. Each function has its torch reference in Python;
// tests/test_native.py compares them.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

// What the calling thread does before it helps.
struct First {
  void (*call)(void *) = nullptr;
  void *who = nullptr;

  void operator()() const {
    if (call) call(who);
  }
};

namespace {

// Ask for memory that is needed soon, in the L2 cache: on its way to the L1 it would hold one of that cache's few places
// for lines that are missing. Loops that are faster with those all the same say so (ffn.cpp, tight_loops.h; docs/log.md).
INLINE void fetch(const void *from) { __builtin_prefetch(from, 0, 2); }

enum DType { F32 = 0, F16 = 1, BF16 = 2 };

INLINE float from_bf16(uint16_t v) {
  uint32_t bits = static_cast<uint32_t>(v) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

INLINE float from_f16(uint16_t v) {  // finite values; four operations on integers, so that every compiler vectorizes it
  const uint32_t wide = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(v)));  // the sign, all the way up
  const uint32_t bits = (wide << 13) & 0x8fffe000u;
  float out;
  std::memcpy(&out, &bits, 4);
  return out * 0x1p112f;  // moves the exponent from half's bias to float's, subnormals included
}

INLINE float round_bf16(float v) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return v;
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

INLINE float round_f16(float v) {  // to nearest, ties to even; overflow to infinity as the dense model has it
  const float a = std::fabs(v);
  if (!(a < 65520.0f)) return a != a ? v : std::copysign(INFINITY, v);
  if (a < 0x1p-14f) return std::copysign(std::rint(a * 0x1p24f) * 0x1p-24f, v);  // subnormal: multiples of 2^-24
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = (bits + 0xfffu + ((bits >> 13) & 1u)) & 0xffffe000u;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

INLINE float any_f16(uint16_t v) {  // infinite and NaN too
  if ((v & 0x7c00) != 0x7c00) return from_f16(v);
  uint32_t bits = static_cast<uint32_t>(v & 0x8000u) << 16 | 0x7f800000u | static_cast<uint32_t>(v & 0x3ffu) << 13;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

INLINE uint16_t bits_bf16(float v) {  // of a value that is a bfloat16
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return static_cast<uint16_t>(bits >> 16 | (v != v ? 0x40u : 0u));  // NaN must not become infinite
}

INLINE uint16_t bits_f16(float v) {  // of a value that is a float16
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (v != v) return static_cast<uint16_t>(sign | 0x7e00u);
  const float a = std::fabs(v);
  if (a >= 65536.0f) return static_cast<uint16_t>(sign | 0x7c00u);
  if (a < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint16_t>(a * 0x1p24f));
  return static_cast<uint16_t>(sign | (((bits >> 13) & 0x3ffffu) - (112u << 10)));
}

INLINE float round_to(float v, int dtype) {
  if (dtype == BF16) return round_bf16(v);
  if (dtype == F16) return round_f16(v);
  return v;
}

// Floats that begin a line of the cache, zero at first: a vector that lies in two lines costs twice as much.
class Floats {
 public:
  explicit Floats(int64_t n) : lines(static_cast<size_t>(n / 16 + 1)) {}
  float *data() { return lines.data()->numbers; }
  const float *data() const { return lines.data()->numbers; }

 private:
  struct alignas(64) Line {
    float numbers[16] = {};
  };
  std::vector<Line> lines;
};

inline std::vector<float> to_float(const void *x, int64_t n, int dtype) {
  std::vector<float> out(static_cast<size_t>(n));
  const uint16_t *half = static_cast<const uint16_t *>(x);
  if (dtype == F32 && n) std::memcpy(out.data(), x, static_cast<size_t>(n) * 4);
  for (int64_t i = 0; i < n && dtype != F32; i++)
    out[static_cast<size_t>(i)] = dtype == BF16 ? from_bf16(half[i]) : any_f16(half[i]);
  return out;
}

inline void from_float(const float *values, int64_t n, int dtype, void *out) {  // rounded
  if (dtype == F32) std::memcpy(out, values, static_cast<size_t>(n) * 4);
  uint16_t *half = static_cast<uint16_t *>(out);
  for (int64_t i = 0; i < n && dtype == BF16; i++) half[i] = bits_bf16(round_bf16(values[i]));
  for (int64_t i = 0; i < n && dtype == F16; i++) half[i] = bits_f16(round_f16(values[i]));
}

// Which of the namespaces v4 (AVX-512), v3 (AVX2) and plain runs here. Loops in intrinsics are included once for each.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
inline int level() {
  static const int found = [] {
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
    const char *most = std::getenv("HF_FLASH_SIMD");  // for tests: "avx2" or "plain"
    const int limit = !most ? 4 : !std::strcmp(most, "avx2") ? 3 : !std::strcmp(most, "plain") ? 2 : 4;
    const int best = v3 && v4 ? 4 : v3 ? 3 : 2;
    return best < limit ? best : limit;
  }();
  return found;
}
#define CALL(NAME, ...) \
  (level() == 4 ? v4::NAME(__VA_ARGS__) : level() == 3 ? v3::NAME(__VA_ARGS__) : plain::NAME(__VA_ARGS__))
#else
#define CALL(NAME, ...) plain::NAME(__VA_ARGS__)
#endif

inline int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Of the cache that cores share, or a guess where the system does not tell.
inline int64_t last_cache_bytes() {
  long found = 0;
#ifdef _SC_LEVEL3_CACHE_SIZE
  found = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
  return found > 0 ? found : 8 << 20;
}

// work(part) for every part, on as many threads; all parts are done even where fewer threads are given.
template <class F> void in_parallel(int parts, F work) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(parts) schedule(static, 1)
#endif
  for (int part = 0; part < parts; part++) work(part);
}

// work(begin, end) for blocks of n items, taken by whoever is free: a core that serves interrupts gets fewer.
template <class F> void in_blocks(int threads, int64_t n, int64_t block, F work) {
  std::atomic<int64_t> next{0};
  in_parallel(threads, [&](int) {
    for (int64_t begin; (begin = next.fetch_add(block)) < n;) work(begin, begin + block < n ? begin + block : n);
  });
}

// work(i) for n items: each thread takes its own share, from the front, and then of the others' what is left.
template <class F> void in_shares(int threads, int64_t n, First first, F work) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares(static_cast<size_t>(threads));
  for (int i = 0; i < threads; i++) {
    Share &share = shares[static_cast<size_t>(i)];
    share.next = n * i / threads, share.end = n * (i + 1) / threads;
  }
  in_parallel(threads, [&](int me) {
    if (me == 0) first();
    for (int i = 0; i < threads; i++) {
      Share &share = shares[static_cast<size_t>((me + i) % threads)];
      for (int64_t k; (k = share.next.fetch_add(1)) < share.end;) work(k);
    }
  });
}

}  // namespace
