// The runs of row_pairs.h. A row of the image is laid out with its channels side by side and the
// padding written out; from there every output's run is copied.
#include "cpu/row_pairs.h"

#include <algorithm>
#include <cstring>

#include "cpu/channel_pairs.h"
#include "cpu/conv_pack.h"

namespace torchconv::cpu {
namespace {

constexpr int64_t kMostChannels = 7, kMostTerms = 1024;
// Elements of a laid out row, and vectors that are read past its end.
constexpr int64_t kRowElements = 2048, kSlack = 64;
// A patch's elements, and its runs of at least three: a run is odd, and no kernel of one element.
constexpr int64_t kPatchTerms = 2 * kVectorBytes / 4, kPatchRows = kPatchTerms / 3;

int64_t row_taps(const ConvView& view) {
  const auto taps = static_cast<int64_t>(view.taps.size());
  int64_t n = 1;
  while (n < taps && view.taps[n].h == view.taps[0].h) ++n;
  return n;
}

// Puts the channels of planes side by side.
class Interleave {
 public:
  explicit Interleave(int64_t channels) : channels_(channels) {
    for (int64_t i = 0; i < channels * kL; ++i) {
      pixels_[i] = static_cast<uint16_t>(i / channels);
      of_channel_[i] = static_cast<uint16_t>(i % channels);
    }
  }

  // to[p*channels + c] = src[c*plane + p], p < count.
  void run(const BFloat16* src, int64_t plane, int64_t count, BFloat16* to) const {
    for (; count > 0; count -= kL, src += kL, to += channels_ * kL) {
      Halves::Type planes[kMostChannels];
      for (int64_t c = 0; c < channels_; ++c)
        planes[c] = count >= kL ? Halves::load(src + c * plane)
                                : Halves::load_partial(src + c * plane, count);
      const int64_t size = std::min(count, kL) * channels_;
      for (int64_t at = 0; at < size; at += kL) {
        const auto pixels = Halves::load(pixels_ + at), of = Halves::load(of_channel_ + at);
        auto all = permute(planes[0], pixels);
        for (int64_t c = 1; c < channels_; ++c)
          all = of == static_cast<uint16_t>(c) ? permute(planes[c], pixels) : all;
        if (size - at >= kL)
          Halves::store(to + at, all);
        else
          Halves::store_partial(to + at, all, size - at);
      }
    }
  }

 private:
  using Halves = Vec<uint16_t>;
  static constexpr int64_t kL = Halves::kLanes;
  int64_t channels_;
  uint16_t pixels_[kMostChannels * kL], of_channel_[kMostChannels * kL];
};

// Channels [begin, end) of pixels [first, first + count) of a row at src, zero outside the image.
void lay_out(const ConvView& image, const Interleave& interleave, const BFloat16* src,
             int64_t first, int64_t count, BFloat16* to) {
  const int64_t C = image.C;
  const int64_t begin = std::clamp(-first, int64_t{0}, count);
  const int64_t end = std::clamp(image.W - first, begin, count);
  std::fill(to, to + begin * C, BFloat16{});
  std::fill(to + end * C, to + count * C, BFloat16{});
  src += (first + begin) * image.src.column;
  to += begin * C;
  const int64_t n = end - begin;
  if (image.src.c == 1) {
    std::memcpy(to, src, static_cast<size_t>(n * C) * sizeof(BFloat16));
    return;
  }
  interleave.run(src, image.src.c, n, to);
}

// Whether a patch is a run: of rows of the kernel that are neighbours.
bool takes_patches(const ConvView& view) {
  const auto taps = static_cast<int64_t>(view.taps.size());
  const int64_t S = row_taps(view), R = taps / S;
  return R > 1 && R <= kPatchRows && S * view.C % 2 == 1 && view.terms() <= kPatchTerms &&
         view.taps.back().h == view.taps.front().h + R - 1;
}

// The elements of a run's vector: as many as it has pairs at most, and a row of the kernel at most.
using PatchRow = Vec<uint16_t, kVectorBytes / 4>;

// count runs, `apart` elements from one to the next: of `length` elements, step elements apart,
// from each of R rows. kR: their number, or 0. What is written past a run is what follows there.
template <int kR>
void copy_runs(const BFloat16* const (&rows)[kPatchRows], int64_t R, int64_t step, int64_t length,
               int64_t count, int64_t apart, PatchRow::Type inside, BFloat16* to) {
  const int64_t last = (kR > 0 ? kR : R) - 1;
  for (int64_t q = 0; q < count; ++q, to += apart) {
    BFloat16* run = to;
#pragma GCC unroll 4
    for (int64_t r = 0; r < last; ++r, run += length)
      PatchRow::store(run, PatchRow::load(rows[r] + q * step));
    PatchRow::store(run, PatchRow::load(rows[last] + q * step) & inside);
  }
}

void fill_patches(const ConvView& image, const ChannelBand& band, const BFloat16* src, Range i,
                  Range j, float* scratch) {
  BFloat16 laid_out[kPatchRows][kRowElements];
  const Interleave interleave(image.src.c == 1 ? 0 : image.C);
  const int64_t S = row_taps(image), R = static_cast<int64_t>(image.taps.size()) / S;
  const int64_t step = image.step_w * image.C, run = S * image.C;
  const int64_t most = ((kRowElements - kSlack) / image.C - S) / image.step_w + 1;
  const auto inside =
      bit_cast<PatchRow::Type>(Vec<int16_t, PatchRow::kLanes>::iota() < static_cast<int16_t>(run));
  for (int64_t p = 0; p < j.size(); p += most) {
    const int64_t n = std::min(most, j.size() - p);
    const int64_t top = i.begin * image.step_h + image.taps[0].h;
    int64_t next = top;  // row of the image to lay out, in the place of the one that lies R above
    for (int64_t y = 0; y < i.size(); ++y) {
      const int64_t first = top + y * image.step_h;
      for (next = std::max(next, first); next < first + R; ++next) {
        BFloat16* const row = laid_out[(next - top) % R];
        const int64_t width = (n - 1) * image.step_w + S;
        if (next < 0 || next >= image.H)
          std::fill(row, row + width * image.C, BFloat16{});
        else
          lay_out(image, interleave, src + next * image.src.row,
                  (j.begin + p) * image.step_w + image.taps[0].w, width, row);
      }
      const BFloat16* rows[kPatchRows];
      for (int64_t r = 0; r < R; ++r) rows[r] = laid_out[(first + r - top) % R];
      float* pixel = scratch + y * band.row + p * band.pixel;
      const auto copy = R == 3 ? copy_runs<3> : copy_runs<0>;
      copy(rows, R, step, run, n - 1, 2 * band.pixel, inside, reinterpret_cast<BFloat16*>(pixel));
      pixel += (n - 1) * band.pixel;
      for (int64_t r = 0; r < R; ++r) rows[r] += (n - 1) * step;
      // The last pixel has nothing behind it.
      float last[kVectorBytes / 2];
      copy(rows, R, step, run, 1, 0, inside, reinterpret_cast<BFloat16*>(last));
      copy_wide(pixel, last, ceil_div(R * run, int64_t{2}));
    }
  }
}

}  // namespace

ConvView row_image(const ConvView& view) {
  ConvView image = view;
  std::sort(image.taps.begin(), image.taps.end(),
            [](const ConvTap& a, const ConvTap& b) { return a.h != b.h ? a.h < b.h : a.w < b.w; });
  return image;
}

bool takes_row_pairs(const ConvView& any) {
  if (!takes_pairs(any) || any.groups != 1 || any.C % 2 == 0 || any.C > kMostChannels ||
      any.terms() == 0 || any.terms() > kMostTerms)
    return false;
  // Channels or pixels are neighbours in memory.
  if (any.src.c == 1 ? any.src.column != any.C : any.src.column != 1) return false;
  const ConvView view = row_image(any);
  const auto taps = static_cast<int64_t>(view.taps.size());
  const int64_t S = row_taps(view);
  if (S < 2 || taps % S != 0) return false;
  for (int64_t t = 0; t < taps; ++t)
    if (view.taps[t].h != view.taps[t / S * S].h || view.taps[t].w != view.taps[0].w + t % S)
      return false;
  const int64_t span = (kRowElements - kSlack) / view.C;
  return S <= span / 2 && view.step_w <= span / 2;
}

ConvView row_view(const ConvView& view) {
  const int64_t S = row_taps(view), taps = static_cast<int64_t>(view.taps.size());
  ConvView rows = view;
  rows.C = S * view.C;
  rows.W = view.J;
  rows.step_w = 1;
  rows.src.column = view.step_w * view.src.column;
  rows.weight_c = 1;
  rows.weight_k = taps * view.C;
  rows.weight_group = view.K * rows.weight_k;
  rows.taps.clear();
  if (takes_patches(view)) {
    rows.C = taps * view.C;
    rows.H = view.I;
    rows.step_h = 1;
    rows.src.row = view.step_h * view.src.row;
    rows.taps.push_back({0, 0, 0});
    return rows;
  }
  for (int64_t t = 0; t < taps; t += S) rows.taps.push_back({view.taps[t].h, 0, t * view.C});
  return rows;
}

void pack_row_weights(const ConvView& view, const BFloat16* w, BFloat16* rows) {
  for (int64_t k = 0; k < view.K; ++k)
    for (const ConvTap& tap : view.taps)
      for (int64_t c = 0; c < view.C; ++c)
        *rows++ = w[k * view.weight_k + tap.weight + c * view.weight_c];
}

void fill_row_pairs(const ConvView& image, const ChannelBand& band, const ConvView& view,
                    const BFloat16* src, int64_t channels, Range i, Range j, float* scratch) {
  if (takes_patches(image)) return fill_patches(image, band, src, i, j, scratch);
  using Elements = Vec<uint32_t>;
  constexpr int64_t kL = Elements::kLanes;
  BFloat16 laid_out[kRowElements];
  const Interleave interleave(image.src.c == 1 ? 0 : image.C);
  const int64_t step = image.step_w * image.C, S = channels / image.C;
  const int64_t most = ((kRowElements - kSlack) / image.C - S) / image.step_w + 1;
  const int64_t pairs = ceil_div(channels, int64_t{2});
  // Of a run's last vector, without the half that is another pixel's.
  const auto lane =
      Vec<int32_t>::iota() * 2 - static_cast<int32_t>(channels - (pairs - 1) / kL * kL * 2);
  const auto last = bit_cast<Elements::Type>(lane + 1 == 0 ? lane * 0 + 0xffff : lane * 0 - 1);
  band.rows.for_runs(i.begin, i.size(), [&](int64_t y, int64_t h, int64_t height, int64_t step_h) {
    for (const int64_t end = y + height; y < end; ++y, h += step_h) {
      float* pixels = scratch + y * band.row;
      if (h < 0 || h >= view.H) {
        fill_zero(pixels, band.row);
        continue;
      }
      for (int64_t p = 0; p < j.size(); p += most) {
        const int64_t n = std::min(most, j.size() - p);
        const int64_t width = (n - 1) * image.step_w + S;
        lay_out(image, interleave, src + h * image.src.row,
                (j.begin + p) * image.step_w + image.taps[0].w, width, laid_out);
        const BFloat16* run = laid_out;
        float* to = pixels + p * band.pixel;
        for (int64_t q = 0; q < n; ++q, run += step, to += band.pixel)
          for (int64_t c = 0; c < pairs; c += kL) {
            const int64_t lanes = std::min(kL, pairs - c);
            const auto v = Elements::load_partial(run + 2 * c, lanes);
            Elements::store_partial(to + c, c + kL < pairs ? v : v & last, lanes);
          }
      }
    }
  });
}

}  // namespace torchconv::cpu
