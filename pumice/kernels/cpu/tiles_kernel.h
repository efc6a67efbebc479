// Products with tiles: the loops that every instruction set shares.
//
// Included after the translation unit has set its target; everything lies in anonymous namespaces.
#pragma once

#include "tiles.h"

namespace pumice {
namespace {

constexpr int64_t kTilesAhead = 2048;  // bytes of values that are fetched ahead of their use; half as many of columns

inline void store_tiles(const Tiles& w, int64_t first, int64_t rows, const float* sums, int64_t step, float* y) {
  for (int64_t r = 0; r < rows; ++r) narrow(sums[r * step] + (w.bias ? w.bias[first + r] : 0.0f), y + r);
}
inline void store_tiles(const Tiles& w, int64_t first, int64_t rows, const float* sums, int64_t step, BF16* y) {
  for (int64_t r = 0; r < rows; ++r) narrow(sums[r * step] + (w.bias ? w.bias[first + r] : 0.0f), y + r);
}

// N rows of x: `Isa::Table<N>` holds a tile of them, `Isa::slice` gives sixteen sums of each.
template <class Isa, int N>
void few_rows(const Tiles& w, int64_t begin, int64_t end, const typename Isa::X* x, int64_t stride, typename Isa::T* y) {
  const int64_t tiles = tile_count(w), slices = w.height / kSlice;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * w.height, rows = w.O - first < w.height ? w.O - first : w.height;
    float sums[N][kMostRows];
    for (int n = 0; n < N; ++n) memset(sums[n], 0, sizeof(float) * (size_t)w.height);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t group = chunk * tiles + t;
      const typename Isa::T* v = (const typename Isa::T*)w.values + w.starts[group];
      const uint8_t* c = w.columns + w.starts[group];
      const uint8_t* row = w.order + group * w.height;
      const typename Isa::template Table<N> table(x + t * kTile, stride);
      // The longest rows come first: after an empty slice there is nothing.
      for (int64_t s = 0; s < slices && w.steps[group * slices + s]; ++s, row += kSlice) {
        const int64_t steps = w.steps[group * slices + s];
        float part[N][kSlice];
        Isa::template slice<N>(table, v, c, steps, part);
        for (int n = 0; n < N; ++n)
          for (int l = 0; l < kSlice; ++l) sums[n][row[l]] += part[n][l];
        v += steps * kStep, c += steps * kStep;
      }
    }
    for (int n = 0; n < N; ++n) store_tiles(w, first, rows, sums[n], 1, y + n * w.O + first);
  }
}

template <class Isa, int N>
inline void few_up_to(int64_t n, const Tiles& w, int64_t begin, int64_t end, const typename Isa::X* x, int64_t stride,
                      typename Isa::T* y) {
  if constexpr (N > 0) {
    if (n < N) return few_up_to<Isa, N - 1>(n, w, begin, end, x, stride, y);
    few_rows<Isa, N>(w, begin, end, x, stride, y);
  }
}

template <class Isa>
void few_product(const Tiles& w, int64_t begin, int64_t end, const void* x, int64_t stride, int64_t rows, void* y, void*) {
  few_up_to<Isa, Isa::kMost>(rows, w, begin, end, (const typename Isa::X*)x, stride, (typename Isa::T*)y);
}

// One slice times `kWidth` transposed rows of x, kTogether rows of the matrix at a time: one alone would wait for its sums.
template <class Isa>
inline void many_slice(const typename Isa::T* v, const uint8_t* c, int64_t steps, const uint8_t* row,
                       const typename Isa::X* x, float* sums) {
  constexpr int M = Isa::kTogether, K = Isa::kRegs;
  for (int l = 0; l < kSlice; l += M) {
    typename Isa::Reg acc[M][K];
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m)
      PUMICE_UNROLL
      for (int k = 0; k < K; ++k) acc[m][k] = Isa::get(sums + row[l + m] * Isa::kWidth + k * (Isa::kWidth / K));
    const typename Isa::T* pair = v + 2 * l;
    const uint8_t* at = c + 2 * l;
    for (int64_t s = 0; s < steps; ++s, pair += kStep, at += kStep) {
      if (l == 0) Isa::fetch(pair, at);
      PUMICE_UNROLL
      for (int m = 0; m < M; ++m) {
        uint64_t offsets;  // eight at once: loads are what there is least of
        if constexpr (M % 4 == 0)
          memcpy(&offsets, at + m / 4 * 8, 8);
        else
          offsets = (uint64_t)(at[2 * m] | at[2 * m + 1] << 8) << m % 4 * 16;
        const int shift = m % 4 * 16;
        Isa::step(acc[m], pair + 2 * m, x + (offsets >> shift & 0xff) * Isa::kWidth,
                  x + (offsets >> (shift + 8) & 0xff) * Isa::kWidth);
      }
    }
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m)
      PUMICE_UNROLL
      for (int k = 0; k < K; ++k) Isa::put(sums + row[l + m] * Isa::kWidth + k * (Isa::kWidth / K), acc[m][k]);
  }
}

template <class Isa>
void many_product(const Tiles& w, int64_t begin, int64_t end, const void* x, int64_t, int64_t rows, void* y,
                  void* scratch) {
  const int64_t tiles = tile_count(w), slices = w.height / kSlice;
  float* sums = (float*)scratch;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * w.height, outputs = w.O - first < w.height ? w.O - first : w.height;
    memset(sums, 0, sizeof(float) * (size_t)(w.height * Isa::kWidth));
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t group = chunk * tiles + t;
      const typename Isa::T* v = (const typename Isa::T*)w.values + w.starts[group];
      const uint8_t* c = w.columns + w.starts[group];
      const uint8_t* row = w.order + group * w.height;
      for (int64_t s = 0; s < slices && w.steps[group * slices + s]; ++s, row += kSlice) {
        const int64_t steps = w.steps[group * slices + s];
        many_slice<Isa>(v, c, steps, row, (const typename Isa::X*)x + t * kTile * Isa::kWidth, sums);
        v += steps * kStep, c += steps * kStep;
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      store_tiles(w, first, outputs, sums + Isa::place((int)r), Isa::kWidth, (typename Isa::T*)y + r * w.O + first);
  }
}

}  // namespace
}  // namespace pumice
