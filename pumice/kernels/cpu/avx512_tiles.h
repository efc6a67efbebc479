// Tiles in AVX-512: columns looked up by permutations, and products in fp32 for sets without bf16 products.
// Included by the AVX-512 translation units after they have set their target.
#pragma once

#include "tiles_kernel.h"

namespace pumice {
namespace {

template <class T>
inline void fetch_tiles(const T* values, const uint8_t* columns) {
  for (size_t byte = 0; byte < kStep * sizeof(T); byte += 64)
    _mm_prefetch((const char*)values + kTilesAhead + byte, _MM_HINT_T0);
  _mm_prefetch((const char*)columns + kTilesAhead / 2, _MM_HINT_T0);
}

// 256 bf16 of each of N rows of x in eight registers; 32 are looked up at once.
struct Words512 {
  template <int N>
  struct Table {
    __m512i words[N][8];
    Table(const BF16* x, int64_t stride) {
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n)
        PUMICE_UNROLL
        for (int k = 0; k < 8; ++k) words[n][k] = _mm512_loadu_si512(x + n * stride + 32 * k);
    }
  };

  // Which of 64 words is told by the low six bits of an offset; which 64 by the other two.
  static inline __m512i look(const __m512i* words, __m512i at, __mmask32 bit6, __mmask32 bit7) {
    const __m512i a = _mm512_permutex2var_epi16(words[0], at, words[1]);
    const __m512i b = _mm512_permutex2var_epi16(words[2], at, words[3]);
    const __m512i c = _mm512_permutex2var_epi16(words[4], at, words[5]);
    const __m512i d = _mm512_permutex2var_epi16(words[6], at, words[7]);
    return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, a, b), _mm512_mask_blend_epi16(bit6, c, d));
  }
};

inline __m512 lower_halves(__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
inline __m512 upper_halves(__m512i v) {
  return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32((int)0xffff0000)));
}

// bf16 with products in bf16 pairs (`Multiply::pairs`) or in fp32.
template <class Multiply, int Most>
struct FewWords512 : Words512 {
  typedef BF16 T;
  typedef BF16 X;
  static constexpr int kMost = Most;

  template <int N>
  static inline void slice(const Table<N>& table, const BF16* v, const uint8_t* c, int64_t steps, float (*sums)[kSlice]) {
    __m512 acc[N];
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) acc[n] = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; ++s, v += kStep, c += kStep) {
      fetch_tiles(v, c);
      const __m512i at = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)c));
      const __mmask32 bit6 = _mm512_test_epi16_mask(at, _mm512_set1_epi16(64));
      const __mmask32 bit7 = _mm512_test_epi16_mask(at, _mm512_set1_epi16(128));
      const __m512i w = _mm512_loadu_si512(v);
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[n] = Multiply::pairs(acc[n], w, look(table.words[n], at, bit6, bit7));
    }
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) _mm512_storeu_ps(sums[n], acc[n]);
  }
};

struct InFloats512 {
  static inline __m512 pairs(__m512 sum, __m512i w, __m512i x) {
    sum = _mm512_fmadd_ps(lower_halves(w), lower_halves(x), sum);
    return _mm512_fmadd_ps(upper_halves(w), upper_halves(x), sum);
  }
};

// 256 fp32 of one row of x in sixteen registers.
struct FewFloats512 {
  typedef float T;
  typedef float X;
  static constexpr int kMost = 1;

  template <int N>
  struct Table {
    __m512 words[16];
    Table(const float* x, int64_t) {
      PUMICE_UNROLL
      for (int k = 0; k < 16; ++k) words[k] = _mm512_loadu_ps(x + 16 * k);
    }
  };

  static inline __m512 look(const __m512* words, __m512i at) {
    const __mmask16 bit5 = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32));
    const __mmask16 bit6 = _mm512_test_epi32_mask(at, _mm512_set1_epi32(64));
    const __mmask16 bit7 = _mm512_test_epi32_mask(at, _mm512_set1_epi32(128));
    __m512 found[8];
    PUMICE_UNROLL
    for (int k = 0; k < 8; ++k) found[k] = _mm512_permutex2var_ps(words[2 * k], at, words[2 * k + 1]);
    PUMICE_UNROLL
    for (int k = 0; k < 8; k += 2) found[k] = _mm512_mask_blend_ps(bit5, found[k], found[k + 1]);
    PUMICE_UNROLL
    for (int k = 0; k < 8; k += 4) found[k] = _mm512_mask_blend_ps(bit6, found[k], found[k + 2]);
    return _mm512_mask_blend_ps(bit7, found[0], found[4]);
  }

  template <int N>
  static inline void slice(const Table<N>& table, const float* v, const uint8_t* c, int64_t steps, float (*sums)[kSlice]) {
    __m512 low = _mm512_setzero_ps(), high = low;
    for (int64_t s = 0; s < steps; ++s, v += kStep, c += kStep) {
      fetch_tiles(v, c);
      const __m512i first = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)c));
      const __m512i second = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(c + 16)));
      low = _mm512_fmadd_ps(_mm512_loadu_ps(v), look(table.words, first), low);
      high = _mm512_fmadd_ps(_mm512_loadu_ps(v + 16), look(table.words, second), high);
    }
    // Both numbers of a pair stand side by side: their sums belong to one row.
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    _mm512_storeu_ps(sums[0], _mm512_add_ps(_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)));
  }
};

// Sixteen rows of x in fp32.
template <class Value>
struct ManyFloats512 {
  typedef Value T;
  typedef float X;
  typedef __m512 Reg;
  static constexpr int kWidth = 16, kRegs = 1, kTogether = 8;

  static Reg get(const float* p) { return _mm512_loadu_ps(p); }
  static void put(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  static int place(int row) { return row; }
  static void fetch(const T* v, const uint8_t* c) { fetch_tiles(v, c); }
  static void step(Reg* acc, const T* pair, const float* x0, const float* x1) {
    acc[0] = _mm512_fmadd_ps(_mm512_set1_ps(widen(pair[0])), _mm512_loadu_ps(x0), acc[0]);
    acc[0] = _mm512_fmadd_ps(_mm512_set1_ps(widen(pair[1])), _mm512_loadu_ps(x1), acc[0]);
  }
};

}  // namespace
}  // namespace pumice
