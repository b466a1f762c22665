// Scratch that several threads write and each of them then reads, call after call in the same
// memory: a plain store waits for the line to leave the caches of those that have read it, which
// between caches that share no level takes ten times as long as to write it to memory. So such
// stores are streamed (WideVec::store). With narrower vectors a line takes several stores, which
// seldom meet.
#pragma once

#include "cpu/simd.h"

namespace torchconv::cpu {

inline bool streams_shared(bool several_threads) { return kVectorBytes == 64 && several_threads; }

}  // namespace torchconv::cpu
