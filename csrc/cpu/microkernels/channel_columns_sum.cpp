// channel_columns_sum and channel_columns_spread.
#include "cpu/microkernels/channel_columns_impl.h"
#include "cpu/microkernels/channel_columns_rounded.h"
#include "cpu/microkernels/direct_tile.h"

namespace torchconv::cpu {

template <typename T>
void channel_columns_sum(const ChannelColumns& p, const ChannelColumnsSum<T>& t) {
  if constexpr (std::is_same_v<T, BFloat16>)
    if (has_pair_products()) return channel_columns_rounded_sum(p, t);
  sum_columns<T, ChannelVec<T>>(p, t);
}

template <typename T>
void channel_columns_spread(const ChannelColumns& p, const ChannelColumnsSum<T>& t) {
  if constexpr (std::is_same_v<T, BFloat16>)
    if (has_pair_products()) return channel_columns_rounded_spread(p, t);
  spread_columns<T, ChannelVec<T>>(p, t);
}

#define TORCHCONV_CHANNEL_COLUMNS(T)                                                     \
  template void channel_columns_sum(const ChannelColumns&, const ChannelColumnsSum<T>&); \
  template void channel_columns_spread(const ChannelColumns&, const ChannelColumnsSum<T>&);
TORCHCONV_CHANNEL_COLUMNS(float)
TORCHCONV_CHANNEL_COLUMNS(double)
TORCHCONV_CHANNEL_COLUMNS(BFloat16)
TORCHCONV_CHANNEL_COLUMNS(Float16)
#undef TORCHCONV_CHANNEL_COLUMNS

}  // namespace torchconv::cpu
