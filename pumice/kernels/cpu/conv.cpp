// Lays out the input of a convolution, and shares its blocks out among threads.
#include "conv.h"

#include <algorithm>

#include "threads.h"

namespace pumice {
namespace {

const int64_t kWorkPerThread = 256 * 1024;  // products below which another thread costs more than it gives

inline void copy(float from, float* to) { *to = from; }
inline void copy(BF16 from, float* to) { *to = widen(from); }
inline void copy(BF16 from, BF16* to) { *to = from; }

template <class From, class To>
inline void copy_run(const From* from, int64_t stride, int64_t n, To* to) {
  if (stride == 1 && sizeof(From) == sizeof(To)) {
    memcpy(to, from, (size_t)n * sizeof(To));
    return;
  }
  for (int64_t k = 0; k < n; ++k) copy(from[k * stride], to + k);
}

struct Job {
  Convolved all;
  const ConvKernel* kernel;
  const void* x;
  // Phases that some tap reads: their first row and column.
  int64_t phases, rows, first[kMostTaps][2];
  void* planes;
  int64_t pieces;
  bool out_of_memory;
};

// Row `r` of each phase of one channel. A phase's first row and column are those of its taps; where they lie before x, or after
// it, there are zeros.
template <class From, class To>
void lay_out(const Job& job, int64_t n, int64_t c, int64_t r) {
  const Conv& conv = *job.all.conv;
  const int64_t width = job.all.width, stride = conv.stride[1];
  To* to = (To*)job.planes + (n * conv.C + c) * job.all.channel + r * width;
  for (int64_t p = 0; p < job.phases; ++p, to += job.rows * width) {
    const int64_t row = job.first[p][0] + r * conv.stride[0] - conv.before[0], shift = conv.before[1] - job.first[p][1];
    if (row < 0 || row >= conv.H) {
      std::fill(to, to + width, To{});
      continue;
    }
    // Columns [begin, end) of the phase lie inside of x.
    const int64_t begin = std::min(width, shift > 0 ? (shift + stride - 1) / stride : 0);
    const int64_t end = std::max(begin, std::min(width, (conv.W + shift + stride - 1) / stride));
    std::fill(to, to + begin, To{});
    const int64_t at = ((n * conv.C + c) * conv.H + row) * conv.W - shift;
    copy_run((const From*)job.x + at + begin * stride, stride, end - begin, to + begin);
    std::fill(to + end, to + width, To{});
  }
}

// A thread lays out about the rows that it multiplies afterwards, and that it wrote when x was made: they are in its cache.
template <class From, class To>
void lay_out_pieces(int64_t first, int64_t last, void* context) {
  const Job& job = *(Job*)context;
  const Conv& conv = *job.all.conv;
  const int64_t rows = conv.N * job.rows;
  int64_t at = rows * first / job.pieces;
  for (const int64_t stop = rows * last / job.pieces; at < stop;) {
    const int64_t n = at / job.rows, begin = at % job.rows, end = std::min(job.rows, begin + stop - at);
    for (int64_t c = 0; c < conv.C; ++c)
      for (int64_t r = begin; r < end; ++r) lay_out<From, To>(job, n, c, r);
    at += end - begin;
  }
}

// What the outputs before chunk `k` cost: their products, and loading and storing their sums.
int64_t cost_before(const Taps& w, int64_t k) {
  const int64_t parts = part_count(w), outputs = std::min(w.O, k * kOutputs);
  int64_t cost = 2 * parts * outputs;
  for (int64_t p = 0; p < parts; ++p) cost += w.starts[p * (w.O + 1) + outputs] - w.starts[p * (w.O + 1)];
  return cost;
}

// Where piece `k` begins: block and chunk of outputs.
void piece_begin(const Job& job, int64_t k, int64_t* block, int64_t* chunk) {
  const Taps& w = *job.all.w;
  const int64_t chunks = (w.O + kOutputs - 1) / kOutputs, whole = cost_before(w, chunks);
  const int64_t blocks = job.all.conv->N * job.all.blocks;
  // In units of a block's cost, since the product of all could be too large.
  *block = blocks * k / job.pieces;
  const double part = (double)blocks * (double)k / (double)job.pieces - (double)*block;
  *chunk = 0;
  while (*chunk < chunks && (double)cost_before(w, *chunk + 1) <= part * (double)whole) ++*chunk;
  if (*chunk == chunks) ++*block, *chunk = 0;
}

void product_pieces(int64_t first, int64_t last, void* context) {
  Job& job = *(Job*)context;
  const Taps& w = *job.all.w;
  const int64_t positions = job.kernel->positions;
  void* panel = scratch(0, (size_t)(w.part * positions) * sizeof(float));
  float* sums = (float*)scratch(2, (size_t)(w.O * positions) * sizeof(float));
  if (!panel || !sums) {
    job.out_of_memory = true;
    return;
  }
  int64_t block, chunk, last_block, last_chunk;
  piece_begin(job, first, &block, &chunk);
  piece_begin(job, last, &last_block, &last_chunk);
  for (; block < last_block || (block == last_block && chunk < last_chunk); ++block, chunk = 0) {
    const int64_t end = block == last_block ? std::min(w.O, last_chunk * kOutputs) : w.O;
    job.kernel->product(job.all, block, chunk * kOutputs, end, panel, sums);
  }
}

}  // namespace

bool run_conv(const Taps& w, const ConvKernels& kernels, const Conv& conv, const void* x, void* y, int64_t threads) {
  Job job = {};
  const int64_t taps = conv.kernel[0] * conv.kernel[1];
  if (conv.N == 0 || w.O == 0 || conv.out[0] == 0 || conv.out[1] == 0) return true;
  int64_t shifts[kMostTaps], phase_of[kMostTaps];
  // A phase has as many rows and columns as the last tap of all phases reads.
  int64_t reach[2];
  for (int a = 0; a < 2; ++a) reach[a] = conv.out[a] + (conv.kernel[a] - 1) * conv.dilation[a] / conv.stride[a];
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t row = t / conv.kernel[1] * conv.dilation[0], column = t % conv.kernel[1] * conv.dilation[1];
    const int64_t r = row % conv.stride[0], c = column % conv.stride[1];
    int64_t p = 0;
    while (p < job.phases && (job.first[p][0] != r || job.first[p][1] != c)) ++p;
    if (p == job.phases) job.first[p][0] = r, job.first[p][1] = c, ++job.phases;
    phase_of[t] = p;
    shifts[t] = row / conv.stride[0] * reach[1] + column / conv.stride[1];
  }
  for (int64_t t = 0; t < taps; ++t) shifts[t] += phase_of[t] * reach[0] * reach[1];
  Convolved& all = job.all;
  job.rows = reach[0], job.kernel = &kernels.of[w.dtype], job.x = x;
  all.w = &w, all.conv = &conv, all.shifts = shifts, all.taps = taps, all.y = y, all.width = reach[1];
  all.positions = (conv.out[0] - 1) * reach[1] + conv.out[1];
  all.blocks = (all.positions + job.kernel->positions - 1) / job.kernel->positions, all.lanes = job.kernel->lanes;
  all.channel = job.phases * reach[0] * reach[1];
  const int64_t work = std::max<int64_t>(w.count, w.O) * all.positions * conv.N;
  const bool narrow = job.kernel->narrow, wide = w.dtype == kF32;
  const bool as_it_is = (wide || narrow) && job.phases == 1 && conv.stride[0] == 1 && conv.stride[1] == 1 &&
                        conv.before[0] == 0 && conv.before[1] == 0 && reach[0] == conv.H && reach[1] == conv.W;
  const int64_t pieces = std::max<int64_t>(1, std::min(work / kWorkPerThread, threads));
  all.planes = x;
  job.pieces = pieces;
  if (!as_it_is) {
    all.planes = job.planes = scratch(1, (size_t)(conv.N * conv.C * all.channel) * (narrow ? sizeof(BF16) : sizeof(float)));
    if (!job.planes) return false;
    parallel(pieces, wide ? lay_out_pieces<float, float> : narrow ? lay_out_pieces<BF16, BF16> : lay_out_pieces<BF16, float>, &job);
  }
  parallel(pieces, product_pieces, &job);
  return !job.out_of_memory;
}

}  // namespace pumice
