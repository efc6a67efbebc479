// Blocks times many rows of x in AVX-512; products in fp32 for sets without bf16 products.
// Included by the AVX-512 translation units after they have set their target.
#pragma once

#include "blocks_kernel.h"

namespace pumice {
namespace {

inline void narrow16(__m512 v, __mmask16 k, float* out) { _mm512_mask_storeu_ps(out, k, v); }
// As `narrow` does it: to nearest, ties to even, a NaN stays one.
inline void narrow16(__m512 v, __mmask16 k, BF16* out) {
  const __m512i bits = _mm512_castps_si512(v), top = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  rounded = _mm512_srli_epi32(rounded, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, top, _mm512_set1_epi32(0x40));
  _mm256_mask_storeu_epi16(out, k, _mm512_cvtepi32_epi16(rounded));
}

// Sums [outputs, width of the panel] to y [rows, O], sixteen rows of bytes (or of x) at a time: `finish(k, v, row)` makes
// numbers of sums v[0 … 15] of the outputs from k on, as many as there are rows of x.
template <class Y, class Finish>
inline void store_by_turning(const Matrix& w, int64_t outputs, const float* sums, const Panel& x, int64_t rows, Y* y,
                             const Finish& finish) {
  static_assert(kStrip == 32, "two registers of outputs");
  for (int64_t r = 0; r < rows; r += 16) {
    alignas(64) float turned[2][16][16];
    for (int64_t k = 0, half = 0; k < outputs; k += 16, ++half) {
      __m512i v[16];
      PUMICE_UNROLL
      for (int i = 0; i < 16; ++i)
        v[i] = k + i < outputs ? _mm512_loadu_si512(sums + (k + i) * x.width + r) : _mm512_setzero_si512();
      turn(v);
      finish(k, v, r, turned[half]);
    }
    // Row by row, since rows of y often lie a power of two apart and would drive each other out of the cache.
    const int64_t count = (rows - r < 16 ? rows - r : 16) / x.each;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < outputs; k += 16)
        narrow16(_mm512_load_ps(turned[k / 16][i]), first16(outputs - k), y + (r / x.each + i) * w.O + k);
  }
}

template <class Value>
struct Blocks512 {
  typedef Value T;
  typedef Value Y;
  typedef __m512 Reg;
  static constexpr int64_t kLanes = 16, kTall = 48, kWidth = 64;
  static constexpr int64_t kMost = 8;
  static constexpr int registers(int64_t m) { return m == 8 ? 3 : 4; }

  static Reg zero() { return _mm512_setzero_ps(); }
  static void put(float* p, Reg r, bool add) { _mm512_storeu_ps(p, add ? _mm512_add_ps(_mm512_loadu_ps(p), r) : r); }
  template <class W>
  static void fetch(const W* p, int64_t n) {
    pumice::fetch(p, n);
  }

  static void store(const Matrix& w, int64_t o, int64_t outputs, const float* sums, const Panel& x, int64_t, int64_t rows,
                    T* y) {
    const float* bias = w.bias ? w.bias + o : nullptr;
    const auto finish = [bias, outputs](int64_t k, const __m512i* v, int64_t, float(*out)[16]) {
      const __m512 more = bias ? _mm512_maskz_loadu_ps(first16(outputs - k), bias + k) : _mm512_setzero_ps();
      PUMICE_UNROLL
      for (int i = 0; i < 16; ++i) _mm512_store_ps(out[i], _mm512_add_ps(_mm512_castsi512_ps(v[i]), more));
    };
    store_by_turning(w, outputs, sums, x, rows, y, finish);
  }
};

// Words [begin, end) of one panel, where those of a row lie one after the other in x: `load(row, word, mask)` gives sixteen.
template <class Load>
inline void fill_by_turning(const Load& load, int64_t begin, int64_t end, int64_t rows, int64_t width, uint32_t* words) {
  for (int64_t at = begin; at < end; at += 16) {
    const int64_t count = end - at < 16 ? end - at : 16;
    const __mmask16 inside = first16(count);
    for (int64_t r = 0; r < width; r += 16) {
      __m512i v[16];
      PUMICE_UNROLL
      for (int k = 0; k < 16; ++k) v[k] = r + k < rows ? load(r + k, at, inside) : _mm512_setzero_si512();
      turn(v);
      alignas(64) uint32_t turned[16][16];
      if (count == 16) {
        PUMICE_UNROLL
        for (int k = 0; k < 16; ++k) _mm512_storeu_si512(words + (at + k) * width + r, v[k]);
        continue;
      }
      PUMICE_UNROLL
      for (int k = 0; k < 16; ++k) _mm512_store_si512(turned[k], v[k]);
      for (int64_t k = 0; k < count; ++k) _mm512_storeu_si512(words + (at + k) * width + r, _mm512_load_si512(turned[k]));
    }
  }
}

// Products in fp32. bf16 weights are spread in pairs, and parted in registers.
template <class Value>
struct FloatBlocks512 : Blocks512<Value> {
  typedef Value T;
  typedef __m512 Reg;
  static constexpr int64_t kColumns = sizeof(T) == 2 ? 2 : 1, kWords = kColumns;

  template <int M, int N, bool kWhole>
  static inline void step(Reg (*acc)[N], const float* p, int64_t c, const uint32_t* x, int64_t) {
    __m512 v[N];
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) v[n] = _mm512_loadu_ps(x + 16 * n);
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m) {
      const __m512 w = _mm512_set1_ps(p[m * c]);
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = _mm512_fmadd_ps(w, v[n], acc[m][n]);
    }
  }

  template <int M, int N, bool kWhole>
  static inline void step(Reg (*acc)[N], const BF16* p, int64_t c, const uint32_t* x, int64_t width) {
    __m512 v[2][N];
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) {
      v[0][n] = _mm512_loadu_ps(x + 16 * n);
      v[1][n] = _mm512_loadu_ps(x + width + 16 * n);
    }
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m) {
      const __m512i w = _mm512_set1_epi32(pair_at<kWhole>(p + m * c));
      const __m512 low = lower_halves(w), high = upper_halves(w);
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = _mm512_fmadd_ps(low, v[0][n], acc[m][n]);
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = _mm512_fmadd_ps(high, v[1][n], acc[m][n]);
    }
  }

  static void fill(const Matrix& w, int64_t begin, int64_t end, const T* x, int64_t rows, int64_t width, uint32_t* words) {
    if (w.c % kColumns) return fill_plainly<FloatBlocks512>(w, begin, end, x, rows, width, words);
    const int64_t I = w.I;
    const auto load = [x, I](int64_t row, int64_t word, __mmask16 inside) {
      return _mm512_castps_si512(load16(inside, x + row * I + word));
    };
    fill_by_turning(load, begin * kWords, end * kWords, rows, width, words);
  }
};

}  // namespace
}  // namespace pumice
