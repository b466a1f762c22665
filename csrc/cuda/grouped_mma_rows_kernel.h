// The kernel of grouped_mma_rows.h, for the files that instantiate it for one type each.
#pragma once

#include "cuda/activate_tile.h"
#include "cuda/grouped_mma_rows_tile.h"

namespace torchconv::cuda {

// What fits the registers: strips of 16 pixels of a warp, warps that share a slab's columns, blocks
// on a multiprocessor; steps in the ring; copies of a thread for one row.
template <RowWalk Walk, int Units>
struct RowsShape {
  static constexpr RowWalk kWalk = Walk;
  static constexpr int kUnits = Units;
  static constexpr bool kSame = Walk == RowWalk::kSame, kDoubled = Walk == RowWalk::kDoubled;
  static constexpr int kStrips = kSame && (Units == 1 || Units == 4) ? 2 : 1;
  static constexpr int kHalves = Units == 4 ? 1 : 2;
  static constexpr int kBlocks = Units == 8 ? 1 : Units == 4 && !kSame ? 3 : 2;
  static constexpr int kPairs = kSlabUnits / 2, kThreads = 32 * kPairs * kHalves;
  static constexpr int kColumns = 16 * kStrips * kHalves;
  static constexpr int kStepRows = Walk == RowWalk::kHalved ? 2 : 1;
  static constexpr int kSteps = Walk == RowWalk::kHalved ? 4 : 6;
  static constexpr int kCopies = kSame && kStrips == 2 ? 3 : 2,
                       kStaged = kCopies * kThreads / kSlabUnits;
  // Rows of outputs that a step multiplies for; steps of an item beyond its rows.
  static constexpr int kSets = kSame ? 3 : 2, kMoreSteps = kSame ? 2 : 1;
  static constexpr int kTiles = kDoubled ? 2 : kStrips;  // of sums: even and odd columns are two
};

// f of the problem's shape.
template <typename F>
auto with_rows_shape(const GroupedRows& p, F&& f) {
  const auto of_units = [&](auto walk) {
    switch (p.c.group_units) {
      case 8:
        return f(RowsShape<walk.value, 8>{});
      case 4:
        return f(RowsShape<walk.value, 4>{});
      case 2:
        return f(RowsShape<walk.value, 2>{});
      default:
        return f(RowsShape<walk.value, 1>{});
    }
  };
  if (p.h.stride == 1) return of_units(std::integral_constant<RowWalk, RowWalk::kSame>{});
  return p.backward ? of_units(std::integral_constant<RowWalk, RowWalk::kDoubled>{})
                    : of_units(std::integral_constant<RowWalk, RowWalk::kHalved>{});
}

inline int filters_bytes(const GroupedRows& p) {
  return kSlabUnits * kUnitChannels * p.filter_bytes;
}

// One sum of a narrow group, straight from memory.
template <typename T>
__device__ __forceinline__ float sum_of_group(const GroupedRows& p, int image, int row, int column,
                                              int channel) {
  const int group = p.c.group, first = channel & -group;
  const T* const filters = static_cast<const T*>(p.filters);
  float sum = 0.0f;
#pragma unroll 1
  for (int tap = 0; tap < 9; ++tap) {
    const int r = tap / 3, s = tap - 3 * r;
    int h = p.backward ? row + p.h.pad - r : row * p.h.stride - p.h.pad + r;
    int w = p.backward ? column + p.w.pad - s : column * p.w.stride - p.w.pad + s;
    if (p.backward && p.h.stride == 2) {
      if ((h | w) & 1) continue;
      h >>= 1, w >>= 1;
    }
    const bool inside =
        h >= 0 && w >= 0 && h < p.h.source && w < p.w.source;  // others count as zeros
    const T* const pixel = static_cast<const T*>(p.image) +
                           ((int64_t{image} * p.h.source + h) * p.w.source + w) * p.c.channels;
#pragma unroll 1
    for (int c = first; c < first + group; ++c) {
      const int filter = p.backward ? c : channel, weight = (p.backward ? channel : c) - first;
      sum = fmaf(inside ? to_wide(pixel[c]) : 0.0f,
                 to_wide(filters[(filter * 9 + tap) * group + weight]), sum);
    }
  }
  return sum;
}

// Lanes 2i and 2i + 1 have words 2i and 2i + 1 of two units; afterwards the first has both words of
// one unit, the second those of the other, low word first. Once more is back.
__device__ __forceinline__ void exchange_units(uint32_t& first, uint32_t& second, bool odd) {
  const uint32_t got = __shfl_xor_sync(0xFFFFFFFFu, odd ? first : second, 1);
  first = odd ? got : first;
  second = odd ? second : got;
}

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float a, float b) {
  const Vector<T, 2> pair{{from_wide<T>(a), from_wide<T>(b)}};
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

template <typename T, RowWalk Walk, int Units>
__global__ void __launch_bounds__(RowsShape<Walk, Units>::kThreads, RowsShape<Walk, Units>::kBlocks)
    grouped_rows_kernel(const __grid_constant__ GroupedRows p, const Epilogue<T> epilogue) {
  using Shape = RowsShape<Walk, Units>;
  constexpr int kStrips = Shape::kStrips, kTiles = Shape::kTiles, kThreads = Shape::kThreads;
  constexpr int kStepRows = Shape::kStepRows, kSteps = Shape::kSteps;
  constexpr bool kDoubled = Walk == RowWalk::kDoubled;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int part = static_cast<int>(blockIdx.y);
  const int first_unit = static_cast<int>(blockIdx.x) * kSlabUnits;
  const int units = min(kSlabUnits, p.c.channels / kUnitChannels - first_unit);
  const int begin = p.cut.first_item(part), end = p.cut.first_item(part + 1);
  const int source_pitch = p.w.source * p.c.channels, pitch = p.w.outputs * p.c.channels;

  unsigned char* shared = dynamic_shared<unsigned char>();
  unsigned char* filters = shared + kSteps * p.cut.slot_bytes;
  stage_filters<kThreads>(p, first_unit, units, filters);
  copy_async_commit();

  // What the thread copies, and the item and step that it copies for.
  RowCopies<Shape::kCopies, kThreads, kStepRows == 2> copies(shared_address(shared));
  int copied = begin - 1, copy_row = 0, copy_steps = 0, copy_slot = 0;
  const auto source_row = [&](int row) { return row * kStepRows + p.first_h; };
  const auto stage_step = [&] {
    if (copy_steps == 0 && copied < end && ++copied < end) {
      const RowsItem item = rows_item(p.cut, copied);
      copy_row = source_row(item.row), copy_steps = item.rows + Shape::kMoreSteps;
      copies.begin(p.cut, p.cut.line, p.cut.by_line, item.image,
                   item.column * kStepRows + p.first_w, p.batch, p.h.source, p.w.source,
                   p.c.channels, (first_unit + thread % kSlabUnits) * kUnitChannels, units);
    }
    if (copy_steps > 0) {
      --copy_steps;
#pragma unroll
      for (int j = 0; j < kStepRows; ++j) {
        const int row = copy_row + j;
        // Others are not multiplied either.
        if (row >= 0 && row < p.h.source && (j == 0 || copy_steps > 0))
          copies.copy(
              static_cast<const T*>(p.image), row * source_pitch,
              static_cast<SharedAddress>(copy_slot * p.cut.slot_bytes + j * p.cut.row_bytes));
      }
      copy_row += kStepRows;
    }
    copy_async_commit();
    copy_slot = copy_slot + 1 == kSteps ? 0 : copy_slot + 1;
  };
#pragma unroll 1
  for (int i = 0; i < kSteps - 1; ++i) stage_step();
  copy_async_wait<kSteps - 1>();
  __syncthreads();

  // The filters of the warp's two units of outputs; backward, of stride 1, the taps from the last.
  const int pair = warp % Shape::kPairs, first_tile = 2 * pair;
  const int group_unit = Units == 1 ? first_tile : first_tile / Units * Units;
  uint32_t b[2][9][Units];
  {
    const int matrix = lane / 8;
    const auto load = [&](uint32_t (&word)[4], int n, int tap, int unit) {
      const int tile = first_tile + n, group = Units == 1 ? tile : group_unit;
      const int stored = p.backward && !kDoubled ? 8 - tap : tap;
      const int filter = (p.backward ? group + unit : tile) * kUnitChannels + lane % 8;
      const int cell = stored * Units + (p.backward ? tile - group : unit);
      load_matrices(word,
                    shared_address(filters) +
                        static_cast<SharedAddress>(filter * p.filter_bytes + cell * kUnitBytes),
                    p.backward);
    };
    uint32_t word[4];
    if constexpr (Units == 1) {
#pragma unroll
      for (int tap = 0; tap < 9; tap += 2) {
        load(word, matrix % 2, min(tap + matrix / 2, 8), 0);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (tap + i / 2 < 9) b[i % 2][tap + i / 2][0] = word[i];
      }
    } else {
#pragma unroll
      for (int tap = 0; tap < 9; ++tap)
#pragma unroll
        for (int unit = 0; unit < Units; unit += 2) {
          load(word, matrix / 2, tap, unit + matrix % 2);
#pragma unroll
          for (int i = 0; i < 4; ++i) b[i / 2][tap][unit + i % 2] = word[i];
        }
    }
  }

  // Where the lane finds A: of its pixel of a strip, what it loads of the tap or unit that the
  // upper lanes have.
  const int first_pixel = warp / Shape::kPairs * kStrips * 16;
  const int odd_columns =
      Walk == RowWalk::kHalved ? (p.cut.columns + 1) * kPixelBytes : kPixelBytes;
  const int last_column = Walk == RowWalk::kHalved ? kPixelBytes : 2 * kPixelBytes;
  SharedAddress pixel[kStrips];
#pragma unroll
  for (int i = 0; i < kStrips; ++i) {
    uint32_t image = static_cast<uint32_t>(first_pixel + 16 * i + lane % 16);
    int column = static_cast<int>(p.cut.by_columns.split(image));
    if (static_cast<int>(image) >= p.cut.images) image = 0, column = 0;  // only fills up
    pixel[i] =
        shared_address(shared) +
        static_cast<SharedAddress>((static_cast<int>(image) * p.cut.line + column) * kPixelBytes +
                                   group_unit * kUnitBytes);
  }
  const int upper = lane / 16;

  // The item that is computed, and where the lane's outputs of a row are: of 4 channels of one of
  // its units, for pixels g and g + 8 of each strip.
  RowsItem at{};
  int to[kTiles][2];
  const int own_unit = first_unit + first_tile + lane % 2;
  float sums[Shape::kSets][kTiles][2][4];
  const auto clear = [](float (&set)[kTiles][2][4]) {
#pragma unroll
    for (int i = 0; i < kTiles * 8; ++i) set[i / 8][i / 4 % 2][i % 4] = 0.0f;
  };
#pragma unroll
  for (int set = 0; set < Shape::kSets; ++set) clear(sums[set]);
  const auto begin_item = [&](int item) {
    at = rows_item(p.cut, item);
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t image =
            static_cast<uint32_t>(first_pixel + (kDoubled ? 0 : 16 * m) + 8 * half + lane / 4);
        int column = at.column + static_cast<int>(p.cut.by_columns.split(image));
        if (kDoubled) column = 2 * column + m;
        const int own = at.image + static_cast<int>(image);
        const bool any = static_cast<int>(image) < p.cut.images && own < p.batch &&
                         column < p.w.outputs && own_unit - first_unit < units;
        to[m][half] = any ? own * p.h.outputs * pitch + column * p.c.channels +
                                own_unit * kUnitChannels + lane % 4 / 2 * 4
                          : -1;
      }
  };

  const auto store = [&](float (&whole)[kTiles][2][4], int row) {
    if constexpr (Units == 1) {
      // Infinity times the zeros between groups is NaN: such sums once more, of their group alone.
      if (p.c.group < kUnitChannels) {
        float probe = 0.0f;
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) probe += whole[m][n][e] * 0.0f;
        if (probe != 0.0f) {
#pragma unroll 1
          for (int i = 0; i < 8 * kTiles; ++i) {
            const int m = i / 8, n = i / 4 % 2, half = i / 2 % 2;
            uint32_t image =
                static_cast<uint32_t>(first_pixel + (kDoubled ? 0 : 16 * m) + 8 * half + lane / 4);
            int column = at.column + static_cast<int>(p.cut.by_columns.split(image));
            if (kDoubled) column = 2 * column + m;
            const int own = at.image + static_cast<int>(image);
            float sum = whole[0][0][0];
            if (sum * 0.0f != 0.0f && static_cast<int>(image) < p.cut.images && own < p.batch &&
                column < p.w.outputs && first_tile + n < units)
              sum = sum_of_group<T>(
                  p, own, row, column,
                  (first_unit + first_tile + n) * kUnitChannels + lane % 4 * 2 + i % 2);
            // The sums go round through the first register.
#pragma unroll
            for (int next = 0; next < 8 * kTiles; ++next)
              whole[next / 8][next / 4 % 2][next % 4] =
                  next + 1 < 8 * kTiles ? whole[(next + 1) / 8][(next + 1) / 4 % 2][(next + 1) % 4]
                                        : sum;
          }
        }
      }
    }
    float z[kTiles * 8];
#pragma unroll
    for (int i = 0; i < kTiles * 8; ++i) z[i] = whole[i / 8][i / 4 % 2][i % 4];
    const int row_at = row * pitch;
    if constexpr (!kDoubled) {
      if (epilogue.bias != nullptr) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (first_tile + n >= units) continue;
          // It may begin at any element.
          const T* const bias =
              epilogue.bias + ((first_unit + first_tile + n) * kUnitChannels + lane % 4 * 2);
#pragma unroll
          for (int i = 0; i < kTiles * 4; ++i) z[i / 4 * 8 + n * 4 + i % 4] += to_wide(bias[i % 2]);
        }
      }
      if (epilogue.residual != nullptr) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            Vector<uint32_t, 2> own{};
            if (to[m][half] >= 0)
              own = *reinterpret_cast<const Vector<uint32_t, 2>*>(epilogue.residual +
                                                                  (to[m][half] + row_at));
            exchange_units(own.element[0], own.element[1], lane % 2 != 0);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
              Vector<T, 2> residual;
              memcpy(&residual, &own.element[n], sizeof residual);
#pragma unroll
              for (int e = 0; e < 2; ++e)
                z[m * 8 + n * 4 + half * 2 + e] += to_wide(residual.element[e]);
            }
          }
      }
    }
    const auto write = [&](T* y) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* const pair_of_unit = z + m * 8 + half * 2;
          Vector<uint32_t, 2> own{{pack_pair<T>(pair_of_unit[0], pair_of_unit[1]),
                                   pack_pair<T>(pair_of_unit[4], pair_of_unit[5])}};
          exchange_units(own.element[0], own.element[1], lane % 2 != 0);
          if (to[m][half] >= 0)
            *reinterpret_cast<Vector<uint32_t, 2>*>(y + (to[m][half] + row_at)) = own;
        }
    };
    if constexpr (!kDoubled) {
      if (epilogue.preactivation != nullptr) write(epilogue.preactivation);
      activate_tile<4>(epilogue.activation, z);
    }
    write(epilogue.y);
  };

  // Adds the products of the staged row whose first bytes are at `first`. Each of row_of_set calls
  // its argument with a set of sums and the row of the filters that it is multiplied with.
  const auto multiply_row = [&](SharedAddress first, auto&&... row_of_set) {
#pragma unroll
    for (int m = 0; m < kStrips; ++m) {
      const SharedAddress own = pixel[m] + first;
      if constexpr (Units == 1) {
        uint32_t a[2][4], last[4];
        const SharedAddress two_taps = own + static_cast<SharedAddress>(upper * odd_columns);
        load_matrices(a[0], two_taps);
        load_matrices(a[1], two_taps + kUnitBytes);
        load_matrices(last, own + static_cast<SharedAddress>(last_column + upper * kUnitBytes));
        const auto two = [&](auto& set, int r) {
#pragma unroll
          for (int n = 0; n < 2; ++n) mma<T>(set[m][n], a[n], b[n][3 * r][0], b[n][3 * r + 1][0]);
        };
        const auto third = [&](auto& set, int r) {
#pragma unroll
          for (int n = 0; n < 2; ++n)
            mma_of_8<T>(set[m][n], last[2 * n], last[2 * n + 1], b[n][3 * r + 2][0]);
        };
        (row_of_set(two), ...);
        (row_of_set(third), ...);
      } else {
#pragma unroll
        for (int s = 0; s < 3; ++s)
#pragma unroll
          for (int unit = 0; unit < Units; unit += 2) {
            uint32_t a[4];
            const int tap = s == 0 ? 0 : s == 1 ? odd_columns : last_column;
            load_matrices(a, own + static_cast<SharedAddress>(tap + (upper + unit) * kUnitBytes));
            const auto one = [&](auto& set, int r) {
#pragma unroll
              for (int n = 0; n < 2; ++n)
                mma<T>(set[m][n], a, b[n][3 * r + s][unit], b[n][3 * r + s][unit + 1]);
            };
            (row_of_set(one), ...);
          }
      }
    }
  };
  // Halved: a step's two rows.
  const auto multiply_rows = [&](SharedAddress first, SharedAddress second,
                                 float (&more)[kTiles][2][4]) {
    if constexpr (Walk == RowWalk::kHalved && Units > 1) {
#pragma unroll
      for (int s = 0; s < 3; ++s)
#pragma unroll
        for (int unit = 0; unit < Units; unit += 2) {
          const int tap = s == 0 ? 0 : s == 1 ? odd_columns : last_column;
          const SharedAddress own =
              pixel[0] + static_cast<SharedAddress>(tap + (upper + unit) * kUnitBytes);
          uint32_t a[2][4];
          load_matrices(a[0], own + first);
          load_matrices(a[1], own + second);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            mma<T>(sums[1][0][n], a[0], b[n][6 + s][unit], b[n][6 + s][unit + 1]);
            mma<T>(sums[0][0][n], a[0], b[n][s][unit], b[n][s][unit + 1]);
            mma<T>(more[0][n], a[1], b[n][3 + s][unit], b[n][3 + s][unit + 1]);
          }
        }
    }
  };
  // Backward with stride 2: odd columns are taps 2 and 0 of two neighbours, even ones tap 1.
  constexpr int kLoaded = Units == 1 ? 2 : Units;
  const auto load_doubled = [&](SharedAddress first, uint32_t (&a)[kLoaded][4]) {
    const SharedAddress own = pixel[0] + first;
#pragma unroll
    for (int i = 0; i < kLoaded; ++i) {
      if constexpr (Units == 1)
        load_matrices(a[i], own + static_cast<SharedAddress>(upper * kPixelBytes + i * kUnitBytes));
      else  // two units of one pixel, then of its neighbour
        load_matrices(a[i], own + static_cast<SharedAddress>(i % 2 * kPixelBytes +
                                                             (i / 2 * 2 + upper) * kUnitBytes));
    }
  };
  const auto multiply_doubled = [&](float (&set)[kTiles][2][4], const uint32_t (&a)[kLoaded][4],
                                    int r) {
    if constexpr (Units == 1) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        mma<T>(set[1][n], a[n], b[n][3 * r + 2][0], b[n][3 * r][0]);
        mma_of_8<T>(set[0][n], a[n][0], a[n][1], b[n][3 * r + 1][0]);
      }
    } else {
#pragma unroll
      for (int unit = 0; unit < Units; unit += 2)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          mma<T>(set[1][n], a[unit], b[n][3 * r + 2][unit], b[n][3 * r + 2][unit + 1]);
          mma<T>(set[0][n], a[unit], b[n][3 * r + 1][unit], b[n][3 * r + 1][unit + 1]);
          mma<T>(set[1][n], a[unit + 1], b[n][3 * r][unit], b[n][3 * r][unit + 1]);
        }
    }
  };

  const bool busy = first_tile < units;
  // The rows of outputs that the staged row is not the first of.
  const auto shift = [&] {
#pragma unroll
    for (int set = Shape::kSets - 1; set > 0; --set)
#pragma unroll
      for (int i = 0; i < kTiles * 8; ++i)
        sums[set][i / 8][i / 4 % 2][i % 4] = sums[set - 1][i / 8][i / 4 % 2][i % 4];
    clear(sums[0]);
  };
#pragma unroll 1
  for (int item = begin, slot = 0; item < end; ++item) {
    begin_item(item);
    const int steps = at.rows + Shape::kMoreSteps;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      copy_async_wait<kSteps - 2>();
      __syncthreads();
      stage_step();
      const SharedAddress first = static_cast<SharedAddress>(slot * p.cut.slot_bytes);
      slot = slot + 1 == kSteps ? 0 : slot + 1;
      if (!busy) continue;
      const int row = at.row + step, from_row = source_row(row);
      const auto has = [&](int source) { return source >= 0 && source < p.h.source; };
      if constexpr (Walk == RowWalk::kSame) {
        shift();
        if (has(from_row))
          multiply_row(
              first, [&](auto&& one) { one(sums[2], 2); }, [&](auto&& one) { one(sums[1], 1); },
              [&](auto&& one) { one(sums[0], 0); });
        if (step >= 2) store(sums[2], row - 2);
      } else if constexpr (Walk == RowWalk::kHalved) {
        shift();
        const SharedAddress second = first + static_cast<SharedAddress>(p.cut.row_bytes);
        const bool upper_row = has(from_row), lower_row = step + 1 < steps && has(from_row + 1);
        if (Units > 1 && upper_row && lower_row) {
          // Both at once: sums of their own keep the tensor cores busy.
          float more[kTiles][2][4];
          clear(more);
          multiply_rows(first, second, more);
#pragma unroll
          for (int i = 0; i < kTiles * 8; ++i)
            sums[0][i / 8][i / 4 % 2][i % 4] += more[i / 8][i / 4 % 2][i % 4];
          if (step >= 1) store(sums[1], row - 1);
          continue;
        }
        if (upper_row)
          multiply_row(
              first, [&](auto&& one) { one(sums[1], 2); }, [&](auto&& one) { one(sums[0], 0); });
        if (step >= 1) store(sums[1], row - 1);
        if (lower_row) multiply_row(second, [&](auto&& one) { one(sums[0], 1); });
      } else {
        // Row 2i of dx has dz's row i; row 2i + 1 has it too, and the next.
        auto &odd = sums[0], &even = sums[1];
        uint32_t a[kLoaded][4];
        const bool any = has(from_row);
        if (any) {
          load_doubled(first, a);
          multiply_doubled(odd, a, 0);
        }
        if (step >= 1 && 2 * row - 1 < p.h.outputs) store(odd, 2 * row - 1);
        clear(odd);
        clear(even);
        if (any) {
          multiply_doubled(even, a, 1);
          multiply_doubled(odd, a, 2);
        }
        if (step + 1 < steps) store(even, 2 * row);
      }
    }
  }
}

template <typename T>
void run_grouped_rows(const GroupedRows& p, const Epilogue<T>& epilogue, const Queue& queue) {
  with_rows_shape(p, [&](auto shape) {
    using Shape = decltype(shape);
    launch(grouped_rows_kernel<T, Shape::kWalk, Shape::kUnits>,
           dim3(static_cast<unsigned>(p.c.slabs), static_cast<unsigned>(p.cut.parts)),
           dim3(Shape::kThreads), Shape::kSteps * p.cut.slot_bytes + filters_bytes(p), queue, p,
           epilogue);
  });
}

}  // namespace torchconv::cuda
