// Transposes x and shares the block rows out among threads.
#include "blocks.h"

#include <algorithm>

#include "linear.h"
#include "threads.h"

namespace pumice {
namespace {

const int64_t kPanelBytes = 768 * 1024;          // of x transposed, which is read again and again from the second cache
const int64_t kStepsPerThread = 64;              // transposed by one thread, at least
const int64_t kWorkPerThread = 4 * 1024 * 1024;  // products below which another thread costs more than it gives

struct Job {
  const Matrix* w;
  const BlockPanels* kernels;
  const void* x;
  Panel panel;
  int64_t steps, pieces;
  void* y;
};

void fill_pieces(int64_t first, int64_t last, void* context) {
  const Job& job = *(Job*)context;
  job.kernels->fill(*job.w, job.steps * first / job.pieces, job.steps * last / job.pieces, job.x, job.panel);
}

// The first block row before which there are `target` blocks.
int64_t block_row_at(const Matrix& w, int64_t target) {
  const int32_t* end = w.block_starts + w.O / w.r;
  return std::lower_bound(w.block_starts, end, (int32_t)target) - w.block_starts;
}

void product_pieces(int64_t first, int64_t last, void* context) {
  const Job& job = *(Job*)context;
  const int64_t rows = job.w->O / job.w->r, blocks = job.w->block_starts[rows];
  for (int64_t k = first; k < last; ++k) {
    const int64_t begin = k ? block_row_at(*job.w, blocks * k / job.pieces) : 0;
    const int64_t end = k + 1 < job.pieces ? block_row_at(*job.w, blocks * (k + 1) / job.pieces) : rows;
    job.kernels->product(*job.w, begin, end, job.panel, job.y);
  }
}

int64_t piece_count(int64_t work, int64_t least, int64_t threads) {
  return std::max<int64_t>(1, std::min(work / least, threads));
}

}  // namespace

bool run_blocks(const Matrix& w, const Kernels& kernels, const void* x, int64_t rows, void* y, int64_t threads) {
  const BlockPanels& k = kernels.panels[w.dtype];
  if (rows == 0 || w.O == 0) return true;
  Job job = {&w, &k, x, {}, w.I / w.c * ((w.c + k.columns - 1) / k.columns), 1, y};
  // Panels of about the same width.
  const int64_t most = w.r >= k.tall ? k.width_tall : k.width, all = (rows + most - 1) / most;
  job.panel.width = ((rows + all - 1) / all + k.lanes - 1) / k.lanes * k.lanes;
  const int64_t size = job.steps * k.words * job.panel.width * (int64_t)sizeof(uint32_t);
  const int64_t panels = std::max<int64_t>(1, std::min(kPanelBytes / std::max<int64_t>(size, 1), all));
  job.panel.words = (uint32_t*)scratch(1, (size_t)(panels * size));
  if (!job.panel.words) return false;
  const int64_t together = panels * job.panel.width;
  for (int64_t row = 0; row < rows; row += together) {
    job.panel.rows = std::min(together, rows - row);
    job.x = (const char*)x + row * w.I * element_size(w.dtype);
    job.y = (char*)y + row * w.O * element_size(w.dtype);
    job.pieces = piece_count(job.steps, kStepsPerThread, threads);
    parallel(job.pieces, fill_pieces, &job);
    job.pieces = piece_count(w.count * job.panel.rows, kWorkPerThread, threads);
    parallel(job.pieces, product_pieces, &job);
  }
  return true;
}

}  // namespace pumice
