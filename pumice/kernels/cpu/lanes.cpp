// Shares the chunks of matrices in lanes out among threads.
#include "lanes.h"

#include <algorithm>

#include "threads.h"

namespace pumice {
namespace {

const int64_t kWorkPerThread = 128 * 1024;  // bytes of stored weights below which another thread costs more than it gives

int64_t step_bytes(const Lanes& w) {
  return kLaneRows * (w.group / 2 + (int64_t)sizeof(BF16)) + (all_stored(w) ? 0 : kLaneRows / 2);
}

// First chunk of piece `k` of `pieces` that have as much stored, to the nearest border since there are few of them.
int64_t piece_start(const Lanes& w, int64_t k, int64_t pieces) {
  const int64_t chunks = lane_chunks(w), target = steps_before(w, chunks) / pieces * k;
  if (k >= pieces) return chunks;
  int64_t low = 0, high = chunks;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if ((steps_before(w, middle) + steps_before(w, middle + 1)) / 2 < target)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

struct Job {
  const Lanes& w;
  const LaneKernels& kernels;
  LaneInput x;
  BF16* y;
  int64_t pieces;
};

void run_pieces(int64_t first, int64_t last, void* context) {
  const Job& job = *(Job*)context;
  const int64_t begin = piece_start(job.w, first, job.pieces), end = piece_start(job.w, last, job.pieces);
  LaneInput x = job.x;
  for (int64_t row = 0; row < job.x.rows; row += kLanesAtOnce) {
    x.words = job.x.words + row * lane_input_bytes(job.w), x.unit = job.x.unit + row;
    x.rows = std::min<int64_t>(kLanesAtOnce, job.x.rows - row);
    job.kernels.product(job.w, begin, end, x, job.y + row * job.w.O);
  }
}

// x as bytes in the scratch of the calling thread.
bool fill(const Lanes& w, const LaneKernels& kernels, const BF16* x, int64_t rows, LaneInput* out) {
  const int64_t bytes = lane_input_bytes(w);
  uint8_t* room = (uint8_t*)scratch(1, (size_t)(rows * (bytes + (int64_t)sizeof(float))));
  if (!room) return false;
  float* unit = (float*)(room + rows * bytes);
  for (int64_t r = 0; r < rows; ++r)
    kernels.fill(w, x + r * w.I, room + r * bytes, unit + r);
  *out = {room, unit, rows};
  return true;
}

struct Expansion {
  const Lanes& w;
  const LaneKernels& kernels;
  int64_t begin, end, pieces;
  BF16* out;
};

void expand_pieces(int64_t first, int64_t last, void* context) {
  const Expansion& job = *(Expansion*)context;
  const int64_t chunks = job.end - job.begin;
  const int64_t begin = job.begin + chunks * first / job.pieces, end = job.begin + chunks * last / job.pieces;
  const int64_t before = (begin - job.begin) * job.w.height * job.w.I;
  job.kernels.expand(job.w, begin, end, job.out + before);
}

}  // namespace

int64_t work_of(const Lanes& w) { return steps_before(w, lane_chunks(w)) * step_bytes(w); }

bool run_lanes(const Lanes& w, const LaneKernels& kernels, const BF16* x, int64_t rows, BF16* y, int64_t threads) {
  if (!rows) return true;
  Job job = {w, kernels, {}, y, 0};
  if (!fill(w, kernels, x, rows, &job.x)) return false;
  const int64_t work = work_of(w) * std::max<int64_t>(1, rows / 4);
  job.pieces = std::max<int64_t>(1, std::min({work / kWorkPerThread, threads, lane_chunks(w)}));
  parallel(job.pieces, run_pieces, &job);
  return true;
}

bool run_lanes_share(const Lanes& w, const LaneKernels& kernels, const BF16* x, int64_t rows, BF16* y, int64_t first,
                     int64_t last, int64_t pieces) {
  Job job = {w, kernels, {}, y, pieces};
  if (!fill(w, kernels, x, rows, &job.x)) return false;
  run_pieces(first, last, &job);
  return true;
}

void expand_lanes(const Lanes& w, const LaneKernels& kernels, int64_t begin, int64_t end, BF16* out, int64_t threads) {
  const int64_t bytes = (end - begin) * w.height * w.I * (int64_t)sizeof(BF16);
  Expansion job = {w, kernels, begin, end, 1, out};
  job.pieces = std::max<int64_t>(1, std::min({bytes / kWorkPerThread, threads, end - begin}));
  parallel(job.pieces, expand_pieces, &job);
}

}  // namespace pumice
