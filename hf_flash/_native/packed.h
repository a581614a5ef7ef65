// How rows of 12 bits a weight are described to the loops: see packed.cpp.
#pragma once
#include "common.h"

namespace {

constexpr int64_t BLOCK = 64;  // weights whose 64 codes lie in 32 bytes: byte j has those of weights j and j + 32

struct alignas(16) Tables {  // by code: the exponent's upper 7 bits, and its lowest as the top bit of the lower byte
  uint8_t high[16], low[16];
};

struct Packed {  // how rows of E weights are packed
  int64_t E;
  uint32_t base;
  const int32_t *start;     // [n_rows + 1] where a row's escapes begin
  const uint32_t *escapes;  // position << 16 | value
  Tables tables;

  Packed(int64_t n, int exponent, const int32_t *begin, const uint32_t *list)
      : E(n), base(static_cast<uint32_t>(exponent)), start(begin), escapes(list) {
    for (uint32_t c = 0; c < 16; c++) {
      const uint32_t e = c ? base + c : 0;
      tables.high[c] = static_cast<uint8_t>(e >> 1), tables.low[c] = static_cast<uint8_t>((e & 1) << 7);
    }
  }
};

}  // namespace
