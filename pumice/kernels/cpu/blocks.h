// Products of blocks, and of integers, with many rows of x, shared out among threads.
#pragma once

#include "kernels.h"

namespace pumice {

// y [rows, O] = x [rows, I] times a matrix of blocks of bf16 or fp32, and its bias; false when memory ran out.
bool run_blocks(const Matrix&, const Kernels&, const void* x, int64_t rows, void* y, int64_t threads);
// The same with a matrix of int8 (blocks, whole, or at a bitmask) that has its rows' sums, x being rounded to `each` bytes a
// number (ByteRows).
bool run_bytes(const Matrix&, const BytePanels&, const void* x, int64_t rows, void* y, int each, int64_t threads);

}  // namespace pumice
