// Half-open ranges of int64_t, and divisions that round.
#pragma once

#include <cstdint>

namespace torchconv {

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
  int64_t size() const { return end - begin; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b > 0); }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

}  // namespace torchconv
