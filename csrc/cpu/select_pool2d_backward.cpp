// Max and min pooling's backward: dx receives dy at the selected elements. The kernels are in
// select_pool2d_rows.h and select_pool2d_scatter.h; here the run-time types and the sizes choose
// one.
#include "cpu/adaptive_window.h"
#include "cpu/pool2d.h"
#include "cpu/select_pool2d_rows.h"
#include "cpu/select_pool2d_scatter.h"

namespace torchconv::cpu {

void SelectionTaps::list_row(const PoolProblem& p, const RowGeometry& g, int64_t h, int64_t origin,
                             int64_t pitch, bool copied) {
  for (size_t phase = 0; phase + 1 < g.phases.first.size(); phase++) {
    for (const Contribution* w = g.windows.begin(h); w != g.windows.end(h); w++) {
      const int64_t from = origin + (copied ? w - g.windows.begin(h) : w->output) * pitch;
      for (const Contribution* t = g.phases.begin(phase); t != g.phases.end(phase); t++)
        list.push_back({from + t->output * g.channels, w->tap * p.S + t->tap});
    }
    first.push_back(list.size());
  }
}

void SelectionTaps::skip_row(const RowGeometry& g) {
  first.insert(first.end(), static_cast<size_t>(g.phase_count()), list.size());
}

void SelectionTaps::list_run(const PoolProblem& p, const RowGeometry& g) {
  for (int64_t r = std::min(p.R - 1, (p.H - 1 + p.pad_h) / p.dilation_h); r >= 0; r--) {
    const int64_t h = r * p.dilation_h - p.pad_h;
    for (int64_t s = std::min(p.S - 1, (p.W - 1 + p.pad_w) / p.dilation_w); s >= 0; s--) {
      const int64_t w = s * p.dilation_w - p.pad_w;
      if (h <= -p.H || w <= -p.W) continue;
      list.push_back({-(h * p.W + w) * g.channels, r * p.S + s});
    }
  }
  first.push_back(list.size());
}

bool selection_reads_inside(const RowGeometry& g, int64_t plane, int64_t h, int64_t total,
                            int lanes) {
  if (g.windows.count(h) == 0) return true;
  return plane + g.windows.begin(h)->output * g.out_row >= g.left &&
         plane + (g.windows.end(h) - 1)->output * g.out_row + g.reach(lanes) <= total;
}

SelectionPlan::SelectionPlan(const PoolProblem& p, const RowGeometry& g, int64_t copied_pitch,
                             bool in_place, int64_t total, int lanes) {
  const bool same = p.stride_h == 1 && p.stride_w == 1 && p.P == p.H && p.Q == p.W;
  if (in_place && same) run.list_run(p, g);
  const int64_t last_plane = (g.planes - 1) * p.P * g.out_row;
  for (int64_t h = 0; h < p.H; h++) {
    if (in_place) rows.list_row(p, g, h, 0, g.out_row, false);
    // Only the tensor's first and last rows reach outside.
    if (in_place && selection_reads_inside(g, 0, h, total, lanes) &&
        selection_reads_inside(g, last_plane, h, total, lanes))
      copied_rows.skip_row(g);
    else
      copied_rows.list_row(p, g, h, g.left, copied_pitch, true);
  }
}

SelectionPlan::~SelectionPlan() = default;

int64_t scatter_distance(const PoolProblem& p, int64_t code) {
  const Axis h = vertical_axis(p), w = horizontal_axis(p);
  const int64_t r = code / p.S, s = code % p.S;
  if (code < 0 || code >= p.R * p.S || r > (h.size - 1 + h.pad) / h.dilation ||
      s > (w.size - 1 + w.pad) / w.dilation)
    return kNowhere;
  return r * p.dilation_h * p.W + s * p.dilation_w;
}

std::vector<int64_t> scatter_distances(const PoolProblem& p, int64_t codes) {
  std::vector<int64_t> distances(static_cast<size_t>(codes));
  for (int64_t code = 0; code < codes; code++)
    distances[static_cast<size_t>(code)] = scatter_distance(p, code);
  return distances;
}

namespace {

// Rows of a band, for windows of `span` rows.
int64_t band_rows(int64_t height, int64_t span, int64_t images, int64_t row_bytes) {
  constexpr int64_t kBands = 8, kCache = 256 * 1024;
  // Too little for two threads is cut by the cache alone.
  const bool small = images * height * row_bytes < 2 * pool_grain(1);
  const int64_t bands = images >= kBands || small ? 1 : ceil_div(kBands, images);
  const int64_t wanted =
      std::min(ceil_div(height, bands), kCache / std::max<int64_t>(row_bytes, 1));
  return std::min(std::max({wanted, 4 * span, int64_t{1}}), height);
}

template <typename OutputsOf>
std::vector<ScatterBand> bands_of(int64_t height, int64_t rows, OutputsOf outputs_of) {
  std::vector<ScatterBand> bands;
  for (int64_t begin = 0; begin < height; begin += rows) {
    const Range band{begin, std::min(begin + rows, height)};
    bands.push_back({band, outputs_of(band)});
  }
  for (size_t i = 0; i < bands.size(); i++) {
    ScatterBand& band = bands[i];
    band.shared_before = i > 0 ? bands[i - 1].outputs.end : 0;
    band.shared_from = i + 1 < bands.size() ? bands[i + 1].outputs.begin : band.outputs.end;
  }
  return bands;
}

}  // namespace

std::vector<ScatterBand> scatter_bands(const Axis& vertical, int64_t images, int64_t row_bytes) {
  const int64_t span = vertical.span();
  const int64_t rows = band_rows(vertical.size, span, images, row_bytes);
  return bands_of(vertical.size, rows, [&](Range band) {
    // From the first output whose last tap may be there to the last whose first one may.
    const int64_t taps =
        std::min(vertical.taps - 1, (vertical.size + vertical.pad) / vertical.dilation);
    const int64_t first = band.begin + vertical.pad - taps * vertical.dilation;
    return Range{std::clamp<int64_t>(ceil_div(first, vertical.stride), 0, vertical.out),
                 std::clamp<int64_t>(floor_div(band.end - 1 + vertical.pad, vertical.stride) + 1, 0,
                                     vertical.out)};
  });
}

std::vector<ScatterBand> adaptive_scatter_bands(int64_t height, int64_t outputs, int64_t images,
                                                int64_t row_bytes) {
  const int64_t rows = band_rows(height, largest_window(height, outputs), images, row_bytes);
  const auto windows = adaptive_windows(outputs, height);
  return bands_of(height, rows, [&](Range band) {
    return Range{at(windows, band.begin).begin, at(windows, band.end - 1).end};
  });
}

namespace {

template <typename T, typename Codes>
void scatter(const PoolProblem& p, const T* dy, Codes selected, T* dx, const Parallel& pool) {
  ScatterImages<T, Codes>(p, dy, selected, dx, false).run(pool);
}

// Gathering compares a vector of codes for every window that an element belongs to; scattering
// takes some steps for every output. On planes gathering is better only where the outputs are as
// many as the inputs and rows are read in place, and windows small.
template <typename T>
bool runs_by_scatter(const PoolProblem& p, Selected kind) {
  if (kind == Selected::kOffset16 || kind == Selected::kOffset32) return true;
  constexpr int64_t kLanes = WideVec<T>::kLanes;
  const bool wide_index = kind == Selected::kIndex64 && sizeof(LaneInt<T>) == 4 &&
                          p.H * p.W > INT32_MAX;  // does not fit a lane
  if (wide_index) return true;
  // Pixels of less than a vector are gathered well only as whole rows.
  const bool wide = runs_channels_last(p) && p.C >= kLanes;
  if (p.stride_w > (wide ? 2 : 1)) return true;
  if (!runs_channels_last(p) &&
      (p.Q < p.W || (p.W < kLanes && (p.P != p.H || p.Q != p.W || p.stride_h != 1))))
    return true;
  const int64_t windows = ceil_div(p.R, p.stride_h) * ceil_div(p.S, p.stride_w);
  // The outputs are fewer than the elements by the strides.
  return windows > kLanes / (std::min(p.stride_h, p.H) * p.stride_w);
}

template <typename T>
void backward_as(const PoolProblem& p, Selected kind, const void* grad, const void* selected,
                 void* grad_input, const Parallel& pool) {
  const T* dy = static_cast<const T*>(grad);
  T* dx = static_cast<T*>(grad_input);
  if (runs_by_scatter<T>(p, kind)) {
    switch (kind) {
      case Selected::kOffset8:
        return scatter(p, dy, static_cast<const uint8_t*>(selected), dx, pool);
      case Selected::kOffset16:
      case Selected::kOffset32:
        return scatter(p, dy,
                       WideOffsets{static_cast<const char*>(selected), kind == Selected::kOffset16},
                       dx, pool);
      case Selected::kIndex64:
        return scatter(p, dy, static_cast<const int64_t*>(selected), dx, pool);
    }
  }
  if (kind == Selected::kOffset8) {
    SelectionRows<T, false>(p, dy, selected, dx).run(pool);
  } else {
    SelectionRows<T, true>(p, dy, selected, dx).run(pool);
  }
}

}  // namespace

void select_pool2d_backward(const PoolProblem& p, Selected kind, const void* dy,
                            const void* selected, void* dx, const Parallel& pool) {
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return backward_as<float>(p, kind, dy, selected, dx, pool);
    case DType::kFloat64:
      return backward_as<double>(p, kind, dy, selected, dx, pool);
    case DType::kBFloat16:
      return backward_as<BFloat16>(p, kind, dy, selected, dx, pool);
    case DType::kFloat16:
      return backward_as<Float16>(p, kind, dy, selected, dx, pool);
    default:
      return;  // the integer types have no gradient
  }
}

}  // namespace torchconv::cpu
