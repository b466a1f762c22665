// The register tile of a weight gradient along pixels, one function for each size.
#include "cpu/microkernels/tap_products.h"

#include <algorithm>
#include <utility>

namespace torchconv::cpu {
namespace {

// Terms of a tile by its filters: their sums, the vectors of the source and one of dz fill 32 or 16
// registers.
#if defined(__AVX512F__)
constexpr int kMostTerms[kMostFilters] = {9, 9, 8, 6, 4, 4, 3, 3};
#else
constexpr int kMostTerms[kMostFilters] = {9, 4, 3, 3, 2, 2, 1, 1};
#endif

template <typename A, int kFilters, int kTerms>
void multiply(const TapProducts<A>& p, int64_t first, const void* const* fetch) {
  using V = Vec<A>;
  using Register = typename V::Type;
  constexpr int64_t kL = V::kLanes;
  Register sum[kFilters][kTerms];
  const A* dz[kFilters];
  const A* src[kTerms];
#pragma GCC unroll 16
  for (int t = 0; t < kTerms; ++t) src[t] = p.src + p.offsets[first + t];
#pragma GCC unroll 16
  for (int f = 0; f < kFilters; ++f) {
    dz[f] = p.dz + f * p.dz_step;
#pragma GCC unroll 16
    for (int t = 0; t < kTerms; ++t) sum[f][t] = Register{};
  }
  const int64_t end = p.count * kL;
  for (int64_t at = 0; at < end; at += kL) {
    Register x[kTerms];
    __builtin_prefetch(*fetch++, 0, 2);
#pragma GCC unroll 16
    for (int t = 0; t < kTerms; ++t) x[t] = V::load(src[t] + at);
#pragma GCC unroll 16
    for (int f = 0; f < kFilters; ++f) {
      // Volatile: GCC would else load it again for each product, and loads are what is scarce.
      const Register gradient = *reinterpret_cast<const volatile Register*>(dz[f] + at);
#pragma GCC unroll 16
      for (int t = 0; t < kTerms; ++t) sum[f][t] += gradient * x[t];
    }
  }
  A* sums = p.sums + first * kL;
#pragma GCC unroll 16
  for (int f = 0; f < kFilters; ++f) {
#pragma GCC unroll 16
    for (int t = 0; t < kTerms; ++t) {
      A* to = sums + (f * p.terms + t) * kL;
      V::store(to, p.accumulate ? V::load(to) + sum[f][t] : sum[f][t]);
    }
  }
}

// The terms in even tiles.
template <typename A, int kFilters, int... kTerm>
void multiply_terms(const TapProducts<A>& p, std::integer_sequence<int, kTerm...>) {
  using Kernel = void (*)(const TapProducts<A>&, int64_t, const void* const*);
  static constexpr Kernel kTable[] = {multiply<A, kFilters, kTerm + 1>...};
  constexpr int64_t kMost = sizeof...(kTerm);
  const int64_t tiles = (p.terms + kMost - 1) / kMost;
  int64_t first = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t n = p.terms / tiles + (tile < p.terms % tiles ? 1 : 0);
    kTable[n - 1](p, first, p.fetch + std::min(tile * p.count, p.fetches));
    first += n;
  }
}

template <typename A, int... kFilter>
void multiply_filters(const TapProducts<A>& p, std::integer_sequence<int, kFilter...>) {
  using Kernel = void (*)(const TapProducts<A>&);
  static constexpr Kernel kTable[] = {[](const TapProducts<A>& all) {
    multiply_terms<A, kFilter + 1>(all, std::make_integer_sequence<int, kMostTerms[kFilter]>());
  }...};
  kTable[p.filters - 1](p);
}

}  // namespace

template <typename A>
void tap_products(const TapProducts<A>& products) {
  multiply_filters(products, std::make_integer_sequence<int, kMostFilters>());
}

template void tap_products(const TapProducts<float>&);
template void tap_products(const TapProducts<double>&);

}  // namespace torchconv::cpu
