// Blocks times many rows of x in AVX2, in fp32. Included by avx2.cpp.
#pragma once

#include "blocks_kernel.h"

namespace pumice {
namespace {

template <class Value>
struct Blocks256 {
  typedef Value T;
  typedef Value Y;
  typedef __m256 Reg;
  static constexpr int64_t kLanes = 8, kTall = 16, kWidth = 32;
  static constexpr int64_t kMost = 4;
  static constexpr int64_t kColumns = sizeof(T) == 2 ? 2 : 1, kWords = kColumns;
  static constexpr int registers(int64_t m) { return m == 4 ? 2 : 4; }

  static Reg zero() { return _mm256_setzero_ps(); }
  static void put(float* p, Reg r, bool add) { _mm256_storeu_ps(p, add ? _mm256_add_ps(_mm256_loadu_ps(p), r) : r); }
  static void fetch(const T* p, int64_t n) { pumice::fetch(p, n); }

  template <int M, int N, bool kWhole>
  static inline void step(Reg (*acc)[N], const float* p, int64_t c, const uint32_t* x, int64_t) {
    __m256 v[N];
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) v[n] = _mm256_loadu_ps((const float*)x + 8 * n);
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m) {
      const __m256 w = _mm256_set1_ps(p[m * c]);
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = _mm256_fmadd_ps(w, v[n], acc[m][n]);
    }
  }

  // One column after the other, so that both of x need not be held at once.
  template <int M, int N, bool kWhole>
  static inline void step(Reg (*acc)[N], const BF16* p, int64_t c, const uint32_t* x, int64_t width) {
    PUMICE_UNROLL
    for (int half = 0; half < 2; ++half) {
      __m256 v[N];
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) v[n] = _mm256_loadu_ps((const float*)x + half * width + 8 * n);
      PUMICE_UNROLL
      for (int m = 0; m < M; ++m) {
        const __m256i two = _mm256_set1_epi32(pair_at<kWhole>(p + m * c));
        const __m256i one = half ? _mm256_and_si256(two, _mm256_set1_epi32((int)0xffff0000)) : _mm256_slli_epi32(two, 16);
        PUMICE_UNROLL
        for (int n = 0; n < N; ++n) acc[m][n] = _mm256_fmadd_ps(_mm256_castsi256_ps(one), v[n], acc[m][n]);
      }
    }
  }

  static void store(const Matrix& w, int64_t o, int64_t outputs, const float* sums, const Panel& x, int64_t, int64_t rows,
                    T* y) {
    store_sums(w, o, outputs, sums, x, rows, y);
  }
  static void fill(const Matrix& w, int64_t begin, int64_t end, const T* x, int64_t rows, int64_t width, uint32_t* words) {
    fill_plainly<Blocks256>(w, begin, end, x, rows, width, words);
  }
};

}  // namespace
}  // namespace pumice
