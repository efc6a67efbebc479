// Shares the blocks of a convolution out among threads.
#include "conv.h"

#include <algorithm>

#include "threads.h"

namespace pumice {
namespace {

const int64_t kWorkPerThread = 256 * 1024;  // products below which another thread costs more than it gives

struct Job {
  Convolved all;
  const ConvKernel* kernel;
  Planes planes;
  int64_t reach;       // what the farthest tap reads behind the first, in a phase
  const char* x;
  int64_t image;       // bytes of x of one image
  int64_t total, each; // outputs, or bundles, and how many of them are shared out together:
  int64_t chunks;
  int64_t pieces;
  bool by_outputs;     // pieces are ranges of outputs
  bool out_of_memory;
};

// What the outputs before chunk `k` cost: their products, and loading and storing their sums.
int64_t cost_before(const Taps& w, int64_t k) {
  const int64_t parts = part_count(w), outputs = std::min(w.O, k * kOutputs);
  int64_t cost = 2 * parts * outputs;
  for (int64_t p = 0; p < parts; ++p) cost += w.starts[p * (w.O + 1) + outputs] - w.starts[p * (w.O + 1)];
  return cost;
}

int64_t cost_before(const Bundles& w, int64_t k) { return w.starts[k] + 4 * k; }

int64_t cost_before(const Job& job, int64_t k) {
  return job.all.w ? cost_before(*job.all.w, k) : cost_before(*job.all.bundles, k);
}

// The chunk before which about `part` of the cost of all outputs lies.
int64_t chunk_at(const Job& job, double part) {
  const double cost = part * (double)cost_before(job, job.chunks);
  int64_t chunk = 0;
  while (chunk < job.chunks && (double)cost_before(job, chunk + 1) <= cost) ++chunk;
  return chunk;
}

// Blocks [block, last_block) with all their outputs, but of the first only chunks from `chunk` on, and `last_chunk` of the one
// behind the last. Or, where `by_outputs`, chunks [chunk, last_chunk) of every block.
struct Piece {
  int64_t block, chunk, last_block, last_chunk;
};

void piece_begin(const Job& job, int64_t k, int64_t* block, int64_t* chunk) {
  const int64_t blocks = job.all.conv->N * job.all.blocks;
  // In units of a block's cost, since the product of all could be too large.
  *block = blocks * k / job.pieces;
  *chunk = chunk_at(job, (double)blocks * (double)k / (double)job.pieces - (double)*block);
  if (*chunk == job.chunks) ++*block, *chunk = 0;
}

Piece pieces(const Job& job, int64_t first, int64_t last) {
  Piece piece = {};
  if (job.by_outputs) {
    piece.last_block = job.all.conv->N * job.all.blocks;
    piece.chunk = first ? chunk_at(job, (double)first / (double)job.pieces) : 0;
    piece.last_chunk = last < job.pieces ? chunk_at(job, (double)last / (double)job.pieces) : job.chunks;
    return piece;
  }
  piece_begin(job, first, &piece.block, &piece.chunk);
  piece_begin(job, last, &piece.last_block, &piece.last_chunk);
  return piece;
}

// Each thread lays out what it reads itself: other threads' caches are farther than the work is long.
void product_pieces(int64_t first, int64_t last, void* context) {
  Job& job = *(Job*)context;
  const Taps* w = job.all.w;
  const int64_t positions = job.kernel->positions, blocks = job.all.blocks, planes = job.all.conv->C * job.all.channel;
  void* panel = w ? scratch(0, (size_t)(w->part * positions) * sizeof(float)) : nullptr;
  float* sums = w ? (float*)scratch(2, (size_t)(w->O * positions) * sizeof(float)) : nullptr;
  void* laid = job.all.as_it_is ? nullptr : scratch(1, (size_t)((planes + kSpill) * job.kernel->size));
  if ((w && !(panel && sums)) || !(laid || job.all.as_it_is)) {
    job.out_of_memory = true;
    return;
  }
  const Piece piece = pieces(job, first, last);
  if (job.by_outputs && piece.chunk == piece.last_chunk) return;
  int64_t block = piece.block, chunk = piece.chunk;
  const int64_t stop = piece.last_chunk && !job.by_outputs ? piece.last_block + 1 : piece.last_block;
  while (block < stop) {
    const int64_t image = block / blocks, end = std::min(stop, (image + 1) * blocks);
    Convolved mine = job.all;
    mine.planes = job.x + image * job.image;
    if (laid) {
      const int64_t begin = block_begin(mine, block % blocks) / mine.width;
      const int64_t furthest = block_end(mine, (end - 1) % blocks) - 1 + job.reach;
      job.kernel->lay_out(job.planes, mine.planes, begin, std::min(job.planes.rows, furthest / mine.width + 1), laid);
      mine.planes = laid;
    }
    for (; block < end; ++block, chunk = job.by_outputs ? piece.chunk : 0) {
      const int64_t last_one = job.by_outputs || block == piece.last_block ? piece.last_chunk : job.chunks;
      job.kernel->product(mine, block, chunk * job.each, std::min(job.total, last_one * job.each), panel, sums);
    }
  }
}

// `job` knows the matrix, how it is shared out, and its kernel; there are `count` products for each position.
bool run(Job& job, const Conv& conv, int64_t O, int dtype, int64_t count, const void* x, void* y, int64_t threads) {
  const int64_t taps = conv.kernel[0] * conv.kernel[1];
  if (conv.N == 0 || O == 0 || conv.out[0] == 0 || conv.out[1] == 0) return true;
  int64_t shifts[kMostTaps], phase_of[kMostTaps];
  Planes& planes = job.planes;
  planes.conv = &conv;
  // A phase has as many rows and columns as the last tap of all phases reads.
  auto extent = [&conv](int axis) {
    return conv.out[axis] + (conv.kernel[axis] - 1) * conv.dilation[axis] / conv.stride[axis];
  };
  planes.rows = extent(0), planes.width = extent(1);
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t row = t / conv.kernel[1] * conv.dilation[0], column = t % conv.kernel[1] * conv.dilation[1];
    const int64_t r = row % conv.stride[0] - conv.before[0], shift = conv.before[1] - column % conv.stride[1];
    int64_t p = 0;
    while (p < planes.phases && (planes.phase[p].row != r || planes.phase[p].shift != shift)) ++p;
    if (p == planes.phases) {
      const int64_t stride = conv.stride[1], width = planes.width;
      const int64_t begin = std::min(width, shift > 0 ? (shift + stride - 1) / stride : 0);
      planes.phase[planes.phases++] = {r, shift, begin, std::max(begin, std::min(width, (conv.W + shift + stride - 1) / stride))};
    }
    phase_of[t] = p;
    shifts[t] = row / conv.stride[0] * planes.width + column / conv.stride[1];
    job.reach = std::max(job.reach, shifts[t]);
  }
  for (int64_t t = 0; t < taps; ++t) shifts[t] += phase_of[t] * planes.rows * planes.width;
  Convolved& all = job.all;
  const int64_t size = dtype == kF32 ? sizeof(float) : sizeof(BF16);
  job.x = (const char*)x, job.image = conv.C * conv.H * conv.W * size;
  all.conv = &conv, all.shifts = shifts, all.taps = taps, all.y = y, all.width = planes.width;
  all.positions = (conv.out[0] - 1) * planes.width + conv.out[1];
  all.blocks = (all.positions + job.kernel->positions - 1) / job.kernel->positions, all.lanes = job.kernel->lanes;
  all.channel = planes.channel = planes.phases * planes.rows * planes.width;
  const int64_t work = std::max<int64_t>(count, O) * all.positions * conv.N;
  all.as_it_is = job.kernel->size == size && planes.phases == 1 && conv.stride[0] == 1 && conv.stride[1] == 1 &&
                 conv.before[0] == 0 && conv.before[1] == 0 && planes.rows == conv.H && planes.width == conv.W;
  job.chunks = (job.total + job.each - 1) / job.each;
  job.pieces = std::max<int64_t>(1, std::min(work / kWorkPerThread, threads));
  // Few blocks do not come out even, and each would read all weights. But every thread copies the columns of taps.
  job.by_outputs = job.pieces > 1 && conv.N * all.blocks <= 3 * job.pieces && job.chunks >= 2 * job.pieces &&
                   (!all.w || O >= 2 * all.w->I);
  parallel(job.pieces, product_pieces, &job);
  return !job.out_of_memory;
}

}  // namespace

bool run_conv(const Taps& w, const ConvKernels& kernels, const Conv& conv, const void* x, void* y, int64_t threads) {
  Job job = {};
  job.all.w = &w, job.total = w.O, job.each = kOutputs, job.kernel = &kernels.of[w.dtype];
  return run(job, conv, w.O, w.dtype, w.count, x, y, threads);
}

bool run_conv(const Bundles& w, const ConvKernels& kernels, const Conv& conv, const void* x, void* y, int64_t threads) {
  Job job = {};
  job.all.bundles = &w, job.total = bundle_count(w), job.each = 1, job.kernel = &kernels.bundles[w.dtype];
  return run(job, conv, w.O, w.dtype, 2 * kBundle * w.count, x, y, threads);
}

}  // namespace pumice
