// Shares the rows of stored matrices out among threads.
#include "linear.h"

#include "threads.h"

namespace pumice {
namespace {

const int64_t kWorkPerThread = 128 * 1024;  // bytes of stored weights below which another thread costs more than it gives

// Bytes of weights that rows 0 … o take to read: what the rows are shared out by.
int64_t work_before(const Matrix& w, int64_t o) {
  if (w.coding == kInt8 && w.columns) return w.block_starts[o] * w.r * w.c + o * 16;
  if (w.coding == kInt8) return (w.starts ? w.starts[o] : o * w.I) + o * 16;
  if (w.coding == kInt4)
    return (w.starts ? w.starts[o] : o * (w.I / w.group)) * (w.group / 2 + element_size(w.dtype)) + o * 16;
  if (w.columns) return w.block_starts[o] * w.r * w.c * element_size(w.dtype) + o * 16;
  if (!w.mask) return o * (w.I * element_size(w.dtype) + 16);
  return w.starts[o] * element_size(w.dtype) + o * ((w.I + 7) / 8) + o * 16;
}

int64_t row_count(const Matrix& w) { return w.columns ? w.O / w.r : w.O; }

// The first row before which there is as much work as `target`.
int64_t row_at(const Matrix& w, int64_t target) {
  int64_t low = 0, high = row_count(w);
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (work_before(w, middle) < target)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// `Bytes` is the width of a row of a block where that is usual, so that the copy is one or two instructions; else 0.
template <int Bytes>
void copy_blocks(const Matrix& w, int64_t begin, int64_t end, char* out) {
  const int64_t size = element_size(w.dtype), bytes = Bytes ? Bytes : w.c * size;
  for (int64_t o = begin; o < end; ++o) {
    char* row = out + (o - begin) * w.I * size;
    memset(row, 0, (size_t)(w.I * size));
    for (int64_t b = w.block_starts[o / w.r]; b < w.block_starts[o / w.r + 1]; ++b)
      memcpy(row + w.columns[b] * bytes, (const char*)w.values + (b * w.r + o % w.r) * bytes,
             Bytes ? Bytes : (size_t)bytes);
  }
}

void expand_blocks(const Matrix& w, int64_t begin, int64_t end, char* out) {
  const int64_t bytes = w.c * element_size(w.dtype);
  if (bytes == 32) return copy_blocks<32>(w, begin, end, out);
  if (bytes == 64) return copy_blocks<64>(w, begin, end, out);
  if (bytes == 128) return copy_blocks<128>(w, begin, end, out);
  copy_blocks<0>(w, begin, end, out);
}

enum Form { kAsItIs, kWidened, kSplit };

Form form_of(const Matrix& w, const Kernels& kernels) {
  if (w.dtype == kF32) return kAsItIs;
  if (w.coding == kInt8) return kernels.split && (!w.columns || w.I <= kMostByteColumns) ? kSplit : kWidened;
  return kernels.bf16_input ? kAsItIs : kWidened;
}

void* spare_rows(const Matrix& w) { return scratch(0, (size_t)(kSpareRows * (w.I + 64) * element_size(w.dtype))); }

bool run_rows(const Matrix& w, const Kernels& kernels, int64_t begin, int64_t end, const Input& x, void* y) {
  if (begin >= end) return true;
  void* spare = spare_rows(w);
  if (!spare) return false;
  if (w.coding == kInt8 && w.columns)
    (form_of(w, kernels) == kSplit ? kernels.split_blocks : kernels.coded_blocks[w.dtype])(w, begin, end, x, y, spare);
  else if (w.coding != kNumbers)
    kernels.coded[w.dtype](w, begin, end, x, y, spare);
  else
    (w.columns ? kernels.block : w.mask ? kernels.bitmask : kernels.dense)[w.dtype](w, begin, end, x, y, spare);
  return true;
}

struct Products {
  const Matrix* const* w;
  void* const* y;
  int count;
  const Kernels* kernels;
  Input x[kMostMatrices];
  int64_t work, pieces;
  bool out_of_memory;
};

// Piece k is the rows with that share of the work, all matrices in a row.
void run_products(int64_t first, int64_t last, void* context) {
  Products& job = *(Products*)context;
  const int64_t share = job.work / job.pieces;
  for (int64_t k = first; k < last; ++k) {
    int64_t before = 0;
    for (int m = 0; m < job.count; ++m) {
      const Matrix& w = *job.w[m];
      const int64_t rows = row_count(w);
      const int64_t begin = k ? row_at(w, share * k - before) : 0;
      const int64_t end = k + 1 < job.pieces ? row_at(w, share * (k + 1) - before) : rows;
      if (!run_rows(w, *job.kernels, begin, end, job.x[m], job.y[m])) job.out_of_memory = true;
      before += work_before(w, rows);
    }
  }
}

struct Expansion {
  const Matrix* w;
  const Kernels* kernels;
  int64_t begin, end, pieces;
  void* out;
  bool out_of_memory;
};

// By rows: what is written, not what is read, takes the time.
void run_expansion(int64_t first, int64_t last, void* context) {
  Expansion& job = *(Expansion*)context;
  const Matrix& w = *job.w;
  for (int64_t k = first; k < last; ++k) {
    const int64_t begin = job.begin + (job.end - job.begin) * k / job.pieces;
    const int64_t end = job.begin + (job.end - job.begin) * (k + 1) / job.pieces;
    if (begin >= end) continue;
    void* spare = spare_rows(w);
    if (!spare) {
      job.out_of_memory = true;
      return;
    }
    char* out = (char*)job.out + (begin - job.begin) * w.I * element_size(w.dtype);
    if (w.coding != kNumbers)
      job.kernels->coded_expand[w.dtype](w, begin, end, out, spare);
    else if (w.columns)
      expand_blocks(w, begin, end, out);
    else if (!w.mask)
      memcpy(out, (const char*)w.values + begin * w.I * element_size(w.dtype), (size_t)((end - begin) * w.I * element_size(w.dtype)));
    else
      (w.dtype == kF32 ? job.kernels->expand32 : job.kernels->expand16)(w, begin, end, out, spare);
  }
}

int64_t piece_count(int64_t work, int64_t threads) {
  const int64_t pieces = work / kWorkPerThread < threads ? work / kWorkPerThread : threads;
  return pieces < 1 ? 1 : pieces;
}

// x as the kernels read it: as it is where they can, else copied, widened to fp32 if they need that, zero-padded; or in bytes.
bool input_of(const Matrix& w, const Kernels& kernels, const void* x, int64_t rows, Input* out) {
  const Form form = form_of(w, kernels);
  if (form == kSplit) {
    const int64_t bytes = ByteRow::size(w.I);
    uint8_t* copy = (uint8_t*)scratch(2, (size_t)(rows * bytes));
    if (!copy) return false;
    for (int64_t row = 0; row < rows; ++row) kernels.split((const BF16*)x + row * w.I, w.I, copy + row * bytes);
    *out = {copy, bytes, rows};
    return true;
  }
  const bool keep = form == kAsItIs;
  const int64_t padded = (w.I + 63) / 64 * 64, size = keep ? element_size(w.dtype) : 4;
  *out = {x, w.I, rows};
  if (keep && padded == w.I) return true;
  char* copy = (char*)scratch(keep ? 1 : 2, (size_t)(rows * padded * size));
  if (!copy) return false;
  for (int64_t row = 0; row < rows; ++row) {
    char* to = copy + row * padded * size;
    if (keep) {
      memcpy(to, (const char*)x + row * w.I * size, (size_t)(w.I * size));
    } else {
      const BF16* from = (const BF16*)x + row * w.I;
      for (int64_t i = 0; i < w.I; ++i) ((float*)to)[i] = widen(from[i]);
    }
    memset(to + w.I * size, 0, (size_t)((padded - w.I) * size));
  }
  *out = {copy, padded, rows};
  return true;
}

// Everything of a job but its pieces.
bool gather(Products* job, const Matrix* const* w, void* const* y, int count, const Kernels& kernels, const void* x,
            int64_t rows) {
  job->w = w, job->y = y, job->count = count, job->kernels = &kernels;
  for (int m = 0; m < count; ++m) {
    // Those that read x in the same form share it.
    int like = 0;
    while (like < m && form_of(*w[like], kernels) != form_of(*w[m], kernels)) ++like;
    if (like < m)
      job->x[m] = job->x[like];
    else if (!input_of(*w[m], kernels, x, rows, &job->x[m]))
      return false;
    job->work += work_of(*w[m]);
  }
  return true;
}

}  // namespace

int64_t work_of(const Matrix& w) { return work_before(w, row_count(w)); }

bool run_matrices(const Matrix* const* w, void* const* y, int count, const Kernels& kernels, const void* x, int64_t rows,
                  int64_t threads) {
  Products job = {};
  if (!gather(&job, w, y, count, kernels, x, rows)) return false;
  if (rows == 0) return true;
  job.pieces = piece_count(job.work * (rows < 4 ? 1 : rows / 4), threads);
  parallel(job.pieces, run_products, &job);
  return !job.out_of_memory;
}

bool run_share(const Matrix* const* w, void* const* y, int count, const Kernels& kernels, const void* x, int64_t rows,
               int64_t first, int64_t last, int64_t pieces) {
  Products job = {};
  if (!gather(&job, w, y, count, kernels, x, rows)) return false;
  job.pieces = pieces;
  run_products(first, last, &job);
  return !job.out_of_memory;
}

bool expand_matrix(const Matrix& w, const Kernels& kernels, int64_t begin, int64_t end, void* out, int64_t threads) {
  Expansion job = {&w, &kernels, begin, end, 1, out, false};
  job.pieces = piece_count((end - begin) * w.I * element_size(w.dtype), threads);
  parallel(job.pieces, run_expansion, &job);
  return !job.out_of_memory;
}

}  // namespace pumice
