// channel_columns_sum and channel_columns_spread of bfloat16 where the processor rounds to it by
// one instruction (has_pair_products).
#pragma once

#include "cpu/microkernels/channel_columns.h"

namespace torchconv::cpu {

void channel_columns_rounded_sum(const ChannelColumns& p, const ChannelColumnsSum<BFloat16>& t);
void channel_columns_rounded_spread(const ChannelColumns& p, const ChannelColumnsSum<BFloat16>& t);

}  // namespace torchconv::cpu
