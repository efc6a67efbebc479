// Shares the columns of a stage out among threads.
#include "grouped.h"

#include <atomic>

#include "threads.h"

namespace pumice {
namespace {

constexpr int64_t kGrain = 16;  // columns that are never split

struct Run {
  const Stage* stage;
  StagePiece piece;
  int64_t width, pieces;
  std::atomic<int64_t> next;
  std::atomic<bool> failed;
};

void take(int64_t, int64_t, void* context) {
  Run& run = *(Run*)context;
  for (int64_t k; (k = run.next++) < run.pieces;) {
    const int64_t begin = k * run.width, end = begin + run.width;
    if (!run.piece(*run.stage, begin, end < run.stage->columns ? end : run.stage->columns)) run.failed = true;
  }
}

}  // namespace

bool run_stage(const Stage& stage, StagePiece piece, int64_t threads) {
  Run run = {&stage, piece, 0, 0, {0}, {false}};
  // Some pieces more than threads, so that a thread that is held up does not hold up the others.
  int64_t width = stage.columns / (threads < 2 ? 1 : 4 * threads) / kGrain * kGrain;
  run.width = width > 128 ? 128 : width < kGrain ? kGrain : width;
  run.pieces = (stage.columns + run.width - 1) / run.width;
  if (threads > run.pieces) threads = run.pieces;
  if (threads < 2)
    take(0, 1, &run);
  else
    parallel(threads, take, &run);
  return !run.failed;
}

}  // namespace pumice
