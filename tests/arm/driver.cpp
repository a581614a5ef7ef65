// Runs one kernel on arrays from a file, for test_arm.py: on a processor that this machine only imitates.
//
// driver FUNCTION IN OUT: IN has its arguments in order, each an int64 n and, where n >= 0, n bytes of an array (none for
// null); else -1 or -2 and 8 bytes, an int64 or a double. OUT gets what the function returns and the arrays as it left them.
#include <cstdio>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "../../hf_flash/_native/calls.h"
#include "../../hf_flash/_native/gate.h"

extern "C" {
int64_t hf_flash_pack(const uint16_t *, int64_t, int64_t, int64_t, int, uint8_t *, int64_t, int32_t *, uint32_t *);
void hf_flash_unpack(const uint8_t *, int64_t, const int64_t *, const int64_t *, int64_t, int64_t, int, const int32_t *,
                     const uint32_t *, int64_t, int64_t, uint16_t *, int64_t);
}

struct Argument {
  int64_t whole = 0;
  double real = 0;
  std::vector<char> array;
};

static std::vector<Argument> arguments;

template <class T> T get(size_t i) {
  Argument &a = arguments.at(i);
  if constexpr (std::is_pointer_v<T>) return a.array.empty() ? nullptr : reinterpret_cast<T>(a.array.data());
  else if constexpr (std::is_floating_point_v<T>) return static_cast<T>(a.real);
  else return static_cast<T>(a.whole);
}

template <class R, class... A, size_t... I> int64_t call(R (*function)(A...), std::index_sequence<I...>) {
  if constexpr (std::is_void_v<R>) return function(get<A>(I)...), 0;
  else return static_cast<int64_t>(function(get<A>(I)...));
}

template <class R, class... A> int64_t call(R (*function)(A...)) {
  return call(function, std::index_sequence_for<A...>());
}

int main(int, char **argv) {
  FILE *in = std::fopen(argv[2], "rb"), *out = std::fopen(argv[3], "wb");
  for (int64_t n; std::fread(&n, 8, 1, in) == 1;) {
    Argument a;
    if (n >= 0) a.array.resize(static_cast<size_t>(n));
    if (std::fread(n == -1 ? static_cast<void *>(&a.whole) : n == -2 ? &a.real : static_cast<void *>(a.array.data()), 1,
                   n < 0 ? 8 : static_cast<size_t>(n), in) != (n < 0 ? 8 : static_cast<size_t>(n)))
      return 2;
    arguments.push_back(std::move(a));
  }
  const std::string name = argv[1];
  const int64_t result = name == "sparse_ffn" ? call(hf_flash_sparse_ffn) : name == "packed_ffn" ? call(hf_flash_packed_ffn)
                       : name == "packed_linear" ? call(hf_flash_packed_linear) : name == "pack" ? call(hf_flash_pack)
                       : name == "unpack" ? call(hf_flash_unpack) : call(hf_flash_gate);
  std::fwrite(&result, 8, 1, out);
  for (const Argument &a : arguments) std::fwrite(a.array.data(), 1, a.array.size(), out);
  return std::fclose(out);
}
