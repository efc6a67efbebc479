// Four-bit integers with sixteen rows of the matrix side by side, one to each 32-bit lane: what int4 runs as in
// bf16 where bytes can be multiplied in fours.
//
// A step holds a group of neighbouring columns of each of sixteen rows. Where all groups are stored, rows are taken by
// sixteen and their groups follow each other. Where some are missing, rows are taken in chunks and columns in tiles of
// sixteen groups; within a tile the rows of a chunk stand in the order of how many groups they have there, sixteen to a
// slice, as in tiles.h, and four bits say which of the tile's groups a row has in a step.
//
// x is multiplied in sixteen bits: the largest magnitude of a row of x is 32767 (so that its error, a part in 65534 of the
// largest, is below that of bf16 unless one number is a few hundred times as large as most), moved up by 32768 and split
// into two bytes. What the move adds is 32768 times a row's sum of weights, which is known.
#pragma once

#include "kernels.h"

namespace pumice {

constexpr int64_t kLaneRows = 16;     // rows that stand side by side
constexpr int64_t kLaneGroups = 16;   // of a tile
constexpr int64_t kLaneChunk = 256;   // most rows of a chunk
constexpr int kLanesAtOnce = 4;       // rows of x for which the weights are read once

struct Lanes {
  // [steps, group / 8, 16, 4]: byte b of word j of a row has column 4 j + b of the group in its lower half, and column
  // group / 2 + 4 j + b in the upper one, each from -8 to 7 as a signed number of four bits.
  const uint8_t* codes;
  const BF16* scales;         // [steps, 16]; what only fills up has 0
  const uint8_t* groups;      // [steps, 8]: which group of the tile row l has, in the lower half of byte l or the upper one of
                              // byte l - 8; there are none where all groups are stored
  const uint8_t* order;       // [chunks, tiles, height]: which row of the chunk comes first, second, …
  const uint8_t* steps;       // [chunks, tiles, height / 16]
  const int64_t* starts;      // [chunks * tiles + 1] into the steps
  const float* sums;          // [O] of each row's weights
  const float* bias;          // [O] or null
  int64_t O, I, group, height;  // height: rows to a chunk, 16 where all groups are stored
};

// Chunks of missing groups have more rows. (Addresses do not tell: a matrix of zeros has none.)
static inline bool all_stored(const Lanes& w) { return w.height == kLaneRows; }

static inline int64_t lane_chunks(const Lanes& w) { return (w.O + w.height - 1) / w.height; }
static inline int64_t lane_tiles(const Lanes& w) {
  return (w.I / w.group + kLaneGroups - 1) / kLaneGroups;
}
// Steps of the chunks before `chunk`.
static inline int64_t steps_before(const Lanes& w, int64_t chunk) {
  return all_stored(w) ? chunk * (w.I / w.group) : w.starts[chunk * lane_tiles(w)];
}

// Rows of x as bytes: `words` is [rows, tiles, group / 4, 2, 16 groups, 4], upper bytes before lower ones; `unit` [rows] is what
// one of sixteen bits stands for, NaN where a row of x is not finite.
struct LaneInput {
  const uint8_t* words;
  const float* unit;
  int64_t rows;
};

static inline int64_t lane_input_bytes(const Lanes& w) { return lane_tiles(w) * kLaneGroups * w.group * 2; }

struct LaneKernels {
  // One row of x.
  void (*fill)(const Lanes&, const BF16* x, uint8_t* words, float* unit);
  // Chunks [begin, end) of y [rows, O].
  void (*product)(const Lanes&, int64_t begin, int64_t end, const LaneInput&, BF16* y);
  // The same chunks of the matrix, dense, to out [rows of the chunks, I].
  void (*expand)(const Lanes&, int64_t begin, int64_t end, BF16* out);
};

// Null where this build has no such code.
const LaneKernels* avx512_bf16_lanes();

// Bytes of weights that a product takes to read.
int64_t work_of(const Lanes&);
// y [rows, O] = x [rows, I] times the matrix, and the bias; false when memory ran out.
bool run_lanes(const Lanes&, const LaneKernels&, const BF16* x, int64_t rows, BF16* y, int64_t threads);
// The same by a caller that has threads of its own: pieces [first, last) of `pieces` that are equal in work.
bool run_lanes_share(const Lanes&, const LaneKernels&, const BF16* x, int64_t rows, BF16* y, int64_t first, int64_t last,
                     int64_t pieces);
// Chunks [begin, end) of the matrix, dense, to out [rows, I].
void expand_lanes(const Lanes&, const LaneKernels&, int64_t begin, int64_t end, BF16* out, int64_t threads);

}  // namespace pumice
