// The switches, and the sizes from which an algorithm wins.
#include "cpu/conv_choice.h"

#include <algorithm>
#include <atomic>

#include "cpu/winograd.h"

namespace torchconv::cpu {
namespace {

std::atomic<bool> winograd_switch{true};

// The transforms of the source are shared by all filters and those of the destination by all
// channels, so both sides must be wide.
constexpr int64_t kWinogradChannels = 32;
// The weights of a sample alone are transformed for its pixels only. Two tiles do not pay for that.
constexpr int64_t kWinogradPixels = 33;

}  // namespace

void allow_winograd(bool allowed) { winograd_switch.store(allowed, std::memory_order_relaxed); }
bool winograd_allowed() { return winograd_switch.load(std::memory_order_relaxed); }

bool gathers_by_winograd(const ConvView& view) {
  return winograd_allowed() && std::min(view.C, view.K) >= kWinogradChannels &&
         view.pixels() >= kWinogradPixels && winograd_applies(view);
}

}  // namespace torchconv::cpu
