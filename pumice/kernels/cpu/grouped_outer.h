// Gradients of each expert's weight, sums of outer products: y[o, i] = Σ g[a, o] x[a, i] over the expert's assignments.
// Included after the translation unit has set its target.
//
// Both operands lie with the wrong axis side by side for dot products, and with the right one for the tiles of columns
// mode (grouped_tile.h): sixteen inputs of x make a register, and a number of g, or a pair, is spread over one. So x is
// packed as those tiles are, and g is copied with each step's outputs side by side, some assignments at a time.
#pragma once

#include "grouped_tile.h"

namespace pumice {
namespace {

constexpr int64_t kOuterColumns = 512;  // inputs at a time: their sums stay in the second-level cache
constexpr int64_t kOuterStride = kOuterColumns + 80;
constexpr int64_t kPanelStride = kOuterPiece + 48;  // numbers of a step, times kStep; steps fall into different cache sets

// N outputs times S Sums of inputs, over `steps` of packed x and of the panel of g.
template <class V, int S, int N>
inline void panel_spreads(const typename V::Reg* x, const typename V::T* g, int64_t steps, float* out, bool add) {
  typename V::Sum acc[N][S];
  PUMICE_UNROLL
  for (int r = 0; r < N; ++r)
    PUMICE_UNROLL
    for (int s = 0; s < S; ++s) acc[r][s] = V::zero();
  for (int64_t k = 0; k < steps; ++k, x += S, g += kPanelStride * V::kStep) {
    typename V::Reg v[S];
    PUMICE_UNROLL
    for (int s = 0; s < S; ++s) v[s] = V::hold(x[s]);
    PUMICE_UNROLL
    for (int r = 0; r < N; ++r) {
      const typename V::Reg b = V::hold(V::spread(g + r * V::kStep, V::kStep));
      PUMICE_UNROLL
      for (int s = 0; s < S; ++s) acc[r][s] = V::fma(acc[r][s], v[s], b);
    }
  }
  PUMICE_UNROLL
  for (int r = 0; r < N; ++r)
    PUMICE_UNROLL
    for (int s = 0; s < S; ++s) V::put(out + r * kOuterStride + s * V::kWidth, acc[r][s], add);
}

template <class V, int S, int N>
inline void panel_spreads_up_to(int rows, const typename V::Reg* x, const typename V::T* g, int64_t steps, float* out,
                                bool add) {
  if constexpr (N > 0) {
    if (rows < N) return panel_spreads_up_to<V, S, N - 1>(rows, x, g, steps, out, add);
    panel_spreads<V, S, N>(x, g, steps, out, add);
  }
}

// Steps of `rows` numbers each from assignments that lie at from[0 … n - 1]; a step that is not whole is filled up with zeros.
template <class V>
inline void fill_panel(const typename V::T* const* from, int64_t n, int64_t first, int64_t rows, typename V::T* to) {
  typedef typename V::T T;
  for (int64_t a = 0; a < n; a += V::kStep, to += kPanelStride * V::kStep) {
    const T* one = from[a] + first;
    if constexpr (V::kStep == 1) {
      memcpy(to, one, sizeof(T) * (size_t)rows);
    } else {
      const bool both = a + 1 < n;
      const int64_t next = both ? from[a + 1] - from[a] : 0;
      for (int64_t o = 0; o < rows; o += V::kCross * V::kWidth) {
        typename V::Reg pairs[V::kCross];
        V::cross(one + o, next, both ? 2 : 1, rows - o, pairs);
        memcpy(to + V::kStep * o, pairs, sizeof(pairs));
      }
    }
  }
}

template <class V>
bool outer_rows(const Outer& s, int64_t e, int64_t begin, int64_t end) {
  typedef typename V::T T;
  typedef typename V::Reg Reg;
  static_assert(V::kStep <= 2, "steps of one or two assignments");
  constexpr int64_t kStretch = V::kStretch / 2, kTile = V::kV * V::kWidth;
  const int64_t A = s.offsets[e + 1], rows = end - begin;
  T* y = (T*)s.y + (e * s.O + begin) * s.I;
  if (s.offsets[e] == A) {
    memset(y, 0, sizeof(T) * (size_t)(rows * s.I));
    return true;
  }
  const size_t packs = sizeof(Reg) * (size_t)(V::kV * kStretch), panels = sizeof(T) * (size_t)(kPanelStride * kStretch);
  char* space = (char*)scratch(2, packs + panels + sizeof(float) * (size_t)(kOuterPiece * kOuterStride));
  if (!space) return false;
  Reg* pack = (Reg*)space;
  T* panel = (T*)(space + packs);
  float* sums = (float*)(space + packs + panels);
  const int64_t pass = even_pass(rows, V::kR);
  const T *g[kStretch], *x[kStretch];
  for (int64_t i = 0; i < s.I; i += kOuterColumns) {
    const int64_t columns = s.I - i < kOuterColumns ? s.I - i : kOuterColumns;
    for (int64_t a = s.offsets[e]; a < A; a += kStretch) {
      const int64_t n = A - a < kStretch ? A - a : kStretch, steps = (n + V::kStep - 1) / V::kStep;
      for (int64_t k = 0; k < n; ++k) {
        g[k] = (const T*)s.g + (s.g_rows ? s.g_rows[a + k] : a + k) * s.g_stride;
        x[k] = (const T*)s.x + (s.x_rows ? s.x_rows[a + k] : a + k) * s.x_stride + i;
      }
      fill_panel<V>(g, n, begin, rows, panel);
      for (int64_t c = 0; c < columns; c += kTile) {
        Reg* to = pack;
        for (int64_t k = 0; k < n; k += V::kStep, to += V::kV) {
          const int left = (int)(n - k < V::kStep ? n - k : V::kStep);
          const int64_t next = left > 1 ? x[k + 1] - x[k] : 0;
          for (int v = 0; v < V::kV; v += V::kCross)
            V::cross(x[k] + c + v * V::kWidth, next, left, columns - c - v * V::kWidth, to + v);
        }
        for (int64_t r = 0; r < rows; r += pass)
          panel_spreads_up_to<V, V::kV, V::kR>((int)(rows - r < pass ? rows - r : pass), pack, panel + r * V::kStep, steps,
                                               sums + r * kOuterStride + c, a > s.offsets[e]);
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) narrow(sums[r * kOuterStride + c], y + r * s.I + i + c);
  }
  return true;
}

}  // namespace
}  // namespace pumice
