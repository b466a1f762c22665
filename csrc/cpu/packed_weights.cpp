// One table for all owners behind one mutex, which no work is done under: two threads that find
// nothing both pack, and the second result replaces the first.
#include "cpu/packed_weights.h"

#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace torchconv::cpu {
namespace {

// Values that a sample takes, of eight bytes each.
constexpr int64_t kSampled = 64;
// Forms kept for an owner: images of several sizes may need several.
constexpr size_t kForms = 2;

struct Kept {
  PackedForm form;
  WeightsSource source;
  PackedBuffer packed;
};

class Table {
 public:
  static Table& instance() {
    static Table* const table = new Table;  // never destroyed: owners may outlive static objects
    return *table;
  }

  std::mutex mutex;
  std::unordered_map<int64_t, std::vector<Kept>> owners;  // most recently used form first
  int64_t last = 0;

 private:
  Table() {
    // A child must not inherit a mutex that another thread of its parent held.
    pthread_atfork([] { instance().mutex.lock(); }, [] { instance().mutex.unlock(); },
                   [] { instance().mutex.unlock(); });
  }
};

}  // namespace

bool PackedForm::operator==(const PackedForm& other) const {
  const ConvProblem &a = problem, &b = other.problem;
  return algorithm == other.algorithm && bytes == other.bytes && a.C == b.C && a.K == b.K &&
         a.R == b.R && a.S == b.S && a.groups == b.groups && a.dtype == b.dtype &&
         a.layout == b.layout && a.weight_layout == b.weight_layout && a.flip == b.flip &&
         a.H == b.H && a.W == b.W && a.P == b.P && a.Q == b.Q && a.stride_h == b.stride_h &&
         a.stride_w == b.stride_w && a.pad_top == b.pad_top && a.pad_left == b.pad_left &&
         a.dilation_h == b.dilation_h && a.dilation_w == b.dilation_w;
}

WeightsSource::WeightsSource(const void* weights, int64_t bytes, int64_t weights_version)
    : data(weights), version(weights_version), sample(static_cast<uint64_t>(bytes)) {
  constexpr int64_t kWord = sizeof(uint64_t);
  const char* const begin = static_cast<const char*>(weights);
  const int64_t words = bytes / kWord;
  const int64_t count = std::min(words, kSampled);
  for (int64_t i = 0; i < count; ++i) {
    uint64_t word;
    // The last word is among them. words * count overflows for no size that fits in memory.
    const int64_t at = count > 1 ? (words - 1) * i / (count - 1) : 0;
    std::memcpy(&word, begin + at * kWord, sizeof(word));
    sample = (sample ^ word) * 0x9E3779B97F4A7C15u;
    sample ^= sample >> 32;
  }
  for (int64_t i = words * kWord; i < bytes; ++i)
    sample = (sample ^ static_cast<unsigned char>(begin[i])) * 0x9E3779B97F4A7C15u;
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
  clear(owner);
  Table& table = Table::instance();
  const std::lock_guard<std::mutex> lock(table.mutex);
  table.owners.erase(owner);
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
