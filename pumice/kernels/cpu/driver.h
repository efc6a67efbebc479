// The loops that every instruction set shares, over `Isa::dot`, `Isa::tile` and `Isa::expand_row`.
//
// Included after the translation unit has set its target; everything is a template over a type of that unit's
// anonymous namespace or lies itself in one, so nothing compiled here is shared between units.
#pragma once

#include "kernels.h"

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

namespace pumice {
namespace {

constexpr int64_t kOverread = 64;   // bytes that a vector load may read beyond the values it needs
constexpr int64_t kAhead = 2048;    // bytes of values that are fetched ahead of their use, at least

constexpr int64_t kFarAhead = 4096;  // the same where every byte of a stored matrix is read in its order

inline int lowest_bit(uint64_t word) {
#if defined(_MSC_VER) && !defined(__clang__)
  unsigned long index = 0;
  if (_BitScanForward(&index, (unsigned long)word)) return (int)index;
  _BitScanForward(&index, (unsigned long)(word >> 32));
  return (int)index + 32;
#else
  return __builtin_ctzll(word);
#endif
}

// Into the second cache: from memory more lines are under way to it at once than to the first, and what is read in order comes
// on from there by itself.
inline void fetch_far(const void* p) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

// The same for n values.
template <class T>
inline void fetch_far(const T* p, int64_t n) {
  for (int64_t byte = 0; byte < n * (int64_t)sizeof(T); byte += 64) fetch_far((const void*)((const char*)p + byte));
}

// Elements to the next block that begins at least so many bytes later.
template <class T>
inline int64_t blocks_ahead(int64_t block, int64_t bytes) {
  const int64_t least = bytes / (int64_t)sizeof(T);
  return (least + block - 1) / block * block;
}

// Values of row o, copied to the scratch where a vector load could cross the end of the buffer.
template <class T>
inline const T* row_values(const Matrix& w, int64_t o, void* scratch) {
  const T* p = (const T*)w.values + w.starts[o];
  int64_t n = w.starts[o + 1] - w.starts[o];
  if ((w.count - w.starts[o + 1]) * (int64_t)sizeof(T) >= kOverread) return p;
  if (n) memcpy(scratch, p, (size_t)n * sizeof(T));
  return (const T*)scratch;
}

template <class T>
inline void store(const Matrix& w, int64_t o, int64_t row, int n, const float* sums, void* y) {
  float b = w.bias ? w.bias[o] : 0.0f;
  for (int k = 0; k < n; ++k) narrow(sums[k] + b, (T*)y + (row + k) * w.O + o);
}

// Rows of x per pass: all if they fit the registers, else split evenly.
inline int64_t pass_rows(int64_t rows, int64_t most) {
  int64_t passes = (rows + most - 1) / most;
  return passes ? (rows + passes - 1) / passes : 1;
}

// Elements from a place in M rows from o on to the place that comes at least kAhead bytes later in the reading order of M
// rows at once.
template <class T, int M>
inline int64_t rows_ahead(const Matrix& w, int64_t o) {
  const int64_t rows = w.starts[o + M] - w.starts[o], least = kAhead / (int64_t)sizeof(T);
  return rows >= least || rows == 0 ? rows : (least + rows - 1) / rows * rows;
}

// M rows of the matrix from row o on, whose values begin at p, times n <= N rows of x.
template <class Isa, class T, int M, int N>
inline void dot_up_to(int n, const T* const* p, const Matrix& w, int64_t o, const Input& x, int64_t row, void* y) {
  if constexpr (N > 0) {
    if (n < N) return dot_up_to<Isa, T, M, N - 1>(n, p, w, o, x, row, y);
    typedef typename Isa::template X<T> X;
    const int64_t bytes = (w.I + 7) / 8;
    float sums[M][N];
    const int64_t ahead = M == 1 ? kAhead / (int64_t)sizeof(T) : rows_ahead<T, M>(w, o);
    Isa::template dot<T, M, N>(p, ahead, w.mask + o * bytes, bytes, (const X*)x.data + row * x.stride, x.stride, w.I,
                               sums);
    for (int m = 0; m < M; ++m) store<T>(w, o + m, row, N, sums[m], y);
  }
}

template <class Isa, class T>
void bitmask_product(const Matrix& w, int64_t begin, int64_t end, const Input& x, void* y, void* scratch) {
  const int64_t step = pass_rows(x.rows, Isa::kDotRows);
  // Several rows of the matrix at once load x once for all; with little of x there is more to gain from one stream.
  constexpr int M = Isa::kTogether;
  for (int64_t o = begin, m; o < end; o += m) {
    m = step > 2 && o + M <= end ? M : 1;
    const T* p[M];
    for (int64_t k = 0; k < m; ++k) p[k] = row_values<T>(w, o + k, (T*)scratch + k * (w.I + 64));
    for (int64_t row = 0; row < x.rows; row += step) {
      const int n = (int)(x.rows - row < step ? x.rows - row : step);
      if constexpr (M > 1)
        if (m == M) {
          dot_up_to<Isa, T, M, Isa::kDotRows>(n, p, w, o, x, row, y);
          continue;
        }
      dot_up_to<Isa, T, 1, Isa::kDotRows>(n, p, w, o, x, row, y);
    }
  }
}

// `M` rows of one block row times `n` rows of x.
template <class Isa, class T, int M, int N>
inline void tile_up_to(int n, const Matrix& w, int64_t br, int64_t i, const Input& x, int64_t row, void* y) {
  if constexpr (N > 0) {
    if (n < N) return tile_up_to<Isa, T, M, N - 1>(n, w, br, i, x, row, y);
    typedef typename Isa::template X<T> X;
    float sums[M][N];
    const T* values = (const T*)w.values + i * w.c;
    // The first pass over a row of blocks fetches all of it; the others find it in cache.
    const int64_t ahead = i == 0 && row == 0 ? blocks_ahead<T>(w.r * w.c, kFarAhead) : 0;
    Isa::template tile<T, M, N>(values, w.columns, w.block_starts[br], w.block_starts[br + 1], w.r, w.c, ahead,
                                (const X*)x.data + row * x.stride, x.stride, sums);
    for (int k = 0; k < M; ++k) store<T>(w, br * w.r + i + k, row, N, sums[k], y);
  }
}

// Rows of a block that are taken together: as many as there are and as their sums fit the registers.
inline int64_t tile_rows(int64_t left, int64_t n, int64_t sums) {
  for (int64_t m = 16; m > 1; m /= 2)
    if (m != 2 && left >= m && m * n <= sums) return m;
  return 1;
}

template <class Isa, class T>
void block_product(const Matrix& w, int64_t begin, int64_t end, const Input& x, void* y, void*) {
  const int64_t step = pass_rows(x.rows, Isa::kTileRows);
  for (int64_t br = begin; br < end; ++br)
    for (int64_t i = 0, m; i < w.r; i += m) {
      m = tile_rows(w.r - i, step, Isa::kTileSums);
      for (int64_t row = 0; row < x.rows; row += step) {
        const int n = (int)(x.rows - row < step ? x.rows - row : step);
        if (m == 16)
          tile_up_to<Isa, T, 16, 1>(n, w, br, i, x, row, y);
        else if (m == 8)
          tile_up_to<Isa, T, 8, 2>(n, w, br, i, x, row, y);
        else if (m == 4)
          tile_up_to<Isa, T, 4, Isa::kTileRows>(n, w, br, i, x, row, y);
        else
          tile_up_to<Isa, T, 1, Isa::kTileRows>(n, w, br, i, x, row, y);
      }
    }
}

// One row of a matrix stored whole times N rows of x. W and X load weights and x into registers of the same kind (see
// grouped_tile.h), a few sums being in flight to hide their latency.
template <class W, class X, int N>
inline void dense_row(const typename W::T* w, const typename X::T* x, int64_t stride, int64_t I, float* sums) {
  constexpr int U = 2;  // more leave a remainder behind rows of 576 columns, say, which costs more than its length
  constexpr int64_t L = W::kLanes, ahead = kFarAhead / (int64_t)sizeof(*w);
  typename W::Sum acc[N][U];
  PUMICE_UNROLL
  for (int n = 0; n < N; ++n)
    PUMICE_UNROLL
    for (int u = 0; u < U; ++u) acc[n][u] = W::zero();
  int64_t k = 0;
  for (; k + L * U <= I; k += L * U)
    PUMICE_UNROLL
    for (int u = 0; u < U; ++u) {
      fetch_far(w + k + L * u + ahead);
      const typename W::Reg v = W::load(w + k + L * u);
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[n][u] = W::fma(acc[n][u], v, X::load(x + n * stride + k + L * u));
    }
  for (; k + L <= I; k += L) {
    const typename W::Reg v = W::load(w + k);
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) acc[n][0] = W::fma(acc[n][0], v, X::load(x + n * stride + k));
  }
  if (k < I) {
    const typename W::Reg v = W::load(w + k, I - k);
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) acc[n][0] = W::fma(acc[n][0], v, X::load(x + n * stride + k, I - k));
  }
  PUMICE_UNROLL
  for (int n = 0; n < N; ++n) {
    PUMICE_UNROLL
    for (int u = 1; u < U; ++u) acc[n][0] = W::add(acc[n][0], acc[n][u]);
    W::template reduce<1>(acc[n], sums + n);
  }
}

// The same with n <= N rows of x.
template <class W, class X, int N>
inline void dense_row_up_to(int n, const Matrix& w, int64_t o, const Input& x, int64_t row, void* y) {
  if constexpr (N > 0) {
    if (n < N) return dense_row_up_to<W, X, N - 1>(n, w, o, x, row, y);
    typedef typename W::T T;
    float sums[N];
    dense_row<W, X, N>((const T*)w.values + o * w.I, (const typename X::T*)x.data + row * x.stride, x.stride, w.I, sums);
    store<T>(w, o, row, N, sums, y);
  }
}

// Row by row, as they lie in memory: several at once would load x less often, but read in as many places.
template <class W, class X>
void dense_product(const Matrix& w, int64_t begin, int64_t end, const Input& x, void* y, void*) {
  const int64_t step = pass_rows(x.rows, 4);
  for (int64_t o = begin; o < end; ++o)
    for (int64_t row = 0; row < x.rows; row += step)
      dense_row_up_to<W, X, 4>((int)(x.rows - row < step ? x.rows - row : step), w, o, x, row, y);
}

// T is an unsigned integer of the values' width.
template <class Isa, class T>
void expand_rows(const Matrix& w, int64_t begin, int64_t end, void* out, void* scratch) {
  const int64_t bytes = (w.I + 7) / 8;
  for (int64_t o = begin; o < end; ++o)
    Isa::expand_row(row_values<T>(w, o, scratch), w.mask + o * bytes, w.I, (T*)out + (o - begin) * w.I);
}

}  // namespace
}  // namespace pumice
