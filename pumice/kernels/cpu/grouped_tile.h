// The loops of grouped products, over the vectors of one instruction set. Included after it has set its target.
//
// A type `V` says how numbers are held: `Reg` of operands, `Sum` of sums, `hold`, which keeps a loaded operand in its
// register (compilers would rather read it from cache again for every product), and
//   rows mode (inputs side by side in w): kLanes inputs a Reg, tiles of kM outputs times kN rows of x (kDirectM and
//     kDirectN where w is not packed), whose sums are added up across lanes at the end of kStretch inputs;
//     Where there are many rows of x, w is turned (kTurns: this set can) and multiplied as in
//   columns mode (outputs side by side in w): kWidth outputs a Sum, kStep inputs at a time, kCross Sums from one load,
//     tiles of kV Sums times kR rows of x.
// Few rows read w where it lies, each weight once from memory: the stream of weights sets the pace. More rows go in
// blocks that stay in cache, with both operands packed so that they fall into different cache sets.
#pragma once

#include "activation.h"
#include "grouped.h"
#include "kernels.h"
#include "threads.h"

#if defined(__SSE2__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

namespace pumice {
namespace {

constexpr int64_t kRowBlock = 128;     // rows of x whose part of a stretch stays in the second-level cache, packed
constexpr int64_t kTurnedBlock = 256;  // the same where x is not packed, since w is turned
constexpr int64_t kColumnBlock = 128;  // columns of the result at a time
constexpr int64_t kDirectRows = 8;     // up to so many rows w is not packed
constexpr int64_t kTurnedRows = 96;    // from so many on, w is turned where its inputs lie side by side
constexpr int64_t kFetchAhead = 2048;  // bytes of each row of w that are fetched before their use, into the second cache
constexpr int64_t kWay = 4096;         // bytes after which addresses meet in the same set of the first cache
constexpr int64_t kSumsStride = 2 * kColumnBlock + 160;

template <class T>
inline void ask(const T* p) {
#if defined(__SSE2__) || defined(_M_X64)
  _mm_prefetch((const char*)p, _MM_HINT_T1);
#else
  (void)p;
#endif
}

// One expert's part of a stage: `rows` rows of x, given by their places, times outputs [o, o + count) of w.
template <class V>
struct Part {
  typedef typename V::T T;
  const T* w;
  int64_t w_output, w_input, I;
  const T* const* x;
  int64_t rows;
  typename V::Reg *x_pack, *w_pack;
};

template <class V, int M, int N>
inline void put_sums(const typename V::Sum (*acc)[N], float* out, bool add) {
  PUMICE_UNROLL
  for (int n = 0; n < N; ++n) {
    float sums[M];
    typename V::Sum one[M];
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m) one[m] = acc[m][n];
    V::template reduce<M>(one, sums);
    float* row = out + n * kSumsStride;
    if (add)
      for (int m = 0; m < M; ++m) row[m] += sums[m];
    else
      for (int m = 0; m < M; ++m) row[m] = sums[m];
  }
}

// M rows of w where they lie times N rows of x; the next tile begins `next` elements further on.
template <class V, int M, int N>
inline void dots(const Part<V>& p, const typename V::T* w, int64_t next, const typename V::T* const* x, float* out) {
  typename V::Sum acc[M][N];
  PUMICE_UNROLL
  for (int m = 0; m < M; ++m)
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) acc[m][n] = V::zero();
  const int64_t whole = p.I / V::kLanes * V::kLanes, stride = p.w_output;
  int64_t i = 0;
  // Near the end of a row, what comes next is the beginning of the same row of the next tile.
  const int64_t near = kFetchAhead / (int64_t)sizeof(typename V::T), turn = whole > near ? whole - near : 0;
  for (; i < whole; i += V::kLanes) {
    typename V::Reg v[N];
    const int64_t soon = i < turn ? i + near : next + i - turn;
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) v[n] = V::load(x[n] + i);
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m) {
      const typename V::T* at = w + m * stride + i;
      ask(w + m * stride + soon);
      const typename V::Reg r = V::hold(V::load(at));
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = V::fma(acc[m][n], r, v[n]);
    }
  }
  if (i < p.I) {
    typename V::Reg v[N];
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) v[n] = V::load(x[n] + i, p.I - i);
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m) {
      const typename V::Reg r = V::load(w + m * stride + i, p.I - i);
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = V::fma(acc[m][n], r, v[n]);
    }
  }
  put_sums<V, M, N>(acc, out, false);
}

template <class V, int M, int N>
inline void dots_up_to(int n, const Part<V>& p, const typename V::T* w, int64_t next, const typename V::T* const* x,
                       float* out) {
  if constexpr (N > 0) {
    if (n < N) return dots_up_to<V, M, N - 1>(n, p, w, next, x, out);
    dots<V, M, N>(p, w, next, x, out);
  }
}

inline int64_t even_pass(int64_t rows, int64_t most) {
  const int64_t passes = (rows + most - 1) / most;
  return passes ? (rows + passes - 1) / passes : 1;
}

template <class V, int M, int N>
inline void rows_direct(const Part<V>& p, int64_t o, int64_t count, float* sums) {
  const int64_t pass = even_pass(p.rows, N);
  for (int64_t c = 0; c < count;) {
    const typename V::T* w = p.w + (o + c) * p.w_output;
    const int m = count - c >= M ? M : 1;
    for (int64_t r = 0; r < p.rows; r += pass) {
      const int n = (int)(p.rows - r < pass ? p.rows - r : pass);
      float* out = sums + r * kSumsStride + c;
      if (m > 1)
        dots_up_to<V, M, N>(n, p, w, m * p.w_output, p.x + r, out);
      else
        dots_up_to<V, 1, N>(n, p, w, m * p.w_output, p.x + r, out);
    }
    c += m;
  }
}

// `kPacked`: w comes as kM Regs a step; else its kM rows lie `stride` elements apart.
template <class V, int N, bool kPacked>
inline void packed_dots(const typename V::Reg* packed, const typename V::T* w, int64_t stride, const typename V::Reg* x,
                        int64_t steps, float* out, bool add) {
  constexpr int M = V::kM;
  typename V::Sum acc[M][N];
  PUMICE_UNROLL
  for (int m = 0; m < M; ++m)
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) acc[m][n] = V::zero();
  for (int64_t k = 0; k < steps; ++k, packed += kPacked ? M : 0, w += kPacked ? 0 : V::kLanes, x += N) {
    typename V::Reg v[N];
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) v[n] = x[n];
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m) {
      const typename V::Reg r = V::hold(kPacked ? packed[m] : V::load(w + m * stride));
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = V::fma(acc[m][n], r, v[n]);
    }
  }
  put_sums<V, M, N>(acc, out, add);
}

template <class V, int N, bool kPacked>
inline void packed_dots_up_to(int n, const typename V::Reg* packed, const typename V::T* w, int64_t stride,
                              const typename V::Reg* x, int64_t steps, float* out, bool add) {
  if constexpr (N > 0) {
    if (n < N) return packed_dots_up_to<V, N - 1, kPacked>(n, packed, w, stride, x, steps, out, add);
    packed_dots<V, N, kPacked>(packed, w, stride, x, steps, out, add);
  }
}

// `count` vectors side by side for each step of inputs [i, i + n), from rows that lie `rows(k)`.
template <class V, class Rows>
inline void pack(Rows rows, int count, int there, int64_t i, int64_t n, typename V::Reg* out) {
  for (int m = 0; m < count; ++m) {
    typename V::Reg* to = out + m;
    if (m >= there) {
      for (int64_t k = 0; k < n; k += V::kLanes, to += count) *to = V::none();
      continue;
    }
    const typename V::T* from = rows(m) + i;
    int64_t k = 0;
    for (; k + V::kLanes <= n; k += V::kLanes, to += count) *to = V::load(from + k);
    if (k < n) *to = V::load(from + k, n - k);
  }
}

template <class V>
inline void rows_packed(const Part<V>& p, int64_t o, int64_t count, float* sums) {
  typedef typename V::T T;
  const int64_t pass = even_pass(p.rows, V::kN);
  // Rows that lie a multiple of a cache's way apart would drive each other out.
  const bool apart = p.w_output * (int64_t)sizeof(T) % kWay != 0;
  for (int64_t i = 0; i < p.I; i += V::kStretch) {
    const int64_t n = p.I - i < V::kStretch ? p.I - i : V::kStretch, steps = (n + V::kLanes - 1) / V::kLanes;
    for (int64_t r = 0; r < p.rows; r += pass) {
      const int width = (int)(p.rows - r < pass ? p.rows - r : pass);
      pack<V>([&](int m) { return p.x[r + m]; }, width, width, i, n, p.x_pack + r * steps);
    }
    for (int64_t c = 0; c < count; c += V::kM) {
      const int there = (int)(count - c < V::kM ? count - c : V::kM);
      const T* w = p.w + (o + c) * p.w_output;
      const bool direct = apart && there == V::kM && n % V::kLanes == 0;
      if (!direct) pack<V>([&](int m) { return w + m * p.w_output; }, V::kM, there, i, n, p.w_pack);
      // Memory works on the next tile while this one is multiplied.
      const int64_t line = 64 / (int64_t)sizeof(T), lines = (n + line - 1) / line, share = lines * pass / p.rows + 1;
      int64_t next = 0;
      for (int64_t r = 0; r < p.rows; r += pass) {
        for (const int64_t stop = next + share < lines ? next + share : lines; next < stop; ++next)
          for (int m = 0; m < V::kM; ++m) ask(w + (V::kM + m) * p.w_output + i + next * line);
        const int width = (int)(p.rows - r < pass ? p.rows - r : pass);
        float* out = sums + r * kSumsStride + c;
        if (direct)
          packed_dots_up_to<V, V::kN, false>(width, nullptr, w + i, p.w_output, p.x_pack + r * steps, steps, out, i > 0);
        else
          packed_dots_up_to<V, V::kN, true>(width, p.w_pack, nullptr, 0, p.x_pack + r * steps, steps, out, i > 0);
      }
    }
  }
}

// Columns mode: `kLeft` inputs from i on, times S Sums of outputs of N rows of x. `kPacked`: w comes as S Regs a step,
// else from where it lies.
template <class V, int S, int N, bool kPacked, int kLeft>
inline void spread_step(const typename V::T* w, int64_t stride, const typename V::Reg* packed, int64_t outputs,
                        const typename V::T* const* x, int64_t i, typename V::Sum (*acc)[S]) {
  typename V::Reg v[S];
  if constexpr (kPacked) {
    PUMICE_UNROLL
    for (int s = 0; s < S; ++s) v[s] = V::hold(packed[s]);
  } else {
    PUMICE_UNROLL
    for (int s = 0; s < S; s += V::kCross)
      V::cross(w + s * V::kWidth, stride, kLeft, outputs - s * V::kWidth, v + s);
  }
  PUMICE_UNROLL
  for (int r = 0; r < N; ++r) {
    const typename V::Reg b = V::hold(V::spread(x[r] + i, kLeft));
    PUMICE_UNROLL
    for (int s = 0; s < S; ++s) acc[r][s] = V::fma(acc[r][s], v[s], b);
  }
}

template <class V, int S, int N, bool kPacked>
inline void spreads(const typename V::T* w, int64_t stride, const typename V::Reg* packed, int64_t outputs,
                    const typename V::T* const* x, int64_t x_from, int64_t n, float* out, bool add) {
  typename V::Sum acc[N][S];
  PUMICE_UNROLL
  for (int r = 0; r < N; ++r)
    PUMICE_UNROLL
    for (int s = 0; s < S; ++s) acc[r][s] = V::zero();
  int64_t i = 0;
  for (; i + V::kStep <= n; i += V::kStep, packed += kPacked ? S : 0)
    spread_step<V, S, N, kPacked, V::kStep>(w + i * stride, stride, packed, outputs, x, x_from + i, acc);
  if (i < n) spread_step<V, S, N, kPacked, 1>(w + i * stride, stride, packed, outputs, x, x_from + i, acc);
  PUMICE_UNROLL
  for (int r = 0; r < N; ++r)
    PUMICE_UNROLL
    for (int s = 0; s < S; ++s) V::put(out + r * kSumsStride + s * V::kWidth, acc[r][s], add);
}

template <class V, int S, int N, bool kPacked>
inline void spreads_up_to(int rows, const typename V::T* w, int64_t stride, const typename V::Reg* packed,
                          int64_t outputs, const typename V::T* const* x, int64_t x_from, int64_t n, float* out,
                          bool add) {
  if constexpr (N > 0) {
    if (rows < N)
      return spreads_up_to<V, S, N - 1, kPacked>(rows, w, stride, packed, outputs, x, x_from, n, out, add);
    spreads<V, S, N, kPacked>(w, stride, packed, outputs, x, x_from, n, out, add);
  }
}

template <class V>
inline void columns_direct(const Part<V>& p, int64_t o, int64_t count, float* sums) {
  // With few rows there are registers for wide tiles, which read longer stretches of each row of w.
  constexpr int kWide = V::kV * V::kR;
  for (int64_t r = 0; r < p.rows;) {
    const int64_t left = p.rows - r;
    const int n = (int)(left == 1 ? 1 : left < V::kR ? left : V::kR);
    const int64_t width = (n == 1 ? kWide / 2 : V::kV) * V::kWidth;
    for (int64_t c = 0; c < count; c += width) {
      const typename V::T* w = p.w + o + c;
      float* out = sums + r * kSumsStride + c;
      if (n == 1)
        spreads<V, kWide / 2, 1, false>(w, p.w_input, nullptr, count - c, p.x + r, 0, p.I, out, false);
      else
        spreads_up_to<V, V::kV, V::kR, false>(n, w, p.w_input, nullptr, count - c, p.x + r, 0, p.I, out, false);
    }
    r += n;
  }
}

// Tiles of kV * kWidth outputs in columns mode, packed by `pack(i, n, c)`: inputs [i, i + n), outputs from c on.
template <class V, class Pack>
inline void tiles_packed(const Part<V>& p, int64_t count, float* sums, const Pack& pack) {
  const int64_t pass = even_pass(p.rows, V::kR);
  for (int64_t i = 0; i < p.I; i += V::kStretch / 2) {
    const int64_t n = p.I - i < V::kStretch / 2 ? p.I - i : V::kStretch / 2;
    for (int64_t c = 0; c < count; c += V::kV * V::kWidth) {
      pack(i, n, c);
      for (int64_t r = 0; r < p.rows; r += pass) {
        const int width = (int)(p.rows - r < pass ? p.rows - r : pass);
        spreads_up_to<V, V::kV, V::kR, true>(width, nullptr, 0, p.w_pack, count - c, p.x + r, i, n,
                                             sums + r * kSumsStride + c, i > 0);
      }
    }
  }
}

template <class V>
inline void columns_packed(const Part<V>& p, int64_t o, int64_t count, float* sums) {
  tiles_packed(p, count, sums, [&p, o, count](int64_t i, int64_t n, int64_t c) {
    typename V::Reg* to = p.w_pack;
    const typename V::T* w = p.w + i * p.w_input + o + c;
    for (int64_t k = 0; k < n; k += V::kStep, to += V::kV)
      for (int s = 0; s < V::kV; s += V::kCross)
        V::cross(w + k * p.w_input + s * V::kWidth, p.w_input, (int)(n - k < V::kStep ? n - k : V::kStep),
                 count - c - s * V::kWidth, to + s);
  });
}

// Rows mode as columns mode: w is turned as it is packed, so that no sums need be added up across lanes. Worth it where many
// rows meet it.
template <class V>
inline void rows_turned(const Part<V>& p, int64_t o, int64_t count, float* sums) {
  static_assert(V::kLanes == V::kStep * V::kWidth, "a square is turned");
  tiles_packed(p, count, sums, [&p, o, count](int64_t i, int64_t n, int64_t c) {
    for (int64_t s = 0; s < V::kV; ++s) {
      const int64_t first = c + s * V::kWidth;
      const typename V::T* w = p.w + (o + first) * p.w_output + i;
      for (int64_t k = 0; k < n; k += V::kLanes) {
        typename V::Reg r[V::kWidth];
        PUMICE_UNROLL
        for (int m = 0; m < V::kWidth; ++m) {
          const typename V::T* from = w + m * p.w_output + k;
          const bool there = first + m < count, whole = n - k >= V::kLanes;
          r[m] = !there ? V::none() : whole ? V::load(from) : V::load(from, n - k);
        }
        V::turn(r);
        typename V::Reg* to = p.w_pack + k / V::kStep * V::kV + s;
        PUMICE_UNROLL
        for (int q = 0; q < V::kWidth; ++q) to[q * V::kV] = r[q];
      }
    }
  });
}

template <class V>
inline void product(const Part<V>& p, int64_t o, int64_t count, float* sums) {
  if constexpr (V::kTurns)
    if (p.w_input == 1 && p.rows >= kTurnedRows) return rows_turned<V>(p, o, count, sums);
  const bool direct = p.rows <= kDirectRows;
  if (p.w_input == 1 && p.rows <= V::kN)  // more streams of weights are faster, as long as the sums fit the registers
    rows_direct<V, V::kM, V::kN>(p, o, count, sums);
  else if (p.w_input == 1 && direct)
    rows_direct<V, V::kDirectM, V::kDirectN>(p, o, count, sums);
  else if (p.w_input == 1)
    rows_packed<V>(p, o, count, sums);
  else if (direct)
    columns_direct<V>(p, o, count, sums);
  else
    columns_packed<V>(p, o, count, sums);
}

template <class T>
inline void add_bias(const T* bias, int64_t count, int64_t rows, float* sums) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < count; ++c) sums[r * kSumsStride + c] += widen(bias[c]);
}

// Columns [begin, begin + n) of rows [a, a + rows) of the result. `kept` is row 0 of the sums of kScatter at column 0.
template <class T>
inline void finish(const Stage& s, int64_t a, int64_t rows, int64_t begin, int64_t n, const float* sums,
                   const float* partner, float* kept, int64_t kept_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = sums + r * kSumsStride;
    const float scale = s.scale ? s.scale[a + r] : 1.0f;
    T* to = (T*)s.y + (a + r) * s.columns + begin;
    if (s.finish == kScatter || s.finish == kAdd) {
      float* __restrict sum = kept + s.scatter[a + r] * kept_stride + begin;
      for (int64_t c = 0; c < n; ++c) sum[c] += scale * from[c];
    } else if (s.finish == kStore) {
      for (int64_t c = 0; c < n; ++c) narrow(scale * from[c], to + c);
    } else {
      activate(s, from, s.finish == kGate ? partner + r * kSumsStride : nullptr, s.step, n, to);
    }
  }
}

template <class V>
bool stage_columns(const Stage& s, int64_t begin, int64_t end) {
  typedef typename V::T T;
  typedef typename V::Reg Reg;
  constexpr int64_t kBlock = V::kTurns ? kTurnedBlock : kRowBlock;
  const int64_t x_regs = kRowBlock * (V::kStretch / V::kLanes), w_most = V::kM > V::kV ? V::kM : V::kV;
  const size_t bytes = sizeof(Reg) * (size_t)(x_regs + w_most * V::kStretch) + sizeof(float) * kBlock * kSumsStride;
  Reg* space = (Reg*)scratch(2, bytes + 256);
  if (!space) return false;
  Part<V> p = {};
  p.x_pack = space, p.w_pack = space + x_regs;
  float* sums = (float*)(p.w_pack + w_most * V::kStretch);
  p.w_output = s.w_output, p.w_input = s.w_input, p.I = s.I;

  float* kept = (float*)s.y;
  int64_t kept_stride = s.columns;
  if (s.finish == kScatter) {
    if (s.dtype != kF32) {
      kept_stride = end - begin;
      kept = (float*)scratch(3, sizeof(float) * (size_t)(s.rows * kept_stride));
      if (!kept) return false;
      kept -= begin;
    }
    for (int64_t r = 0; r < s.rows; ++r) memset(kept + r * kept_stride + begin, 0, sizeof(float) * (size_t)(end - begin));
  }

  const T* x[kBlock];
  p.x = x;
  const bool together = s.finish == kGate && s.step > 1;
  for (int64_t e = 0; e < s.E; ++e)
    for (int64_t a = s.offsets[e]; a < s.offsets[e + 1]; a += kBlock) {
      p.rows = s.offsets[e + 1] - a < kBlock ? s.offsets[e + 1] - a : kBlock;
      for (int64_t r = 0; r < p.rows; ++r) x[r] = (const T*)s.x + (s.gather ? s.gather[a + r] : a + r) * s.x_stride;
      p.w = (const T*)s.w + e * s.w_expert;
      const int64_t outputs = s.columns * (s.finish == kGate ? 2 : 1);
      const T* bias = s.bias ? (const T*)s.bias + e * outputs : nullptr;
      for (int64_t c = begin; c < end; c += kColumnBlock) {
        const int64_t n = end - c < kColumnBlock ? end - c : kColumnBlock;
        const int64_t o = together ? c * s.step : c, count = together ? n * s.step : n;
        float* partner = sums + (together ? s.first : kColumnBlock + 64);
        product<V>(p, o, count, sums);
        if (bias) add_bias(bias + o, count, p.rows, sums);
        if (s.finish == kGate && !together) {
          product<V>(p, o + s.first, count, partner);
          if (bias) add_bias(bias + o + s.first, count, p.rows, partner);
        }
        finish<T>(s, a, p.rows, c, n, sums, partner, kept, kept_stride);
      }
    }
  if (s.finish == kScatter && s.dtype != kF32)
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t c = begin; c < end; ++c) narrow(kept[r * kept_stride + c], (T*)s.y + r * s.columns + c);
  return true;
}

}  // namespace
}  // namespace pumice
