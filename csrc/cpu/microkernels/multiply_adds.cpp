#include "cpu/microkernels/multiply_adds.h"

#include "cpu/microkernels/direct_tile.h"
#include "cpu/microkernels/pair_product.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {
namespace {

// More than the products that are under way at once (latency by units, at most 10), and with two
// operands no more than the 16 registers of AVX2.
constexpr int kSums = 12;

// add(sum) for each sum in turn. They begin as what GCC does not know to be alike, and one lane of
// what they come to is written, for which all must be computed.
template <typename Register, typename F>
TORCHCONV_INLINE void add_rounds(int64_t rounds, F&& add) {
  Register sums[kSums];
  unroll<kSums>([&](auto i) TORCHCONV_INLINE_LAMBDA {
    sums[i] = Register{};
    keep_in_register(sums[i]);
  });
  for (int64_t round = 0; round < rounds; ++round)
    unroll<kSums>([&](auto i) TORCHCONV_INLINE_LAMBDA { add(sums[i]); });
  Register total{};
  unroll<kSums>([&](auto i) TORCHCONV_INLINE_LAMBDA { total += sums[i]; });
  [[maybe_unused]] const volatile auto written = total[0];
}

template <typename T>
int64_t multiply_adds(int64_t rounds) {
  using V = Vec<T>;
  typename V::Type half = V::broadcast(T{0.5}), one = V::broadcast(T{1});
  keep_in_register(half);
  keep_in_register(one);
  add_rounds<typename V::Type>(
      rounds, [&](auto& sum) TORCHCONV_INLINE_LAMBDA { sum = sum * half + one; });  // tends to 2
  return rounds * kSums * V::kLanes;
}

}  // namespace

int64_t multiply_adds_float32(int64_t rounds) { return multiply_adds<float>(rounds); }
int64_t multiply_adds_float64(int64_t rounds) { return multiply_adds<double>(rounds); }

int64_t multiply_adds_pairs([[maybe_unused]] int64_t rounds) {
#if defined(TORCHCONV_PAIR_PRODUCTS)
  using Register = PairProduct::Register;
  if (!has_pair_products()) return 0;
  const Register x = Vec<float>::broadcast(1e-3F);
  // PairProduct::add, which only functions compiled for the instruction can have.
  add_rounds<Register>(rounds, [&](Register& sum) TORCHCONV_INLINE_LAMBDA {
    asm("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(x));
  });
  return rounds * kSums * 2 * Vec<float>::kLanes;
#else
  return 0;
#endif
}

}  // namespace torchconv::cpu
