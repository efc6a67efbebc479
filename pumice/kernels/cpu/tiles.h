// Scattered nonzeros in tiles of 256 columns: what a CSR matrix runs as.
//
// Rows are taken in chunks, columns in tiles. Within a tile the rows of a chunk stand in the order of how many nonzeros
// they have there, sixteen to a slice, so that the rows of a slice are about as long and little is filled up with zeros.
// A slice lies in steps: a step holds the next two nonzeros of each of its sixteen rows. So a few rows of x look their
// columns up in registers (a tile of x is 256 numbers) with a row of the matrix in each lane, and many rows of x walk
// along one row of the matrix after the other, a tile of them transposed in the first cache.
#pragma once

#include "kernels.h"

namespace pumice {

constexpr int64_t kTile = 256;    // columns; an offset in a tile is a byte
constexpr int64_t kSlice = 16;    // rows that stand side by side
constexpr int64_t kStep = 2 * kSlice;
constexpr int64_t kMostRows = 256;  // of a chunk; a row of a chunk is a byte

struct Tiles {
  const void* values;         // [stored]: step by step, the pair of the first row, then of the second, …
  const uint8_t* columns;     // [stored] offsets in the tile; what only fills up is a zero at offset 0, or 1 in an empty row
  const uint8_t* order;       // [chunks, tiles, height]: which row of the chunk comes first, second, …
  const uint8_t* steps;       // [chunks, tiles, height / kSlice]
  const int64_t* starts;      // [chunks * tiles + 1] into values and columns
  const float* bias;          // [O] or null
  int64_t O, I, height;       // height: rows to a chunk, a multiple of kSlice
  int dtype;
};

static inline int64_t chunk_count(const Tiles& w) { return (w.O + w.height - 1) / w.height; }
static inline int64_t tile_count(const Tiles& w) { return (w.I + kTile - 1) / kTile; }

// Chunks [begin, end) of y [rows, O]. A few rows: x [rows, stride]. Many: x is transposed, [columns, width of the kernel],
// and `rows` of its width are there. Both are filled up with zeros to whole tiles. `scratch` has room for height times
// width sums.
typedef void (*TileProduct)(const Tiles&, int64_t begin, int64_t end, const void* x, int64_t stride, int64_t rows, void* y,
                            void* scratch);

struct TileKernels {
  struct {
    int64_t most;             // rows of x that the kernel for a few takes
    TileProduct few;
    bool few_widened;         // whether it reads x in fp32
    int64_t width[2];         // of the two kernels for many, ascending
    TileProduct many[2];
    bool many_widened;
  } of[2];                    // by dtype: bf16, fp32
};

// Null where this build has no such code.
const TileKernels* portable_tiles();
const TileKernels* avx2_tiles();
const TileKernels* avx512_tiles();
const TileKernels* avx512_bf16_tiles();

// A CSR matrix of O rows; columns of `wide` are int32, else uint16.
struct Rows {
  const void* columns;
  const int32_t* starts;
  int64_t O, I, count;
  bool wide;
};

// Fills order, steps and starts and returns how many values are stored; -1 if the matrix points outside of itself.
int64_t lay_out_tiles(const Rows&, int64_t height, uint8_t* order, uint8_t* steps, int64_t* starts);
// Fills the values and columns of tiles laid out before.
void fill_tiles(const Rows&, const void* values, int size, const Tiles&, void* to_values, uint8_t* to_columns,
                int64_t threads);
// y [rows, O] = x [rows, I] times the matrix, and the bias; false when memory ran out.
bool run_tiles(const Tiles&, const TileKernels&, const void* x, int64_t rows, void* y, int64_t threads);
// The same by a caller that has threads of its own: pieces [first, last) of `pieces` that are equal in work.
bool run_tiles_share(const Tiles&, const TileKernels&, const void* x, int64_t rows, void* y, int64_t first, int64_t last,
                     int64_t pieces);

}  // namespace pumice
