// Reads x where a max or min pooling selected: the adjoint of its backward, for derivatives of
// derivatives. A copy of single elements, so only their size matters, not their type.
//
// Selections come from the caller and are not trusted: one that names no element of the image
// reads as 0, the same as a window that selected nothing.
#include <cstdint>

#include "cpu/pool2d.h"
#include "cpu/pool_window.h"

namespace torchconv::cpu {
namespace {

template <typename E, typename O>
class Gather {
 public:
  Gather(const PoolProblem& p, const E* x, const O* selected, E* y)
      : p_(p), x_(x), selected_(selected), y_(y), pixels_(runs_channels_last(p)) {
    // Divisions by S are looked up where the window is small enough.
    if (p.R * p.S <= kTable) {
      for (int64_t r = 0; r < p.R; r++) {
        for (int64_t s = 0; s < p.S; s++) {
          rows_[r * p.S + s] = static_cast<uint8_t>(r);
          columns_[r * p.S + s] = static_cast<uint8_t>(s);
        }
      }
    }
  }

  void run(const Parallel& pool) const {
    const int64_t lines = pixels_ ? p_.N * p_.P : p_.N * p_.C * p_.P;
    const int64_t elements = pixels_ ? p_.Q * p_.C : p_.Q;
    parallel_for(pool, 0, lines, pool_grain(elements * 16), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) line(i / p_.P, i % p_.P);
    });
  }

 private:
  static constexpr int64_t kTable = 255;
  static constexpr bool kIndex = sizeof(O) == 8;

  // Output row out_p of plane or image n.
  void line(int64_t n, int64_t out_p) const {
    const int64_t channels = pixels_ ? p_.C : 1;
    const E* image = x_ + n * p_.H * p_.W * channels;
    int64_t out = (n * p_.P + out_p) * p_.Q * channels;
    for (int64_t q = 0; q < p_.Q; q++) {
      for (int64_t c = 0; c < channels; c++, out++) {
        const int64_t at = position(selected_[out], out_p, q);
        y_[out] = at < 0 ? E{0} : image[at * channels + c];
      }
    }
  }

  // h * W + w of the selected element, or -1.
  int64_t position(O selected, int64_t out_p, int64_t q) const {
    if (selected == kNoOffset<O>) return -1;
    const int64_t value = static_cast<int64_t>(selected);
    if constexpr (kIndex) {
      return value < p_.H * p_.W && value >= 0 ? value : -1;
    } else {
      if (value < 0 || value >= p_.R * p_.S) return -1;
      const bool table = sizeof(O) == 1 && p_.R * p_.S <= kTable;
      const int64_t r = table ? rows_[value] : value / p_.S;
      const int64_t s = table ? columns_[value] : value % p_.S;
      const int64_t top = out_p * p_.stride_h - p_.pad_h;
      const int64_t left = q * p_.stride_w - p_.pad_w;
      if ((r > 0 && r > (p_.H - 1 - top) / p_.dilation_h) ||
          (s > 0 && s > (p_.W - 1 - left) / p_.dilation_w))
        return -1;
      const int64_t h = top + r * p_.dilation_h;
      const int64_t w = left + s * p_.dilation_w;
      return h >= 0 && h < p_.H && w >= 0 && w < p_.W ? h * p_.W + w : -1;
    }
  }

  const PoolProblem& p_;
  const E* x_;
  const O* selected_;
  E* y_;
  bool pixels_;
  uint8_t rows_[kTable], columns_[kTable];
};

template <typename E>
void gather(const PoolProblem& p, Selected kind, const void* x, const void* selected, void* y,
            const Parallel& pool) {
  const E* from = static_cast<const E*>(x);
  E* to = static_cast<E*>(y);
  switch (kind) {
    case Selected::kOffset8:
      return Gather<E, uint8_t>(p, from, static_cast<const uint8_t*>(selected), to).run(pool);
    case Selected::kOffset16:
      return Gather<E, uint16_t>(p, from, static_cast<const uint16_t*>(selected), to).run(pool);
    case Selected::kOffset32:
      return Gather<E, int32_t>(p, from, static_cast<const int32_t*>(selected), to).run(pool);
    case Selected::kIndex64:
      return Gather<E, int64_t>(p, from, static_cast<const int64_t*>(selected), to).run(pool);
  }
}

}  // namespace

void select_pool2d_gather(const PoolProblem& p, Selected kind, const void* x, const void* selected,
                          void* y, const Parallel& pool) {
  if (p.N == 0 || p.C == 0 || p.P == 0 || p.Q == 0) return;
  switch (p.dtype) {
    case DType::kUInt8:
    case DType::kInt8:
      return gather<uint8_t>(p, kind, x, selected, y, pool);
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kInt16:
    case DType::kUInt16:
      return gather<uint16_t>(p, kind, x, selected, y, pool);
    case DType::kFloat32:
    case DType::kInt32:
      return gather<uint32_t>(p, kind, x, selected, y, pool);
    case DType::kFloat64:
    case DType::kInt64:
      return gather<uint64_t>(p, kind, x, selected, y, pool);
  }
}

}  // namespace torchconv::cpu
