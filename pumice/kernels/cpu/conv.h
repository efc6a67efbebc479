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

// The same matrix where eight outputs at a time, a bundle, share their columns: those that any of them has. Numbers of x are then
// read once for eight outputs, and their sums stay in registers from the first column to the last.
constexpr int64_t kBundle = 8;
constexpr uint32_t kNoColumn = ~0u;

struct Bundles {
  const void* values;        // [steps, kBundle, 2]
  const uint32_t* codes;     // [steps, 2]: kMostTaps times the channel, and the tap. kNoColumn: a bundle's last step is of one column
  const int32_t* starts;     // [bundles + 1] into steps
  const float* bias;         // [O] or null
  int64_t O, I, taps, count; // `count` steps
  int dtype;
};

static inline int64_t bundle_count(const Bundles& w) { return (w.O + kBundle - 1) / kBundle; }

// What is convolved, and how.
struct Conv {
  int64_t N, C, H, W;        // of x
  int64_t kernel[2], stride[2], before[2], dilation[2], out[2];  // rows and columns; `before`: of padding; `out`: of y
  float least, most;         // what y is clamped to
  const void* add;           // like y, added before; or null
};

// A phase that some tap reads: row r and column c of it are row `row + r * stride` and column `c * stride - shift` of x, which has
// columns [begin, end) of it; where there is none, there are zeros.
struct Phase {
  int64_t row, shift, begin, end;
};

// How the planes of one image are laid out.
struct Planes {
  const Conv* conv;
  int64_t channel;           // numbers to the next channel
  int64_t rows, width;       // of a phase
  int64_t phases;
  Phase phase[kMostTaps];
};

// Numbers that may be written behind the planes.
constexpr int64_t kSpill = 64;

// What a kernel needs for one call.
struct Convolved {
  const Taps* w;             // or null:
  const Bundles* bundles;
  const Conv* conv;
  const void* planes;        // of the image: [C, phases, plane], in fp32 or bf16 as the kernel reads it
  bool as_it_is;             // they are x itself, those of the next image behind them
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

static inline int64_t block_end(const Convolved& job, int64_t k) {
  return k + 1 < job.blocks ? block_begin(job, k + 1) : job.positions;
}

// Outputs [begin, end), or bundles, of a block of all images' blocks; `panel` has room for the columns of a part at all positions of a block,
// and `sums` for those of each output.
typedef void (*ConvProduct)(const Convolved&, int64_t block, int64_t begin, int64_t end, void* panel, float* sums);

// Rows [begin, end) of all phases of an image x, to `planes`; some numbers behind them are overwritten, up to kSpill.
typedef void (*LayOut)(const Planes&, const void* x, int64_t begin, int64_t end, void* planes);

struct ConvKernel {
  ConvProduct product;
  LayOut lay_out;
  int64_t lanes, positions;  // of a register, and of a block at most
  int64_t size;              // bytes of a number of x as it reads it
};

struct ConvKernels {
  ConvKernel of[2], bundles[2];  // by dtype: bf16, fp32
};

// Null where this build has no such code.
const ConvKernels* portable_conv();
const ConvKernels* avx2_conv();
const ConvKernels* avx512_conv();
const ConvKernels* avx512_bf16_conv();

// y [N, O, *out] of x [N, C, H, W]; false when memory ran out.
bool run_conv(const Taps&, const ConvKernels&, const Conv&, const void* x, void* y, int64_t threads);
bool run_conv(const Bundles&, const ConvKernels&, const Conv&, const void* x, void* y, int64_t threads);

}  // namespace pumice
