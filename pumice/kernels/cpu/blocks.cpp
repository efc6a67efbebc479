// Transposes x and shares the block rows out among threads.
#include "blocks.h"

#include <algorithm>

#include "linear.h"
#include "threads.h"

namespace pumice {
namespace {

const int64_t kPanelBytes = 768 * 1024;          // of x transposed, which is read again and again from the second cache
const int64_t kStepsPerThread = 64;              // transposed by one thread, at least
const int64_t kRoundedPerThread = 32 * 1024;     // numbers of x rounded by one thread, at least
const int64_t kWorkPerThread = 4 * 1024 * 1024;  // products below which another thread costs more than it gives
const int64_t kStrip = 32;                       // rows of a matrix without blocks that are multiplied at once, as one block

struct Job {
  const Matrix* w;
  const BlockPanels* kernels;
  const void* x;
  Panel panel;
  int64_t steps, pieces;
  void* y;
  const BytePanels* rounding;  // where x is multiplied in bytes
  ByteRows bytes;
  bool out_of_memory;
};

void fill_pieces(int64_t first, int64_t last, void* context) {
  const Job& job = *(Job*)context;
  job.kernels->fill(*job.w, job.steps * first / job.pieces, job.steps * last / job.pieces, job.x, job.panel);
}

void round_pieces(int64_t first, int64_t last, void* context) {
  const Job& job = *(Job*)context;
  const int64_t begin = job.bytes.rows * first / job.pieces, end = job.bytes.rows * last / job.pieces;
  job.rounding->round(job.x, job.w->I, begin, end, job.bytes);
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

// Integers that are no blocks: strips of rows are multiplied as blocks, after what is left out was written out as zeros.
void row_pieces(int64_t first, int64_t last, void* context) {
  Job& job = *(Job*)context;
  const Matrix& w = *job.w;
  const int32_t none = 0, one[2] = {0, 1};
  const int64_t strips = (w.O + kStrip - 1) / kStrip;
  char* spare = w.mask ? (char*)scratch(0, (size_t)(kStrip * w.I + kSpareRows * (w.I + 64))) : nullptr;
  if (w.mask && !spare) {
    job.out_of_memory = true;
    return;
  }
  Matrix rows = w;
  rows.mask = nullptr, rows.starts = nullptr, rows.columns = &none, rows.block_starts = one;
  for (int64_t strip = strips * first / job.pieces; strip < strips * last / job.pieces; ++strip) {
    const int64_t o = strip * kStrip;
    rows.r = std::min(kStrip, w.O - o);
    rows.values = (const int8_t*)w.values + o * w.I;
    if (w.mask) {
      job.rounding->expand(w, o, o + rows.r, (int8_t*)spare, spare + kStrip * w.I);
      rows.values = spare;
    }
    rows.sums = w.sums + o, rows.bias = w.bias ? w.bias + o : nullptr;
    rows.scales = (const char*)w.scales + o * element_size(w.dtype);
    job.kernels->product(rows, 0, 1, job.panel, (char*)job.y + o * element_size(w.dtype));
  }
}

int64_t piece_count(int64_t work, int64_t least, int64_t threads) {
  return std::max<int64_t>(1, std::min(work / least, threads));
}

// A job for panels of `rows` rows in all, as many together as the cache has room for; their number, or 0 when memory ran out.
int64_t lay_out(Job* job, int64_t rows) {
  const Matrix& w = *job->w;
  const BlockPanels& k = *job->kernels;
  job->steps = w.I / w.c * ((w.c + k.columns - 1) / k.columns);
  // Panels of about the same width.
  const int64_t most = w.r >= k.tall ? k.width_tall : k.width, all = (rows + most - 1) / most;
  job->panel.width = ((rows + all - 1) / all + k.lanes - 1) / k.lanes * k.lanes;
  const int64_t size = job->steps * k.words * job->panel.width * (int64_t)sizeof(uint32_t);
  const int64_t panels = std::max<int64_t>(1, std::min(kPanelBytes / std::max<int64_t>(size, 1), all));
  job->panel.words = (uint32_t*)scratch(1, (size_t)(panels * size));
  return job->panel.words ? panels * job->panel.width : 0;
}

// Fills the panel and multiplies it.
void multiply(Job* job, int64_t threads) {
  job->pieces = piece_count(job->steps, kStepsPerThread, threads);
  parallel(job->pieces, fill_pieces, job);
  const int64_t work = job->w->mask ? job->w->O * job->w->I : job->w->count;
  job->pieces = piece_count(work * job->panel.rows, kWorkPerThread, threads);
  parallel(job->pieces, job->w->columns ? product_pieces : row_pieces, job);
}

}  // namespace

bool run_blocks(const Matrix& w, const Kernels& kernels, const void* x, int64_t rows, void* y, int64_t threads) {
  if (rows == 0 || w.O == 0) return true;
  Job job = {};
  job.w = &w, job.kernels = &kernels.panels[w.dtype], job.panel.each = 1;
  const int64_t together = lay_out(&job, rows);
  if (!together) return false;
  for (int64_t row = 0; row < rows; row += together) {
    job.panel.rows = std::min(together, rows - row);
    job.x = (const char*)x + row * w.I * element_size(w.dtype);
    job.y = (char*)y + row * w.O * element_size(w.dtype);
    multiply(&job, threads);
  }
  return true;
}

bool run_bytes(const Matrix& stored, const BytePanels& kernels, const void* x, int64_t rows, void* y, int each,
               int64_t threads) {
  if (rows == 0 || stored.O == 0) return true;
  Matrix w = stored;
  if (!w.columns) w.r = kStrip, w.c = w.I;
  Job job = {};
  job.w = &w, job.kernels = &kernels.panels, job.panel.each = each, job.rounding = &kernels;
  const int64_t together = lay_out(&job, rows * each) / each, stride = (w.I + 63) / 64 * 64;
  if (!together) return false;
  job.bytes.bytes = (int8_t*)scratch(2, (size_t)(together * (each * stride + (int64_t)sizeof(float))));
  if (!job.bytes.bytes) return false;
  job.bytes.unit = (float*)(job.bytes.bytes + together * each * stride), job.bytes.stride = stride, job.bytes.each = each;
  job.panel.unit = job.bytes.unit;
  for (int64_t row = 0; row < rows; row += together) {
    job.bytes.rows = std::min(together, rows - row), job.panel.rows = job.bytes.rows * each;
    job.x = (const char*)x + row * w.I * element_size(w.dtype);
    job.y = (char*)y + row * w.O * element_size(w.dtype);
    job.pieces = piece_count(job.bytes.rows * w.I, kRoundedPerThread, threads);
    parallel(job.pieces, round_pieces, &job);
    job.x = &job.bytes;
    multiply(&job, threads);
  }
  return !job.out_of_memory;
}

}  // namespace pumice
