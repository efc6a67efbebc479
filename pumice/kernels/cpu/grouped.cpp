// Shares the columns of a stage out among threads, the assignments of a hidden layer, and the outputs of gradients of weights.
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

struct HiddenRun {
  const Hidden* hidden;
  HiddenPiece piece;
  int64_t pieces;
};

void take_hidden(int64_t begin, int64_t end, void* context) {
  const HiddenRun& run = *(const HiddenRun*)context;
  const int64_t A = run.hidden->A;
  run.piece(*run.hidden, A * begin / run.pieces, A * end / run.pieces);
}

struct OuterRun {
  const Outer* outer;
  OuterPiece piece;
  int64_t each;  // pieces of an expert
  std::atomic<int64_t> next;
  std::atomic<bool> failed;
};

void take_outer(int64_t, int64_t, void* context) {
  OuterRun& run = *(OuterRun*)context;
  for (int64_t k; (k = run.next++) < run.each * run.outer->E;) {
    const int64_t begin = k % run.each * kOuterPiece, end = begin + kOuterPiece;
    if (!run.piece(*run.outer, k / run.each, begin, end < run.outer->O ? end : run.outer->O)) run.failed = true;
  }
}

}  // namespace

bool run_outer(const Outer& outer, OuterPiece piece, int64_t threads) {
  OuterRun run = {&outer, piece, (outer.O + kOuterPiece - 1) / kOuterPiece, {0}, {false}};
  if (threads > run.each * outer.E) threads = run.each * outer.E;
  if (threads < 2)
    take_outer(0, 1, &run);
  else
    parallel(threads, take_outer, &run);
  return !run.failed;
}

void run_hidden(const Hidden& hidden, HiddenPiece piece, int64_t threads) {
  HiddenRun run = {&hidden, piece, threads < hidden.A ? threads : hidden.A};
  if (run.pieces < 2)
    piece(hidden, 0, hidden.A);
  else
    parallel(run.pieces, take_hidden, &run);
}

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
