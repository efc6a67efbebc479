// Brings a CSR matrix into tiles, and shares the chunks of a product out among threads.
#include "tiles.h"

#include <algorithm>
#include <vector>

#include "threads.h"

namespace pumice {
namespace {

const int64_t kWorkPerThread = 64 * 1024;  // stored numbers below which another thread costs more than it gives

struct Fill {
  const Rows* from;
  const Tiles* to;
  const void* values;
  int size;
  void* to_values;
  uint8_t* to_columns;
  int64_t pieces;
};

inline int64_t column_of(const Rows& m, int64_t k) {
  return m.wide ? ((const int32_t*)m.columns)[k] : ((const uint16_t*)m.columns)[k];
}

template <class T>
void fill_chunk(const Fill& f, int64_t chunk, int64_t* at) {
  const Tiles& w = *f.to;
  const int64_t tiles = tile_count(w), first = chunk * w.height, rows = std::min(w.height, w.O - first);
  // Where the next number of each row goes, by tile; a row's pairs are kStep apart.
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t group = chunk * tiles + t, slices = w.height / kSlice;
    int64_t start = w.starts[group];
    // A matrix of zeros has no address for its values.
    const size_t stored = (size_t)(w.starts[group + 1] - start);
    if (stored) memset((T*)f.to_values + start, 0, stored * sizeof(T));
    if (stored) memset(f.to_columns + start, 0, stored);
    for (int64_t s = 0; s < slices; ++s) {
      const int64_t steps = w.steps[group * slices + s];
      for (int64_t l = 0; l < kSlice; ++l) {
        const int64_t pair = start + 2 * l;
        at[w.order[group * w.height + s * kSlice + l] * tiles + t] = pair;
        // What stays if the row is empty, so that it can be told from one with a number at offset 0.
        if (steps) f.to_columns[pair] = f.to_columns[pair + 1] = 1;
      }
      start += steps * kStep;
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = f.from->starts[first + r]; k < f.from->starts[first + r + 1]; ++k) {
      const int64_t column = column_of(*f.from, k);
      int64_t& next = at[r * tiles + column / kTile];
      ((T*)f.to_values)[next] = ((const T*)f.values)[k];
      f.to_columns[next] = (uint8_t)(column % kTile);
      if (next % 2 == 0) f.to_columns[next + 1] = 0;
      next += next % 2 ? kStep - 1 : 1;
    }
}

void fill_pieces(int64_t first, int64_t last, void* context) {
  const Fill& f = *(Fill*)context;
  std::vector<int64_t> at((size_t)(f.to->height * tile_count(*f.to)));
  const int64_t chunks = chunk_count(*f.to);
  for (int64_t c = chunks * first / f.pieces; c < chunks * last / f.pieces; ++c)
    f.size == 4 ? fill_chunk<uint32_t>(f, c, at.data()) : fill_chunk<uint16_t>(f, c, at.data());
}

struct Job {
  const Tiles* w;
  TileProduct product;
  const void* x;
  int64_t stride, rows;
  void* y;
  size_t room;
  int64_t pieces;
  bool out_of_memory;
};

// First chunk of piece `k` of `pieces` that have as much stored.
int64_t piece_start(const Tiles& w, int64_t k, int64_t pieces) {
  const int64_t chunks = chunk_count(w), tiles = tile_count(w), target = w.starts[chunks * tiles] / pieces * k;
  if (k >= pieces) return chunks;
  int64_t low = 0, high = chunks;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    // To the nearest border of chunks, since there are few of them.
    if (w.starts[middle * tiles] + (w.starts[(middle + 1) * tiles] - w.starts[middle * tiles]) / 2 < target)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

void run_pieces(int64_t first, int64_t last, void* context) {
  Job& job = *(Job*)context;
  void* spare = scratch(0, job.room);
  if (!spare) {
    job.out_of_memory = true;
    return;
  }
  for (int64_t k = first; k < last; ++k)
    job.product(*job.w, piece_start(*job.w, k, job.pieces), piece_start(*job.w, k + 1, job.pieces), job.x, job.stride,
                job.rows, job.y, spare);
}

// x of type From, `rows` rows of I, as To, with whole tiles and zeros where there is nothing.
template <class From, class To>
void copy_rows(const From* x, int64_t rows, int64_t I, int64_t padded, To* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < I; ++i) out[r * padded + i] = (To)x[r * I + i];
    memset(out + r * padded + I, 0, (size_t)(padded - I) * sizeof(To));
  }
}

struct Widened {
  uint32_t bits;
  Widened() = default;
  explicit Widened(uint16_t v) : bits((uint32_t)v << 16) {}
};

struct Turn {
  const void* x;
  int64_t rows, I, padded, width;
  void* out;
  int64_t pieces;
};

constexpr int64_t kBlock = 32;  // columns whose transposed rows stay in the first cache

// Columns [begin, end) of x to rows of `out`; begin is a multiple of kBlock.
template <class From, class To>
void transpose(const Turn& t, int64_t begin, int64_t end) {
  To* out = (To*)t.out;
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t stop = std::min(end, i + kBlock), inside = std::min(stop, t.I);
    if (t.rows < t.width || inside < stop) memset(out + i * t.width, 0, (size_t)((stop - i) * t.width) * sizeof(To));
    for (int64_t r = 0; r < t.rows; ++r) {
      const From* x = (const From*)t.x + r * t.I;
      for (int64_t c = i; c < inside; ++c) out[c * t.width + r] = (To)x[c];
    }
  }
}

template <class From, class To>
void transpose_pieces(int64_t first, int64_t last, void* context) {
  const Turn& t = *(Turn*)context;
  const int64_t blocks = t.padded / kBlock;
  transpose<From, To>(t, blocks * first / t.pieces * kBlock, blocks * last / t.pieces * kBlock);
}

int64_t piece_count(const Tiles& w, int64_t rows, int64_t threads) {
  const int64_t work = w.starts[chunk_count(w) * tile_count(w)] * rows;
  return std::max<int64_t>(1, std::min({work / kWorkPerThread, threads, chunk_count(w)}));
}

// The threads that share a product: as many as there is work for, or those of a caller who runs some pieces of it himself.
struct Crew {
  int64_t threads;
  int64_t first, last, pieces;  // pieces is 0 where the threads are started here
};

bool run_job(Job& job, const Crew& crew) {
  if (crew.pieces) {
    job.pieces = crew.pieces;
    run_pieces(crew.first, crew.last, &job);
  } else {
    job.pieces = piece_count(*job.w, job.rows < 4 ? 1 : job.rows / 4, crew.threads);
    parallel(job.pieces, run_pieces, &job);
  }
  return !job.out_of_memory;
}

bool run_few(Job& job, const void* x, bool widened, const Crew& crew) {
  const Tiles& w = *job.w;
  const int64_t padded = tile_count(w) * kTile;
  const bool wide = w.dtype == kF32 || widened;
  job.x = x, job.stride = padded;
  if (padded != w.I || (widened && w.dtype == kBF16)) {
    void* copy = scratch(1, (size_t)(job.rows * padded * (wide ? 4 : 2)));
    if (!copy) return false;
    if (w.dtype == kF32)
      copy_rows((const uint32_t*)x, job.rows, w.I, padded, (uint32_t*)copy);
    else if (wide)
      copy_rows((const uint16_t*)x, job.rows, w.I, padded, (Widened*)copy);
    else
      copy_rows((const uint16_t*)x, job.rows, w.I, padded, (uint16_t*)copy);
    job.x = copy;
  }
  return run_job(job, crew);
}

bool run_many(Job& job, const void* x, int64_t width, bool widened, const Crew& crew) {
  const Tiles& w = *job.w;
  const int64_t padded = tile_count(w) * kTile;
  const bool wide = w.dtype == kF32 || widened;
  void* turned = scratch(1, (size_t)(padded * width * (wide ? 4 : 2)));
  if (!turned) return false;
  Turn turn = {x, job.rows, w.I, padded, width, turned, crew.pieces ? 1 : piece_count(w, 1, crew.threads)};
  parallel(turn.pieces,
           w.dtype == kF32 ? transpose_pieces<uint32_t, uint32_t>
           : wide          ? transpose_pieces<uint16_t, Widened>
                           : transpose_pieces<uint16_t, uint16_t>,
           &turn);
  job.x = turned, job.stride = width, job.room = (size_t)(w.height * width) * sizeof(float);
  return run_job(job, crew);
}

bool run_all(const Tiles& w, const TileKernels& kernels, const void* x, int64_t rows, void* y, const Crew& crew) {
  const auto& k = kernels.of[w.dtype];
  Job job = {&w, k.few, nullptr, 0, rows, y, 0, 0, false};
  if (rows <= k.most) return run_few(job, x, k.few_widened, crew);
  const int64_t size = w.dtype == kF32 ? 4 : 2;
  for (int64_t row = 0; row < rows; row += job.rows) {
    const int which = rows - row <= k.width[0] ? 0 : 1;
    job.product = k.many[which];
    job.rows = std::min(k.width[which], rows - row);
    job.y = (char*)y + row * w.O * size;
    if (!run_many(job, (const char*)x + row * w.I * size, k.width[which], k.many_widened, crew)) return false;
  }
  return true;
}

}  // namespace

int64_t lay_out_tiles(const Rows& m, int64_t height, uint8_t* order, uint8_t* steps, int64_t* starts) {
  const int64_t tiles = (m.I + kTile - 1) / kTile, slices = height / kSlice;
  if (m.starts[0] != 0 || m.starts[m.O] != m.count) return -1;
  std::vector<int32_t> counts((size_t)(height * tiles));
  int64_t stored = 0;
  starts[0] = 0;
  for (int64_t chunk = 0; chunk * height < m.O; ++chunk) {
    std::fill(counts.begin(), counts.end(), 0);
    for (int64_t r = 0; r < height && chunk * height + r < m.O; ++r) {
      const int64_t begin = m.starts[chunk * height + r], end = m.starts[chunk * height + r + 1];
      if (begin < 0 || end < begin || end > m.count) return -1;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t column = column_of(m, k);
        if (column < 0 || column >= m.I) return -1;
        if (++counts[(size_t)(column / kTile * height + r)] > kTile) return -1;
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t group = chunk * tiles + t;
      const int32_t* count = counts.data() + t * height;
      uint8_t* sorted = order + group * height;
      // Counting sort, longest rows first.
      int32_t place[kTile + 2] = {};
      for (int64_t r = 0; r < height; ++r) ++place[kTile - count[r] + 1];
      for (int64_t n = 1; n <= kTile + 1; ++n) place[n] += place[n - 1];
      for (int64_t r = 0; r < height; ++r) sorted[place[kTile - count[r]]++] = (uint8_t)r;
      for (int64_t s = 0; s < slices; ++s) {
        steps[group * slices + s] = (uint8_t)((count[sorted[s * kSlice]] + 1) / 2);
        stored += steps[group * slices + s] * kStep;
      }
      starts[group + 1] = stored;
    }
  }
  return stored;
}

void fill_tiles(const Rows& m, const void* values, int size, const Tiles& w, void* to_values, uint8_t* to_columns,
                int64_t threads) {
  Fill fill = {&m, &w, values, size, to_values, to_columns, std::max<int64_t>(1, std::min(threads, chunk_count(w)))};
  parallel(fill.pieces, fill_pieces, &fill);
}

bool run_tiles(const Tiles& w, const TileKernels& kernels, const void* x, int64_t rows, void* y, int64_t threads) {
  return run_all(w, kernels, x, rows, y, {threads, 0, 0, 0});
}

bool run_tiles_share(const Tiles& w, const TileKernels& kernels, const void* x, int64_t rows, void* y, int64_t first,
                     int64_t last, int64_t pieces) {
  return run_all(w, kernels, x, rows, y, {1, first, last, pieces});
}

}  // namespace pumice
