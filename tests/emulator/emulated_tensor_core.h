// The instructions of csrc/cuda/tensor_core.h in plain C++, with the fragment layouts of the PTX
// manual and the strictest reading of what hardware may do: a cp.async lands only when its group is
// waited for, and a sum of mma.sync is truncated, not rounded.
#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include "cuda/element.h"

namespace torchconv::cuda {

using SharedAddress = uintptr_t;

namespace emulated {

struct Copy {
  SharedAddress to;
  unsigned char bytes[16];
  size_t count;
};
using CopyGroup = std::vector<Copy>;
struct Copies {
  CopyGroup open;
  std::vector<CopyGroup> committed;
};
inline Copies& copies_of_this_thread() {
  static Copies all[1024];
  return all[threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)];
}

template <typename T>
T value_at(SharedAddress address) {
  T value;
  std::memcpy(&value, reinterpret_cast<const void*>(address), sizeof value);
  return value;
}

struct Matrices {
  SharedAddress row;
  uint32_t word[4];
};

template <bool Transposed>
void load_matrices(Matrices* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      uint32_t& word = lanes[lane]->word[i];
      const auto row = [&](int r) {
        const SharedAddress address = lanes[8 * i + r]->row;
        if (address % 16 != 0) emulator::fail("ldmatrix: a row is not aligned to 16 bytes");
        return address;
      };
      if constexpr (Transposed) {
        const auto half = [&](int r) {
          return uint32_t{value_at<uint16_t>(row(r) + static_cast<SharedAddress>(2 * g))};
        };
        word = half(2 * t) | half(2 * t + 1) << 16;
      } else {
        word = value_at<uint32_t>(row(g) + static_cast<SharedAddress>(4 * t));
      }
    }
  }
}

struct Fragments {
  uint32_t a[4], b[2];
  float sums[4];
};

// Element i of a word, which holds 4 / sizeof(T).
template <typename T>
double element_of(uint32_t word, int i) {
  if constexpr (sizeof(T) == 4)
    return emulator::bits<float>(word & ~0x1FFFu);  // the instruction ignores the lower bits
  else
    return to_wide(emulator::bits<T>(static_cast<uint16_t>(i == 0 ? word : word >> 16)));
}

inline float truncated(double sum) {
  const float rounded = static_cast<float>(sum);
  const bool grown = std::fabs(double{rounded}) > std::fabs(sum) && std::isfinite(sum);
  return grown ? std::nextafterf(rounded, 0.0f) : rounded;
}

template <typename T>
void multiply(Fragments* const* lanes) {
  constexpr int kElements = 4 / static_cast<int>(sizeof(T)), kHalf = 4 * kElements;
  double a[16][2 * kHalf], b[2 * kHalf][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half)
      for (int e = 0; e < kElements; ++e) {
        const int k = half * kHalf + t * kElements + e;
        a[g][k] = element_of<T>(lanes[lane]->a[2 * half], e);
        a[g + 8][k] = element_of<T>(lanes[lane]->a[2 * half + 1], e);
        b[k][g] = element_of<T>(lanes[lane]->b[half], e);
      }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = lanes[lane]->sums[i];
      for (int k = 0; k < 2 * kHalf; ++k) sum += a[row][k] * b[k][column];
      lanes[lane]->sums[i] = truncated(sum);
    }
  }
}

}  // namespace emulated

inline SharedAddress shared_address(const void* p) { return reinterpret_cast<SharedAddress>(p); }

template <int Bytes>
void copy_async(SharedAddress to, const void* from, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if (to % Bytes != 0 || reinterpret_cast<uintptr_t>(from) % Bytes != 0)
    emulator::fail("cp.async: misaligned address");
  emulated::Copy copy{to, {}, Bytes};
  if (valid) std::memcpy(copy.bytes, from, Bytes);
  emulated::copies_of_this_thread().open.push_back(copy);
}

inline void copy_async_commit() {
  emulated::Copies& copies = emulated::copies_of_this_thread();
  copies.committed.push_back(std::move(copies.open));
  copies.open.clear();
}

template <int Pending>
void copy_async_wait() {
  std::vector<emulated::CopyGroup>& groups = emulated::copies_of_this_thread().committed;
  while (groups.size() > Pending) {
    for (const emulated::Copy& copy : groups.front())
      std::memcpy(reinterpret_cast<void*>(copy.to), copy.bytes, copy.count);
    groups.erase(groups.begin());
  }
}

inline uint32_t load_shared(SharedAddress from) { return emulated::value_at<uint32_t>(from); }

inline void store_shared(SharedAddress to, uint32_t word) {
  std::memcpy(reinterpret_cast<void*>(to), &word, sizeof word);
}

inline void load_matrices(uint32_t (&word)[4], SharedAddress row) {
  emulated::Matrices mine{row, {}};
  emulator::warp_exchange(0xFFFFFFFFu, mine, emulated::load_matrices<false>, "ldmatrix");
  std::memcpy(word, mine.word, sizeof word);
}

inline void load_matrices_transposed(uint32_t (&word)[4], SharedAddress row) {
  emulated::Matrices mine{row, {}};
  emulator::warp_exchange(0xFFFFFFFFu, mine, emulated::load_matrices<true>, "ldmatrix.trans");
  std::memcpy(word, mine.word, sizeof word);
}

inline void load_matrices(uint32_t (&word)[4], SharedAddress row, bool transposed) {
  transposed ? load_matrices_transposed(word, row) : load_matrices(word, row);
}

inline uint32_t round_to_tf32(uint32_t word) {
  const bool finite = (word & 0x7F800000u) != 0x7F800000u;
  return finite ? (word + 0x1000u) & ~0x1FFFu : word;
}

template <typename T>
void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {}};
  std::memcpy(mine.sums, sums, sizeof sums);
  emulator::warp_exchange(0xFFFFFFFFu, mine, emulated::multiply<T>, "mma");
  std::memcpy(sums, mine.sums, sizeof sums);
}

template <typename T>
void mma_of_8(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  mma<T>(sums, {a0, a1, 0, 0}, b, 0);
}

}  // namespace torchconv::cuda
