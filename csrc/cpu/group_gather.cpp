// fprop and dgrad with few channels in a group, by the tiles of microkernels/group_tile.h over the
// bands of group_band.h. A task is a band of rows of a block of groups. Sums are cut at kDepth
// terms. In channels_last a row is written where it belongs; else some rows of all filters of a
// vector are transposed. The products meanwhile fetch what the next task reads. In bfloat16 a
// channel of the tiles is a pair of them where the processor has such products.
//
// Runs of taps above or below the image are left out for each row of outputs. Where many also lie
// beside it, as those of a large kernel's dgrad do, a call sums runs below each other, for the
// outputs whose pixels exist, and the sums of a row wait in the first-level cache.
#include "cpu/group_gather.h"

#include <numeric>
#include <type_traits>

#include "core/buffer.h"
#include "cpu/group_band.h"
#include "cpu/group_store.h"
#include "cpu/group_weights.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

template <typename T>
GroupBand group_band(const ConvView& view) {
  return GroupBand(view, sizeof(Wide<T>), kPermutesLanes<Wide<T>>);
}

// Calls f(view of channels or pairs, whether they are pairs).
template <typename T, typename F>
auto with_terms(const ConvView& view, F&& f) {
  if constexpr (std::is_same_v<T, BFloat16>)
    if (groups_take_pairs(view)) return f(pair_view(view), std::true_type());
  return f(view, std::false_type());
}

// The images of one call: dst(h, w) with h = i*step_h + row of the phase that computes it, w alike.
// A stride's dgrad has a phase for each residue; else there is one, of step 1.
struct GroupGrid {
  int64_t H, W, step_h, step_w;
  ConvStrides strides;
  int64_t offset;
};

struct GroupPhase {
  const ConvView* view;
  int64_t row, column;
};

// What a band must hold: the taps of all phases.
ConvView all_phases(const std::vector<GroupPhase>& phases) {
  ConvView all = *phases[0].view;
  for (size_t p = 1; p < phases.size(); ++p) {
    const ConvView& view = *phases[p].view;
    all.I = std::max(all.I, view.I);
    all.J = std::max(all.J, view.J);
    all.taps.insert(all.taps.end(), view.taps.begin(), view.taps.end());
  }
  return all;
}

// The images of one call, whatever their type: the rest is compiled for the computing type.
template <typename A>
class GroupImages {
 public:
  bool clamps, simple;  // as those of GroupStore
  A high;
  A* y = nullptr;               // where a tile can write it, else null
  BFloat16* rounded = nullptr;  // the same of pairs

  virtual void fill(const GroupBand& band, const ConvView& view, const GroupTask& at,
                    A* scratch) const = 0;
  virtual void expect(const GroupBand& band, const ConvView& view, const GroupTask& at,
                      SourcePrefetch& ahead) const = 0;
  virtual bool streams(bool whole_vectors, int64_t rows, int64_t N) const = 0;
  virtual void store_pixels(A* row, int64_t used, int64_t dst) const = 0;
  virtual void store_planes(const A* pixels, int64_t used, int64_t rows, int64_t dst, A* planes,
                            bool streams) const = 0;
  virtual int64_t planes_size(int64_t rows) const = 0;

 protected:
  ~GroupImages() = default;
};

template <typename T, bool kPairs>
class GroupImagesOf final : public GroupImages<Wide<T>> {
 public:
  using A = Wide<T>;
  GroupImagesOf(const GroupGrid& grid, const T* src, const Epilogue<T>& epilogue)
      : src_(src), first_(grid.offset), store_(grid.strides, grid.W, epilogue) {
    this->clamps = store_.clamps;
    this->simple = store_.simple;
    this->high = store_.high;
    if (!store_.simple || grid.strides.c != 1) return;
    if constexpr (std::is_same_v<T, A>) this->y = epilogue.y;
    if constexpr (kPairs) this->rounded = epilogue.y;
  }

  void fill(const GroupBand& band, const ConvView& view, const GroupTask& at,
            A* scratch) const override {
    band.template fill<T, kPairs>(view, src_ + at.n * view.src.n, at.block, at.band * band.band,
                                  scratch);
  }
  void expect(const GroupBand& band, const ConvView& view, const GroupTask& at,
              SourcePrefetch& ahead) const override {
    band.template expect<T, kPairs>(view, src_ + at.n * view.src.n, at.block, at.band * band.band,
                                    ahead);
  }
  bool streams(bool whole_vectors, int64_t rows, int64_t N) const override {
    return store_.streams(whole_vectors, rows, first_, N);
  }
  void store_pixels(A* row, int64_t used, int64_t dst) const override {
    store_.store_pixels(row, used, dst);
  }
  void store_planes(const A* pixels, int64_t used, int64_t rows, int64_t dst, A* planes,
                    bool streams) const override {
    store_.store_planes(pixels, used, rows, dst, planes, streams);
  }
  int64_t planes_size(int64_t rows) const override { return store_.planes_size(rows); }

 private:
  const T* src_;
  const int64_t first_;  // of the destination
  const GroupStore<T> store_;
};

template <typename A, bool kPairs>
class GroupGather {
 public:
  static constexpr int64_t kL = kLanes<A>;

  GroupGather(const std::vector<GroupPhase>& phases, const GroupGrid& grid,
              const GroupImages<A>& images)
      : view_(all_phases(phases)),
        band_(view_, sizeof(A), kPermutesLanes<A>),
        lanes_(band_.source_lanes<A>(view_)),
        grid_(grid),
        images_(images),
        in_place_(images.y != nullptr || images.rounded != nullptr),
        bias_(band_.blocks * band_.dst_vectors * kL) {
    for (const GroupPhase& phase : phases) plan(phase);
    const int64_t band_rows = band_.band * grid.step_h;
    const auto rows_of = [&](int64_t bytes) {
      return std::clamp<int64_t>(bytes / (kVectorBytes * grid.W), 1, band_rows);
    };
    const bool by_columns = std::any_of(phases_.begin(), phases_.end(),
                                        [](const Phase& phase) { return phase.by_columns; });
    if (grid.strides.c != 1) {
      // Rows that are transposed together: whole vectors of pixels, where there are some.
      constexpr int64_t kRowsBytes = 16 << 10;
      out_rows_ = rows_of(kRowsBytes);
      const int64_t unit = kL / std::gcd(kL, grid.W);
      if (out_rows_ > unit) out_rows_ -= out_rows_ % unit;
    } else if (by_columns) {
      constexpr int64_t kSumBytes = 8 << 10;
      out_rows_ = rows_of(kSumBytes);
    }
    // A tile loads sums as if it were full.
    sums_ = ((by_columns ? out_rows_ * view_.J : 0) + kSumTiles[0]) * kL;
    streams_ =
        images.streams(band_.whole_vectors(view_),
                       band_.bands == 1 ? out_rows_ : std::gcd(out_rows_, band_rows), view_.N);
  }

  // To be called first; bias may be null.
  template <typename T>
  void set_bias(const T* bias) {
    for (int64_t i = 0; i < band_.blocks * band_.dst_vectors; ++i) {
      const int64_t block = i / band_.dst_vectors, vector = i % band_.dst_vectors;
      const int64_t first = block * band_.groups * view_.K + vector * band_.vector_filters;
      const int64_t filters = band_.filters_in(view_, block, vector);
      for (int64_t l = 0; l < kL; ++l)
        bias_[i * kL + l] = bias != nullptr && l < filters ? to_wide(bias[first + l]) : A{0};
    }
  }

  const GroupBand& band() const { return band_; }
  std::vector<const ConvView*> views() const {
    std::vector<const ConvView*> views;
    for (const Phase& phase : phases_) views.push_back(phase.view);
    return views;
  }

  // packed: by `packing`, or null. Weights that are not packed are packed by whoever multiplies
  // with them, where each thread has blocks of its own.
  void run(const A* packed, const GroupPacking<A>& packing, const Parallel& pool) const {
    const bool packs = packed == nullptr && (view_.src.c != 1 || view_.N * band_.bands == 1);
    Buffer<A> own(packed != nullptr || packs ? 0 : packing.size());
    if (packed == nullptr && !packs) {
      packing.pack(own.get(), pool);
      packed = own.get();
    }
    const int64_t block_weights = band_.dst_vectors * weights_vector_;
    const int64_t tasks = view_.N * band_.bands * band_.blocks;
    const int64_t source = round_up(band_.size, 16);
    const int64_t images =
        round_up(source + sums_ + out_size() + images_.planes_size(out_rows_), 16);
    const int64_t slot_size = images + (packs ? block_weights + packing.scratch_size() : 0);
    const WorkSplit split(tasks,
                          static_cast<double>(band_.band * view_.J * band_.dst_vectors * kL) *
                              static_cast<double>(view_.terms() + 8));
    Buffer<A> scratch(split.slots * slot_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      A* const band = scratch.get() + slot * slot_size;
      A* const own_weights = band + images;
      SourcePrefetch ahead;
      int64_t packed_block = -1;
      for (int64_t task = begin; task < end; ++task) {
        const GroupTask at(band_, view_, task);
        const int64_t i0 = at.band * band_.band;
        const int64_t end_row = std::min((i0 + band_.band) * grid_.step_h, grid_.H);
        if (packs && at.block != packed_block) {
          for (int64_t v = 0; v < band_.dst_vectors; ++v)
            packing.pack_vector(at.block * band_.dst_vectors + v, own_weights + v * weights_vector_,
                                own_weights + block_weights);
          packed_block = at.block;
        }
        const A* const weights = packs ? own_weights : packed + at.block * block_weights;
        Task t{weights, band, i0, at.n, at.block, 0, band + source, &ahead, 0};
        images_.fill(band_, view_, at, band);
        ahead.clear();
        if (task + 1 < end) expect(at, {band_, view_, task + 1}, packed, ahead);
        t.lines = ceil_div(ahead.lines(),
                           std::min(band_.band, view_.I - i0) * row_tiles_ * band_.dst_vectors);
        for (int64_t h = i0 * grid_.step_h; h < end_row; h += out_rows_)
          for (t.vector = 0; t.vector < band_.dst_vectors; ++t.vector)
            run_rows(t, h, std::min(out_rows_, end_row - h));
      }
      if (streams_) stream_fence();
    });
  }

 private:
  // Runs of equal length that one call of a tile sums up.
  struct Call {
    int64_t taps, first, count, weights;
    Range columns;  // of outputs that read a pixel of the image through any of them
  };
  struct Phase {
    const ConvView* view;
    int64_t row, column;
    int64_t weights;  // among those of a vector of filters
    std::vector<TapRun> runs;
    std::vector<int64_t> heights;  // of the runs: their taps' h
    std::vector<Call> calls;
    int64_t tiles;    // of a row of outputs
    bool by_columns;  // each call for its own columns
  };
  struct Task {
    const A* weights;  // of the block
    const A* band;
    int64_t i0, n, block, vector;
    A* scratch;
    SourcePrefetch* ahead;
    int64_t lines;  // of those, with a tile
  };

  void plan(const GroupPhase& from) {
    const ConvView& view = *from.view;
    Phase phase{&view, from.row, from.column, weights_vector_, {}, {}, {}, 0, false};
    const std::vector<GroupRun> runs = group_runs(view);
    int64_t pixels = 0, pixels_inside = 0, row_pixels = 0;
    for_tiles({0, view.J}, [&](int64_t, int64_t tile, int64_t) {
      row_pixels += kSumTiles[tile];
      ++phase.tiles;
    });
    for (const GroupRun& run : runs) {
      pixels += row_pixels * run.count;
      for_tiles(columns_inside(view, run), [&](int64_t, int64_t tile, int64_t) {
        pixels_inside += kSumTiles[tile] * run.count;
      });
    }
    // An eighth repays what the calls have to load and store.
    phase.by_columns = pixels - pixels_inside >= pixels / 8;
    int64_t terms = 0, weights = 0, column = 0;
    for (int64_t v = 0; v < band_.src_vectors; ++v)
      for (const GroupRun& run : runs) {
        const int64_t channels = band_.groups > 1 ? view_.C : std::min(kL, view_.C - v * kL);
        const int64_t more = channels * run.count;
        const Range columns = columns_inside(view, run);
        std::vector<Call>& calls = phase.calls;
        if (calls.empty() || calls.back().taps != run.count || terms + more > kDepth ||
            (phase.by_columns && run.w != column)) {
          calls.push_back(
              {run.count, static_cast<int64_t>(phase.runs.size()), 0, weights, columns});
          terms = 0;
        }
        Call& call = calls.back();
        ++call.count;
        call.columns = {std::min(call.columns.begin, columns.begin),
                        std::max(call.columns.end, columns.end)};
        column = run.w;
        terms += more;
        weights += more * kL;
        phase.runs.push_back({v * band_.plane + band_.offset(run.h, run.w), channels});
        phase.heights.push_back(run.h);
      }
    weights_vector_ += weights;
    row_tiles_ += phase.tiles;
    phases_.push_back(std::move(phase));
  }

  // Outputs of a row that read a pixel of the image through any tap of a run.
  static Range columns_inside(const ConvView& view, const GroupRun& run) {
    Range columns{view.J, 0};
    for (int64_t s = 0; s < run.count; ++s) {
      const Range tap = valid_range(view.J, view.step_w, run.w + s, view.W);
      if (!tap.empty())
        columns = {std::min(columns.begin, tap.begin), std::max(columns.end, tap.end)};
    }
    return columns;
  }

  // Calls f(first output, tile, outputs) for the tiles of a piece of a row.
  template <typename F>
  static void for_tiles(Range columns, F&& f) {
    for (int64_t j = columns.begin; j < columns.end;) {
      const int64_t tile = group_sum_tile(columns.end - j);
      const int64_t count = std::min<int64_t>(kSumTiles[tile], columns.end - j);
      f(j, tile, count);
      j += count;
    }
  }

  // What the next task reads. Another core may have packed its weights.
  void expect(const GroupTask& at, const GroupTask& next, const A* packed,
              SourcePrefetch& ahead) const {
    const int64_t size = band_.dst_vectors * weights_vector_;
    if (next.block != at.block && packed != nullptr)
      ahead.add(packed + next.block * size, 1, 0, size * static_cast<int64_t>(sizeof(A)));
    images_.expect(band_, view_, next, ahead);
  }

  int64_t out_size() const { return out_rows_ * grid_.W * kL; }

  // Where rows of a phase go: where they belong, or to rows of pixels.
  struct Target {
    int64_t used, dst;  // dst: of row 0 of the destination
    int64_t first;      // the destination's row at `pixels`
    A* pixels;
  };

  // `rows` rows of the destination from row `first` on.
  void run_rows(const Task& t, int64_t first, int64_t rows) const {
    const int64_t channel = t.block * band_.groups * view_.K + t.vector * band_.vector_filters;
    const int64_t used = band_.filters_in(view_, t.block, t.vector);
    if (used == 0) return;
    const int64_t dst = grid_.offset + t.n * grid_.strides.n + channel * grid_.strides.c;
    const Target to{used, dst, first, t.scratch + sums_};
    for (const Phase& phase : phases_) {
      const auto row = [&](int64_t h) {
        return std::min(ceil_div(h - phase.row, grid_.step_h), phase.view->I);
      };
      const Range own{row(first), row(first + rows)};
      if (phase.by_columns)
        run_by_columns(t, phase, own, to);
      else
        for (int64_t i = own.begin; i < own.end; ++i) run_row(t, phase, i, to);
    }
    if (grid_.strides.c != 1)
      images_.store_planes(to.pixels, used, rows, dst + first * grid_.strides.row,
                           to.pixels + out_size(), streams_);
    else if (!in_place_)
      for (int64_t r = 0; r < rows; ++r)
        images_.store_pixels(to.pixels + r * grid_.W * kL, used,
                             dst + (first + r) * grid_.strides.row);
  }

  void run_row(const Task& t, const Phase& phase, int64_t i, const Target& to) const {
    GroupSum<A> g = tile_of(t);
    int64_t lines = t.lines * phase.tiles;
    for_tiles({0, phase.view->J}, [&](int64_t j, int64_t tile, int64_t count) {
      begin_tile(g, bias(t), t.scratch, count);
      for (const Call& call : phase.calls) {
        if (&call == &phase.calls.back()) finish_tile(phase, i, j, to, g);
        sum_tile(t, phase, call, i, j, tile, g, &lines);
        g.start = nullptr;
      }
    });
    t.ahead->ask(lines);
  }

  // Several rows, so that the weights of a call stay in the first-level cache for all of them.
  void run_by_columns(const Task& t, const Phase& phase, Range rows, const Target& to) const {
    const int64_t J = phase.view->J;
    GroupSum<A> g = tile_of(t);
    int64_t lines = t.lines * phase.tiles * rows.size();
    // Sums start with the bias, and at last go where they belong: with no runs.
    const Call none{1, 0, 0, 0, {0, J}};
    const auto calls = static_cast<int64_t>(phase.calls.size());
    for (int64_t c = -1; c <= calls; ++c) {
      const Call& call = c < 0 || c == calls ? none : phase.calls[c];
      for (int64_t i = rows.begin; i < rows.end; ++i)
        for_tiles(call.columns, [&](int64_t j, int64_t tile, int64_t count) {
          begin_tile(g, c < 0 ? bias(t) : nullptr, t.scratch + ((i - rows.begin) * J + j) * kL,
                     count);
          if (c == calls) finish_tile(phase, i, j, to, g);
          sum_tile(t, phase, call, i, j, tile, g, &lines);
        });
    }
    t.ahead->ask(lines);
  }

  const A* bias(const Task& t) const {
    return bias_.get() + (t.block * band_.dst_vectors + t.vector) * kL;
  }

  // What all tiles of a vector have in common.
  GroupSum<A> tile_of(const Task& t) const {
    GroupSum<A> g{};
    g.lanes = kPairs || band_.groups > 1 ? lanes_.data() + t.vector * kL : nullptr;
    g.step = view_.step_w;
    g.low = A{0};
    g.high = images_.high;
    return g;
  }

  // A tile of sums at `sums`, or of the start where that is given.
  static void begin_tile(GroupSum<A>& g, const A* start, A* sums, int64_t count) {
    g.start = start;
    g.sums = g.out = sums;
    g.out_step = g.used = kL;
    g.count = count;
    g.rounded = nullptr;
    g.clamp = g.stream = false;
  }

  // Its last sums go to the destination.
  void finish_tile(const Phase& phase, int64_t i, int64_t j, const Target& to,
                   GroupSum<A>& g) const {
    const int64_t h = i * grid_.step_h + phase.row, w = j * grid_.step_w + phase.column;
    g.clamp = images_.simple && images_.clamps;
    g.out = to.pixels + ((h - to.first) * grid_.W + w) * kL;
    g.out_step = grid_.step_w * kL;
    if (!in_place_) return;
    const int64_t first = to.dst + h * grid_.strides.row + w * grid_.strides.column;
    if constexpr (kPairs)
      g.rounded = images_.rounded + first;
    else
      g.out = images_.y + first;
    g.out_step = grid_.step_w * grid_.strides.column;
    g.used = to.used;
    g.stream = streams_;
  }

  // The runs of a call that reach the image from row i, for the tile of g from output j on. lines:
  // that may be asked for. One copy for all of its callers.
  __attribute__((noinline)) void sum_tile(const Task& t, const Phase& phase, const Call& call,
                                          int64_t i, int64_t j, int64_t tile, GroupSum<A>& g,
                                          int64_t* lines) const {
    const int64_t height = i * view_.step_h;
    const auto outside = [&](int64_t run) {
      const int64_t h = height + phase.heights[run];
      return h < 0 || h >= view_.H;
    };
    Range runs{call.first, call.first + call.count};
    g.weights = t.weights + t.vector * weights_vector_ + phase.weights + call.weights;
    for (; !runs.empty() && outside(runs.begin); ++runs.begin)
      g.weights += phase.runs[runs.begin].channels * call.taps * kL;
    while (!runs.empty() && outside(runs.end - 1)) --runs.end;
    g.src = t.band + ((i - t.i0) * view_.step_h * band_.width + j * view_.step_w) * kL;
    g.runs = phase.runs.data() + runs.begin;
    g.count_runs = runs.size();
    const int64_t channels = runs.empty() ? 0 : phase.runs[runs.begin].channels * runs.size();
    const SourcePrefetch::Run next = t.ahead->take(std::min(*lines, channels * kNextLines));
    g.next = next.first;
    g.next_lines = next.lines;
    g.next_step = next.step;
    *lines -= next.lines;
    if constexpr (kPairs)
      group_pair_sum_kernel(call.taps, view_.step_w, tile)(g);
    else
      group_sum_kernel<A>(call.taps, view_.step_w, band_.groups == 1, tile)(g);
  }

  const ConvView view_;  // of all phases
  const GroupBand band_;
  const std::vector<LaneIndex<A>> lanes_;
  const GroupGrid grid_;
  const GroupImages<A>& images_;
  const bool in_place_;  // the tile itself can finish
  Buffer<A> bias_;       // [block][vector][lanes]
  std::vector<Phase> phases_;
  int64_t weights_vector_ = 0;  // elements of a vector of filters
  int64_t row_tiles_ = 0;       // of a band's row of outputs, of all phases
  int64_t sums_ = 0;            // elements, of a tile or a row
  int64_t out_rows_ = 1;
  bool streams_;  // in_place_, or planes
};

std::vector<GroupPhase> phases_of(const std::vector<ConvView>& views) {
  std::vector<GroupPhase> phases;
  for (const ConvView& view : views) phases.push_back({&view, 0, 0});
  return phases;
}

// A view by itself.
GroupGrid grid_of(const ConvView& view) {
  return {view.I, view.J, 1, 1, view.dst, view.dst_offset};
}

}  // namespace

bool group_band_applies(const ConvView& view, int64_t element_size) {
  const bool permutes = element_size == 8 ? kPermutesLanes<double> : kPermutesLanes<float>;
  return GroupBand(view, element_size, permutes).fits;
}

template <typename T>
int64_t group_weights_size(const ConvView& view) {
  return with_terms<T>(view, [](const ConvView& terms, auto pairs) {
    const GroupBand band = group_band<T>(terms);
    return GroupWeights<T, decltype(pairs)::value>({&terms}, band, nullptr).size();
  });
}

template <typename T>
void group_pack_weights(const ConvView& view, const T* w, Wide<T>* packed, const Parallel& pool) {
  with_terms<T>(view, [&](const ConvView& terms, auto pairs) {
    const GroupBand band = group_band<T>(terms);
    GroupWeights<T, decltype(pairs)::value>({&terms}, band, w).pack(packed, pool);
  });
}

template <typename T>
void group_gather(const ConvView& view, const T* src, const T* w, const Wide<T>* packed,
                  const T* bias, const Epilogue<T>& epilogue, const Parallel& pool) {
  with_terms<T>(view, [&](const ConvView& terms, auto pairs) {
    constexpr bool kPairs = decltype(pairs)::value;
    const GroupGrid grid = grid_of(terms);
    const GroupImagesOf<T, kPairs> images(grid, src, epilogue);
    GroupGather<Wide<T>, kPairs> gather({{&terms, 0, 0}}, grid, images);
    gather.set_bias(bias);
    const GroupWeights<T, kPairs> weights(gather.views(), gather.band(), w);
    gather.run(packed, weights, pool);
  });
}

bool group_dgrad_applies(const std::vector<ConvView>& views, int64_t element_size) {
  return group_band_applies(all_phases(phases_of(views)), element_size);
}

template <typename T>
void group_dgrad(const ConvProblem& p, const std::vector<ConvView>& views, const T* dz, const T* w,
                 T* dx, const Parallel& pool) {
  GroupGrid grid{p.H, p.W, p.stride_h, p.stride_w, views[0].dst, 0};
  const bool nchw = p.layout == Layout::kNCHW;
  grid.strides.row = nchw ? p.W : p.W * p.C;
  grid.strides.column = nchw ? 1 : p.C;
  const Epilogue<T> epilogue{dx, nullptr, Activation::kNone};
  with_terms<T>(views[0], [&](const ConvView&, auto pairs) {
    std::vector<ConvView> terms = views;
    if constexpr (decltype(pairs)::value)
      for (ConvView& view : terms) view = pair_view(view);
    std::vector<GroupPhase> phases = phases_of(terms);
    for (GroupPhase& phase : phases) {
      phase.row = phase.view->dst_offset / grid.strides.row;
      phase.column = phase.view->dst_offset % grid.strides.row / grid.strides.column;
    }
    constexpr bool kPairs = decltype(pairs)::value;
    const GroupImagesOf<T, kPairs> images(grid, dz, epilogue);
    GroupGather<Wide<T>, kPairs> gather(phases, grid, images);
    gather.set_bias(static_cast<const T*>(nullptr));
    const GroupWeights<T, kPairs> weights(gather.views(), gather.band(), w);
    gather.run(nullptr, weights, pool);
  });
}

#define TORCHCONV_GROUP_GATHER(T)                                                                 \
  template int64_t group_weights_size<T>(const ConvView&);                                        \
  template void group_pack_weights(const ConvView&, const T*, Wide<T>*, const Parallel&);         \
  template void group_gather(const ConvView&, const T*, const T*, const Wide<T>*, const T*,       \
                             const Epilogue<T>&, const Parallel&);                                \
  template void group_dgrad(const ConvProblem&, const std::vector<ConvView>&, const T*, const T*, \
                            T*, const Parallel&);
TORCHCONV_GROUP_GATHER(float)
TORCHCONV_GROUP_GATHER(double)
TORCHCONV_GROUP_GATHER(BFloat16)
TORCHCONV_GROUP_GATHER(Float16)
#undef TORCHCONV_GROUP_GATHER

}  // namespace torchconv::cpu
