// Tiles in AVX2: columns gathered from x in fp32, eight at a time. Included by avx2.cpp.
#pragma once

#include "tiles_kernel.h"

namespace pumice {
namespace {

template <class Value>
struct Few256 {
  typedef Value T;
  typedef float X;
  static constexpr int kMost = 1;

  template <int N>
  struct Table {
    const float* x;
    Table(const float* from, int64_t) : x(from) {}
  };

  template <int N>
  static inline void slice(const Table<N>& table, const T* v, const uint8_t* c, int64_t steps, float (*sums)[kSlice]) {
    __m256 acc[4];
    PUMICE_UNROLL
    for (int k = 0; k < 4; ++k) acc[k] = _mm256_setzero_ps();
    for (int64_t s = 0; s < steps; ++s, v += kStep, c += kStep) {
      fetch(v + kTilesAhead / sizeof(T), kStep);
      _mm_prefetch((const char*)c + kTilesAhead / 2, _MM_HINT_T0);
      PUMICE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(c + 8 * k)));
        acc[k] = _mm256_fmadd_ps(load8(v + 8 * k), _mm256_i32gather_ps(table.x, at, 4), acc[k]);
      }
    }
    // Both numbers of a pair stand side by side: their sums belong to one row.
    float each[4][8];
    PUMICE_UNROLL
    for (int k = 0; k < 4; ++k) _mm256_storeu_ps(each[k], acc[k]);
    for (int l = 0; l < kSlice; ++l) sums[0][l] = each[l / 4][2 * (l % 4)] + each[l / 4][2 * (l % 4) + 1];
  }
};

template <class Value, int Regs>
struct Many256 {
  typedef Value T;
  typedef float X;
  typedef __m256 Reg;
  static constexpr int kWidth = 8 * Regs, kRegs = Regs, kTogether = 4;

  static Reg get(const float* p) { return _mm256_loadu_ps(p); }
  static void put(float* p, Reg r) { _mm256_storeu_ps(p, r); }
  static int place(int row) { return row; }
  static void fetch(const T* v, const uint8_t* c) {
    pumice::fetch(v + kTilesAhead / sizeof(T), kStep);
    _mm_prefetch((const char*)c + kTilesAhead / 2, _MM_HINT_T0);
  }
  static void step(Reg* acc, const T* pair, const float* x0, const float* x1) {
    const __m256 first = _mm256_set1_ps(widen(pair[0])), second = _mm256_set1_ps(widen(pair[1]));
    PUMICE_UNROLL
    for (int k = 0; k < kRegs; ++k) acc[k] = _mm256_fmadd_ps(first, _mm256_loadu_ps(x0 + 8 * k), acc[k]);
    PUMICE_UNROLL
    for (int k = 0; k < kRegs; ++k) acc[k] = _mm256_fmadd_ps(second, _mm256_loadu_ps(x1 + 8 * k), acc[k]);
  }
};

}  // namespace
}  // namespace pumice
