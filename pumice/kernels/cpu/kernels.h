// What the CPU kernels share: how a stored matrix looks in memory and the table of functions of one instruction set.
//
// Only C headers are included here and every function is static, on purpose: each instruction set is its own
// translation unit compiled for that set, and an inline function with external linkage could be merged by the linker
// into the AVX-512 copy and then run on a CPU without it.
#pragma once

#include <stdint.h>
#include <string.h>

// Before loops over sums: unless they are unrolled early, GCC keeps the sums in memory instead of registers. Builds for
// the sanitizers define it empty, which makes them small.
#if defined(PUMICE_UNROLL)
#elif defined(__clang__)
#define PUMICE_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define PUMICE_UNROLL _Pragma("GCC unroll 16")
#else
#define PUMICE_UNROLL
#endif

namespace pumice {

struct BF16 {
  uint16_t bits;
};

enum Dtype { kBF16 = 0, kF32 = 1, kF16 = 2 };
enum Coding { kNumbers = 0, kInt8 = 1, kInt4 = 2 };

// One stored matrix of O outputs and I inputs; `mask` (layout bitmask) or `columns` (layout block) is set, or
// neither (dense).
struct Matrix {
  const void* values;
  int64_t count;              // stored values
  int64_t O, I;
  int dtype;
  const float* bias;          // [O] or null
  const uint8_t* mask;        // [O, ceil(I / 8)], least significant bit first
  const int64_t* starts;      // [O + 1] offsets of the rows into values
  const int32_t* columns;     // [blocks] block column of each block
  const int32_t* block_starts;  // [O / r + 1]
  int64_t r, c;               // size of a block
  int coding;                 // kInt8: `values` are int8 with a scale a row. kInt4: bytes of two codes, a scale a group of
                              // `group` columns; `mask` then has a bit a group, and `starts` counts groups
  const void* scales;         // of the matrix's dtype
  const uint8_t* zeros;       // zero points of the groups, four bits each, or null for 8
  int64_t group;
  const int32_t* sums;        // [O] of each row's integers, where x is multiplied as bytes without a sign; else null
};

// x as a kernel reads it: R rows, `stride` elements apart, zero beyond I up to a multiple of 64. Where it is split into bytes,
// an element is a byte.
struct Input {
  const void* data;
  int64_t stride, rows;
};

// Rows [begin, end) of y (of block rows for `block`); y is [R, O] in the dtype of the values. `scratch` holds
// kSpareRows rows of values, each with 64 values more.
constexpr int64_t kSpareRows = 3;
typedef void (*Product)(const Matrix&, int64_t begin, int64_t end, const Input&, void* y, void* scratch);
// Rows [begin, end) of the matrix, dense, to `out` [end - begin, I]; only the width of the dtype matters.
typedef void (*Expand)(const Matrix&, int64_t begin, int64_t end, void* out, void* scratch);

// x as the products of blocks with many rows read it: `width` rows stand side by side in a panel, one for each 32-bit word,
// and a panel has a step for each column of the matrix, or for each pair of bf16 columns where these are multiplied in
// pairs. A block has whole steps: where a pair goes beyond it, its second half is zero.
struct Panel {
  uint32_t* words;            // [panels, steps, words of a step, width]
  int64_t width;              // a multiple of `lanes`, at most `width` of the kernels
  int64_t rows;               // that are there; the others of the last panel are zeros
  const float* unit;          // of each row of x, where it is in bytes
  int each;                   // rows of bytes to a row of x; else 1
};

// x in bytes, as blocks of int8 read it: `each` bytes a number (2: the largest magnitude of a row is 32639, its numbers are
// 256 a + b; 1: it is 127), each byte with a sign and in a row of its own, those of one row of x after each other.
struct ByteRows {
  int8_t* bytes;              // [rows * each, stride]
  int64_t stride, rows;       // rows of x
  int each;
  float* unit;                // [rows] what one stands for; NaN where the row is not finite
};

struct BlockPanels {
  int64_t lanes;              // rows in a register
  int64_t tall, width_tall;   // most rows of a panel where blocks have at least `tall` rows
  int64_t width;              // most rows of a panel for others
  int64_t columns, words;     // of a step
  // Steps [begin, end) of all panels from x [rows, I].
  void (*fill)(const Matrix&, int64_t begin, int64_t end, const void* x, const Panel&);
  // Block rows [begin, end) of y [rows, O].
  void (*product)(const Matrix&, int64_t begin, int64_t end, const Panel&, void* y);
};

// The same where x is multiplied in bytes: a panel then holds rows of bytes, and `fill` reads them from `ByteRows::bytes`. Columns
// whose products fit a sum of 32 bits, 255 x 128 each:
constexpr int64_t kMostByteColumns = 65536;
struct BytePanels {
  BlockPanels panels;
  // Rows [begin, end) of integers at a bitmask, dense, to out [end - begin, I].
  void (*expand)(const Matrix&, int64_t begin, int64_t end, int8_t* out, void* scratch);
  // Rows [begin, end) of x [rows, I] to bytes.
  void (*round)(const void* x, int64_t I, int64_t begin, int64_t end, const ByteRows&);
};

struct Kernels {
  const char* name;
  bool bf16_input;            // products of bf16 read x as bf16; else x was widened to fp32
  // A row of x as products of int8 in bf16 read it (ByteRow); null where they read it in fp32.
  void (*split)(const BF16* x, int64_t I, uint8_t* row);
  Product dense[2], bitmask[2], block[2];  // by dtype: bf16, fp32
  Expand expand16, expand32;
  Product coded[2];           // by dtype of the scales
  Expand coded_expand[2];
  BlockPanels panels[2];      // by dtype
  Product coded_blocks[2];    // by dtype of the scales, x in fp32
  // The rest is null where the set has no products of bytes in fours.
  Product split_blocks;       // bf16, x split into bytes
  const BytePanels* bytes;    // by dtype
};

namespace {  // so that its functions too stay in their translation unit

// A row of x in sixteen bits: the largest magnitude is kTop, each number 256 high + low with both from -128 to 127. A weight k is
// multiplied as k + 128, without a sign; what that adds is what `start` takes off before.
struct ByteRow {
  static constexpr int kTop = 32639;
  // Columns whose products fit 32 bits in each of sixteen sums.
  static constexpr int64_t kStretch = 8192;

  // In bytes from its beginning: a float, what one of sixteen bits stands for (NaN where the row is not finite); the higher and
  // the lower bytes, each filled up with zeros; sixteen 32-bit numbers for each stretch.
  static constexpr int64_t kHigh = 64;
  static int64_t padded(int64_t I) { return (I + 63) / 64 * 64; }
  static int64_t low(int64_t I) { return kHigh + padded(I); }
  static int64_t start(int64_t I) { return low(I) + padded(I); }
  static int64_t size(int64_t I) { return start(I) + (I + kStretch - 1) / kStretch * 64; }
};

}  // namespace

// Each is null where this build has no such code.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();

static inline float widen(BF16 v) {
  uint32_t bits = (uint32_t)v.bits << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline float widen(float v) { return v; }

// Round to nearest, ties to even; a NaN stays a NaN.
static inline void narrow(float f, BF16* out) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if (f != f)
    out->bits = (uint16_t)((bits >> 16) | 0x40);
  else
    out->bits = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void narrow(float f, float* out) { *out = f; }

// Bits 64 j … 64 j + 63 of a mask row of `bits` columns; those beyond the row are zero and its bytes are not read.
static inline uint64_t mask_word(const uint8_t* row, int64_t j, int64_t bits) {
  uint64_t word = 0;
  int64_t left = bits - 64 * j;
  if (left >= 64) {
    memcpy(&word, row + 8 * j, 8);
    return word;
  }
  memcpy(&word, row + 8 * j, (size_t)((left + 7) / 8));
  return word & ((1ull << left) - 1);
}

}  // namespace pumice
