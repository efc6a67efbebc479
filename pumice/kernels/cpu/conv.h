// Convolutions with scattered nonzeros, channels first.
//
// The input is laid out with its padding, so that with a tap of the kernel fixed all outputs of a plane read one run of
// numbers: the output at row r and column c reads number `r * width + c` behind the tap's own beginning. (What stands between
// the last column of one row and the first of the next is computed too, and dropped.) A stride parts the plane into phases,
// each of which is such a run again. 64 or 128 of them are taken at once: `part` columns of the matrix are copied side by side
// into the first cache, then every output walks along its nonzeros there with its sums in registers.
#pragma once

#include "kernels.h"

namespace pumice {

constexpr int64_t kColumn = 64;      // what an offset counts for a column
constexpr int64_t kOutputs = 64;     // outputs that lie in the order of their lengths, and are shared out together
constexpr int64_t kMostColumns = 1023;  // of a part: offsets are 16 bits
constexpr int64_t kMostTaps = 1024;  // of a kernel

// A matrix w_OI whose columns are channel, row and column of the kernel.
struct Taps {
  const void* values;        // [stored]: part by part, output by output in `order`
  const uint16_t* offsets;   // [stored] kColumn times the column within the part
  const int32_t* starts;     // [parts, O + 1] into values and offsets
  const int32_t* order;      // [parts, O] within each kOutputs by their number of nonzeros, since loops of one length are foreseen
  const float* bias;         // [O] or null
  int64_t O, I, part, count; // `part` columns to a part; `count` values are stored
  int dtype;
};

static inline int64_t part_count(const Taps& w) { return (w.I + w.part - 1) / w.part; }

// What is convolved, and how.
struct Conv {
  int64_t N, C, H, W;        // of x
  int64_t kernel[2], stride[2], before[2], dilation[2], out[2];  // rows and columns; `before`: of padding; `out`: of y
  float least, most;         // what y is clamped to
  const void* add;           // like y, added before; or null
};

// What a kernel needs for one call.
struct Convolved {
  const Taps* w;
  const Conv* conv;
  const void* planes;        // [N, C, phases, plane], in fp32 or bf16 as the kernel reads it
  int64_t channel;           // numbers to the next channel
  const int64_t* shifts;     // [taps] from the beginning of a channel to a tap's first number
  int64_t taps, width, positions;  // width of a row, and positions of a plane
  int64_t blocks, lanes;     // of the positions of one image, each of whole registers of so many lanes
  void* y;
};

// Positions of block `k` of an image: whole registers, about as many in each.
static inline int64_t block_begin(const Convolved& job, int64_t k) {
  const int64_t registers = (job.positions + job.lanes - 1) / job.lanes;
  return registers * k / job.blocks * job.lanes;
}

// Outputs [begin, end) of a block of all images' blocks; `panel` has room for the columns of a part at all positions of a block,
// and `sums` for those of each output.
typedef void (*ConvProduct)(const Convolved&, int64_t block, int64_t begin, int64_t end, void* panel, float* sums);

struct ConvKernel {
  ConvProduct product;
  int64_t lanes, positions;  // of a register, and of a block at most
  bool narrow;               // reads x in bf16
};

struct ConvKernels {
  ConvKernel of[2];          // by dtype: bf16, fp32
};

// Null where this build has no such code.
const ConvKernels* portable_conv();
const ConvKernels* avx2_conv();
const ConvKernels* avx512_conv();
const ConvKernels* avx512_bf16_conv();

// y [N, O, *out] of x [N, C, H, W]; false when memory ran out.
bool run_conv(const Taps&, const ConvKernels&, const Conv&, const void* x, void* y, int64_t threads);

}  // namespace pumice
