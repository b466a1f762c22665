// csrc/core/team.h on pools of every kind, for test_team.py. The exit status tells a fault.
#include "core/team.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace torchconv {
namespace {

int64_t pool_threads;

// PyTorch's: even runs, the first on the calling thread.
void run_threads(int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
  const int64_t pieces = std::min(pool_threads, (end - begin + grain - 1) / grain);
  const int64_t size = (end - begin + pieces - 1) / pieces;
  std::vector<std::thread> others;
  for (int64_t first = begin + size; first < end; first += size)
    others.emplace_back([=] { body(first, std::min(first + size, end), context); });
  body(begin, std::min(begin + size, end), context);
  for (std::thread& other : others) other.join();
}

// As a pool whose threads are busy: one range after another.
void run_one_by_one(int64_t begin, int64_t end, int64_t, Parallel::Body body, void* context) {
  for (int64_t i = begin; i < end; ++i) body(i, i + 1, context);
}

// As within a loop of the pool's own.
void run_at_once(int64_t begin, int64_t end, int64_t, Parallel::Body body, void* context) {
  body(begin, end, context);
}

constexpr Parallel kPools[] = {{run_threads}, {run_one_by_one}, {run_at_once}};

// Loops of every length; each element has to be reached once by each.
int loops(int64_t kind, int64_t threads, int64_t rounds) {
  int fault = 0;
  Team::lead(kPools[kind], threads, [&] {
    for (int64_t round = 0; round < rounds && fault == 0; ++round)
      for (const int64_t count : {0, 1, 2, 3, 7, 64}) {
        std::vector<int64_t> reached(64);
        Team* const team = Team::led_here();
        if (team == nullptr) fault = 1;
        struct Context {
          std::vector<int64_t>& reached;
          int64_t count;
          std::atomic<bool> nested{false};
        } all{reached, count};
        team->run(
            0, count, 1 + round % 3,
            [](int64_t begin, int64_t end, void* context) {
              Context& c = *static_cast<Context*>(context);
              // A loop that is not cut is as if there were none.
              if (Team::led_here() != nullptr && end - begin < c.count) c.nested = true;
              for (int64_t i = begin; i < end; ++i) ++c.reached[i];
            },
            &all);
        if (all.nested) fault = 2;
        for (int64_t i = 0; i < 64; ++i)
          if (reached[i] != (i < count ? 1 : 0)) fault = 3;
      }
  });
  return Team::led_here() == nullptr ? fault : 4;
}

int failure(int64_t kind, int64_t threads) {
  try {
    Team::lead(kPools[kind], threads, [] { throw std::runtime_error("asked for"); });
  } catch (const std::runtime_error&) {
    return Team::led_here() == nullptr ? 0 : 1;
  }
  return 2;
}

}  // namespace
}  // namespace torchconv

int main(int argc, char** argv) {
  const std::string test = argv[1];
  std::vector<int64_t> numbers;
  for (int i = 2; i < argc; ++i) numbers.push_back(std::stoll(argv[i]));
  torchconv::pool_threads = numbers[1];
  return test == "loops" ? torchconv::loops(numbers[0], numbers[2], numbers[3])
                         : torchconv::failure(numbers[0], numbers[1]);
}
