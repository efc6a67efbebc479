// Products of blocks with many rows of x: the loops that every instruction set shares.
//
// x is transposed once, so that a register holds one column (or pair of columns) of many rows. Along a block row the sums
// of some outputs stay in registers; each weight is spread over a register and meets the rows of x there. What is not
// stored costs nothing, and what is stored runs at the rate of a dense product.
// Included after the translation unit has set its target; everything lies in anonymous namespaces.
#pragma once

#include "driver.h"

namespace pumice {
namespace {

#if defined(_MSC_VER) && !defined(__clang__)
#define PUMICE_APART __declspec(noinline)
#else
#define PUMICE_APART __attribute__((noinline))
#endif

// Steps after which the sums leave the registers: so much of x is still in the first cache when the next outputs read it.
// Besides, the error of one long sum would be larger.
constexpr int64_t kStretch = 80;
constexpr int64_t kStrip = 32;  // outputs whose sums are collected before they are written to y together

// Two bf16 weights; where there is only one, the other is zero and not read.
template <bool kWhole>
inline int pair_at(const BF16* p) {
  int two = p->bits;
  if (kWhole) memcpy(&two, p, 4);
  return two;
}

// Four weights of eight bits, of which `left` are there if not all.
template <bool kWhole>
inline int four_at(const int8_t* p, int64_t left) {
  int four = 0;
  memcpy(&four, p, kWhole ? 4 : (size_t)left);
  return four;
}

template <class Isa>
inline int64_t steps_of_block(const Matrix& w) {
  return (w.c + Isa::kColumns - 1) / Isa::kColumns;
}

// Some blocks of a block row: from `begin` to `end`, their rows from `i` on.
struct Stretch {
  int64_t begin, end, i;
  int64_t ahead;  // as in block_product
  bool add;       // to the sums that are there
};

// M rows of the blocks times the rows of x in N registers from `x` on.
// Not inlined: beside the loops around it there would not be registers enough.
template <class Isa, int M, int N>
PUMICE_APART void walk(const Matrix& w, const Stretch& part, const uint32_t* x, int64_t width, float* sums) {
  typedef typename Isa::T T;
  typename Isa::Reg acc[M][N];
  PUMICE_UNROLL
  for (int m = 0; m < M; ++m)
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) acc[m][n] = Isa::zero();
  const int64_t c = w.c, step = Isa::kWords * width, whole = c / Isa::kColumns;
  const int64_t block = steps_of_block<Isa>(w) * step;
  for (int64_t b = part.begin; b < part.end; ++b) {
    const T* p = (const T*)w.values + (b * w.r + part.i) * c;
    const uint32_t* v = x + w.columns[b] * block;
    // All of a block that comes later from memory; and of the next one what is read here, from the second cache.
    if (part.ahead) Isa::fetch(p + part.ahead, w.r * c);
    Isa::fetch(p + w.r * c, M * c);
    for (int64_t s = 0; s < whole; ++s, p += Isa::kColumns, v += step)
      Isa::template step<M, N, true>(acc, p, c, v, width);
    if (Isa::kColumns > 1 && c % Isa::kColumns) Isa::template step<M, N, false>(acc, p, c, v, width);
  }
  PUMICE_UNROLL
  for (int m = 0; m < M; ++m)
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) Isa::put(sums + m * width + n * Isa::kLanes, acc[m][n], part.add);
}

// The same with n <= N registers.
template <class Isa, int M, int N>
inline void walk_up_to(int64_t n, const Matrix& w, const Stretch& part, const uint32_t* x, int64_t width, float* sums) {
  if constexpr (N > 0) {
    if (n < N) return walk_up_to<Isa, M, N - 1>(n, w, part, x, width, sums);
    walk<Isa, M, N>(w, part, x, width, sums);
  }
}

// `rows` rows of the blocks times the first `lanes` rows of a panel.
template <class Isa>
inline void walk_rows(const Matrix& w, Stretch part, int64_t rows, const uint32_t* x, int64_t lanes, int64_t width,
                      float* sums) {
  constexpr int kMost = Isa::kMost;
  const int64_t together = Isa::registers(rows < kMost ? (int)rows : kMost);
  for (int64_t lane = 0, n; lane < lanes; lane += n * Isa::kLanes) {
    n = pass_rows((lanes - lane) / Isa::kLanes, together);
    for (int64_t k = 0, m; k < rows; k += m, part.i += m, part.ahead = 0) {
      const int64_t left = rows - k;
      m = left >= kMost ? kMost : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      if (m == kMost)
        walk_up_to<Isa, kMost, Isa::registers(kMost)>(n, w, part, x + lane, width, sums + k * width + lane);
      else if (m == 4)
        walk_up_to<Isa, 4, Isa::registers(4)>(n, w, part, x + lane, width, sums + k * width + lane);
      else if (m == 2)
        walk_up_to<Isa, 2, Isa::registers(2)>(n, w, part, x + lane, width, sums + k * width + lane);
      else
        walk_up_to<Isa, 1, Isa::registers(1)>(n, w, part, x + lane, width, sums + k * width + lane);
    }
    part.i -= rows;
  }
}

template <class Isa>
inline int64_t panel_steps(const Matrix& w) {
  return w.I / w.c * steps_of_block<Isa>(w);
}

template <class Isa>
void panel_product(const Matrix& w, int64_t begin, int64_t end, const Panel& x, void* y) {
  typedef typename Isa::T T;
  typedef typename Isa::Y Y;
  alignas(64) float sums[kStrip * Isa::kWidth];
  const int64_t size = panel_steps<Isa>(w) * Isa::kWords * x.width;
  const int64_t of_block = steps_of_block<Isa>(w), stretch = of_block < kStretch ? kStretch / of_block : 1;
  for (int64_t o = begin * w.r, stop; o < end * w.r; o = stop) {
    stop = o + kStrip < end * w.r ? o + kStrip : end * w.r;
    for (int64_t row = 0; row < x.rows; row += x.width) {
      const uint32_t* words = x.words + row / x.width * size;
      const int64_t rows = x.rows - row < x.width ? x.rows - row : x.width;
      const int64_t lanes = (rows + Isa::kLanes - 1) / Isa::kLanes * Isa::kLanes;
      for (int64_t at = o, m; at < stop; at += m) {
        const int64_t br = at / w.r, i = at % w.r, end_of_row = w.block_starts[br + 1];
        m = w.r - i < stop - at ? w.r - i : stop - at;
        // The first pass over a row of blocks fetches all of it; the others find it in cache.
        Stretch part = {w.block_starts[br], 0, i, i == 0 && row == 0 ? blocks_ahead<T>(w.r * w.c, kAhead) : 0, false};
        do {
          part.end = end_of_row - part.begin < stretch ? end_of_row : part.begin + stretch;
          walk_rows<Isa>(w, part, m, words, lanes, x.width, sums + (at - o) * x.width);
          part.begin = part.end, part.add = true;
        } while (part.begin < end_of_row);
      }
      Isa::store(w, o, stop - o, sums, x, row, rows, (Y*)y + row / x.each * w.O + o);
    }
  }
}

// Sums [outputs, width of the panel] of the outputs from o on to y [rows, O], which begins at output o.
template <class T>
inline void store_sums(const Matrix& w, int64_t o, int64_t outputs, const float* sums, const Panel& x, int64_t rows, T* y) {
  const float* bias = w.bias ? w.bias + o : nullptr;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < outputs; ++k) narrow(sums[k * x.width + r] + (bias ? bias[k] : 0.0f), y + r * w.O + k);
}

// A step of one row of x: a column, a pair of columns in one word, or two widened columns `width` words apart. Where
// there is no second column it is zero.
template <class Isa>
inline void step_of(const float* x, bool, uint32_t* out, int64_t) {
  memcpy(out, x, 4);
}
template <class Isa>
inline void step_of(const BF16* x, bool second, uint32_t* out, int64_t width) {
  const uint32_t low = x[0].bits, high = Isa::kColumns > 1 && second ? x[1].bits : 0;
  if (Isa::kColumns > Isa::kWords) {
    *out = low | high << 16;
    return;
  }
  out[0] = low << 16;
  if (Isa::kWords > 1) out[width] = high << 16;
}

constexpr int64_t kTurned = 16;  // steps that are transposed together

// Steps [begin, end) of one panel of `rows` rows.
template <class Isa>
inline void fill_plainly(const Matrix& w, int64_t begin, int64_t end, const typename Isa::T* x, int64_t rows, int64_t width,
                         uint32_t* words) {
  const int64_t of_block = steps_of_block<Isa>(w), step = Isa::kWords * width;
  for (int64_t s = begin; s < end; s += kTurned) {
    const int64_t count = s + kTurned < end ? kTurned : end - s;
    int64_t columns[kTurned];
    bool second[kTurned];
    for (int64_t k = 0; k < count; ++k) {
      const int64_t within = (s + k) % of_block * Isa::kColumns;
      columns[k] = (s + k) / of_block * w.c + within, second[k] = within + 1 < w.c;
    }
    if (rows < width) memset(words + s * step, 0, (size_t)(count * step) * sizeof(uint32_t));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < count; ++k)
        step_of<Isa>(x + r * w.I + columns[k], second[k], words + (s + k) * step + r, width);
  }
}

template <class Isa>
void panel_fill(const Matrix& w, int64_t begin, int64_t end, const void* x, const Panel& panel) {
  const int64_t size = panel_steps<Isa>(w) * Isa::kWords * panel.width;
  for (int64_t row = 0; row < panel.rows; row += panel.width) {
    const int64_t rows = panel.rows - row < panel.width ? panel.rows - row : panel.width;
    Isa::fill(w, begin, end, (const typename Isa::T*)x + row * w.I, rows, panel.width,
              panel.words + row / panel.width * size);
  }
}

template <class Isa>
constexpr BlockPanels block_panels() {
  return {Isa::kLanes, Isa::kMost, Isa::kTall, Isa::kWidth, Isa::kColumns, Isa::kWords, panel_fill<Isa>, panel_product<Isa>};
}

}  // namespace
}  // namespace pumice
