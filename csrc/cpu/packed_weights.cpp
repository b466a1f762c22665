// One table for all owners behind one mutex, which no work is done under: two threads that find
// nothing both pack, and the second result replaces the first.
#include "cpu/packed_weights.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "core/fork_safe.h"
#include "core/range.h"
#include "cpu/parallel_range.h"
#include "cpu/simd.h"

namespace torchconv::cpu {
namespace {

// Bytes that are summed as one, and by one thread.
constexpr int64_t kPiece = int64_t{1} << 16;
constexpr uint32_t kFactor = 0x9E3779B1u;
constexpr uint64_t kWideFactor = 0x9E3779B97F4A7C15u;

// Each of 64 lanes is hashed by steps that no two sums, nor two words, share a result of: whatever
// changes one word of a lane changes its sum. The shift is for changes of many words alike, as by a
// sign or by a factor of 2: a polynomial modulo 2^32 takes an even number of flipped signs as none.
using Words = Vec<uint32_t>;

Words::Type next_sum(Words::Type sum, Words::Type words) {
  sum = sum * kFactor + words;
  return sum ^ (sum >> 15);
}

uint64_t checksum_of(const char* data, int64_t bytes) {
  constexpr int64_t kLanes = 64, kRow = kLanes * sizeof(uint32_t), kL = Words::kLanes;
  constexpr int kVectors = kLanes / kL;
  // In registers: sums in memory take as long again as the weights from a last-level cache.
  Words::Type sums[kVectors] = {};
  const auto add = [&](const char* row) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
      sums[v] = next_sum(sums[v], Words::load(row + v * kL * sizeof(uint32_t)));
  };
  int64_t at = 0;
  for (; at + kRow <= bytes; at += kRow) add(data + at);
  char rest[kRow] = {};
  if (at < bytes) std::memcpy(rest, data + at, static_cast<size_t>(bytes - at));
  add(rest);
  uint32_t lanes[kLanes];
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) Words::store(lanes + v * kL, sums[v]);
  auto sum = static_cast<uint64_t>(bytes);
  for (const uint32_t lane : lanes) sum = (sum ^ lane) * kWideFactor;
  return sum;
}

// Forms kept for an owner: images of several sizes may need several.
constexpr size_t kForms = 2;

struct Kept {
  PackedForm form;
  WeightsSource source;
  PackedBuffer packed;
};

struct Table : ForkSafe<Table> {
  std::unordered_map<int64_t, std::vector<Kept>> owners;  // most recently used form first
  int64_t last = 0;
};

}  // namespace

bool PackedForm::operator==(const PackedForm& other) const {
  const ConvProblem &a = problem, &b = other.problem;
  return algorithm == other.algorithm && bytes == other.bytes && cuts == other.cuts && a.C == b.C &&
         a.K == b.K && a.R == b.R && a.S == b.S && a.groups == b.groups && a.dtype == b.dtype &&
         a.layout == b.layout && a.weight_layout == b.weight_layout && a.flip == b.flip &&
         a.H == b.H && a.W == b.W && a.P == b.P && a.Q == b.Q && a.stride_h == b.stride_h &&
         a.stride_w == b.stride_w && a.pad_top == b.pad_top && a.pad_left == b.pad_left &&
         a.dilation_h == b.dilation_h && a.dilation_w == b.dilation_w;
}

WeightsSource::WeightsSource(const void* weights, int64_t bytes, int64_t weights_version,
                             const Parallel& pool)
    : data(weights), version(weights_version), checksum(static_cast<uint64_t>(bytes)) {
  const char* const begin = static_cast<const char*>(weights);
  std::vector<uint64_t> sums(static_cast<size_t>(ceil_div(bytes, kPiece)));
  const int64_t pieces = static_cast<int64_t>(sums.size());
  const WorkSplit split(pieces, static_cast<double>(kPiece));
  split.run(pool, [&](int64_t first, int64_t last, int64_t) {
    for (int64_t i = first; i < last; ++i)
      sums[i] = checksum_of(begin + i * kPiece, std::min(kPiece, bytes - i * kPiece));
  });
  for (const uint64_t sum : sums) {
    checksum = (checksum ^ sum) * kWideFactor;
    checksum ^= checksum >> 32;
  }
}

namespace packed_weights {

int64_t create() {
  Table& table = Table::instance();
  const std::lock_guard<std::mutex> lock(table.mutex);
  table.owners.emplace(++table.last, std::vector<Kept>());
  return table.last;
}

void clear(int64_t owner) {
  Table& table = Table::instance();
  std::vector<Kept> freed;  // after the lock
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.owners.find(owner);
  if (found != table.owners.end()) freed.swap(found->second);
}

void destroy(int64_t owner) {
  Table& table = Table::instance();
  std::vector<Kept> freed;  // after the lock
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.owners.find(owner);
  if (found == table.owners.end()) return;
  freed.swap(found->second);
  table.owners.erase(found);
}

int64_t bytes(int64_t owner) {
  Table& table = Table::instance();
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.owners.find(owner);
  int64_t sum = 0;
  if (found != table.owners.end())
    for (const Kept& kept : found->second) sum += kept.form.bytes;
  return sum;
}

PackedBuffer find(int64_t owner, const PackedForm& form, const WeightsSource& source) {
  Table& table = Table::instance();
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.owners.find(owner);
  if (found == table.owners.end()) return nullptr;
  std::vector<Kept>& all = found->second;
  const auto kept = std::find_if(
      all.begin(), all.end(), [&](const Kept& k) { return k.form == form && k.source == source; });
  if (kept == all.end()) return nullptr;
  std::rotate(all.begin(), kept, kept + 1);
  return all.front().packed;
}

void keep(int64_t owner, const PackedForm& form, const WeightsSource& source, PackedBuffer packed) {
  Table& table = Table::instance();
  std::vector<Kept> dropped;  // after the lock
  const std::lock_guard<std::mutex> lock(table.mutex);
  const auto found = table.owners.find(owner);
  if (found == table.owners.end()) return;
  std::vector<Kept>& all = found->second;
  const auto stale = std::stable_partition(all.begin(), all.end(), [&](const Kept& k) {
    return k.source == source && !(k.form == form);
  });
  dropped.assign(std::make_move_iterator(stale), std::make_move_iterator(all.end()));
  all.erase(stale, all.end());
  all.insert(all.begin(), Kept{form, source, std::move(packed)});
  if (all.size() > kForms) {
    dropped.push_back(std::move(all.back()));
    all.pop_back();
  }
}

}  // namespace packed_weights
}  // namespace torchconv::cpu
