// Products with stored matrices, shared out among threads by what each has to read.
#pragma once

#include "kernels.h"

namespace pumice {

constexpr int kMostMatrices = 4;  // that one call takes

static inline int element_size(int dtype) { return dtype == kF32 ? 4 : 2; }

// y[k] [rows, O of k] = x [rows, I] times matrix k, and its bias, for `count` matrices of one width and dtype that read the
// same x. False when memory ran out.
bool run_matrices(const Matrix* const* w, void* const* y, int count, const Kernels&, const void* x, int64_t rows,
                  int64_t threads);
// The same by a caller that has threads of its own: pieces [first, last) of `pieces` that are equal in work.
bool run_share(const Matrix* const* w, void* const* y, int count, const Kernels&, const void* x, int64_t rows, int64_t first,
               int64_t last, int64_t pieces);
// Bytes of weights that a product takes to read.
int64_t work_of(const Matrix&);
// Rows [begin, end) of the matrix, dense, to `out` [end - begin, I]; false when memory ran out.
bool expand_matrix(const Matrix&, const Kernels&, int64_t begin, int64_t end, void* out, int64_t threads);

}  // namespace pumice
