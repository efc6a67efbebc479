// xᵀx of a tall x for calibration: bf16 products, fp32 sums, the upper triangle only (AVX-512 BF16).
//
// PyTorch multiplies bf16 inputs into an fp32 result only by a detour and knows nothing of the symmetry.
#include "kernels.h"

#include "features.h"
#include "gram.h"
#include "threads.h"

#if (defined(__x86_64__) || defined(_M_X64)) && !defined(PUMICE_PORTABLE_ONLY) && \
    (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10))
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

namespace pumice {
namespace {

constexpr int64_t kTile = 64;    // columns of x, so rows and columns of a tile of the result
constexpr int64_t kPairs = 128;  // pairs of tokens per pass: a panel of 64 columns is then 32 KiB
constexpr int kRows = 4;

// Panels of 64 columns: [I / 64][T / 2][64] pairs (token 2t in the low half, 2t + 1 in the high one), zero beyond I, T.
struct Gram {
  const float* x;
  int64_t T, I;
  float* sum;        // [I, I]
  uint32_t* packed;
  int64_t pairs, blocks;
};

inline __m256i narrow16(const float* row, int64_t left) {
  const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, row));
}

void pack_blocks(int64_t begin, int64_t end, void* context) {
  const Gram& g = *(const Gram*)context;
  for (int64_t b = begin; b < end; ++b)
    for (int64_t t = 0; t < g.pairs; ++t) {
      uint32_t* out = g.packed + (b * g.pairs + t) * kTile;
      const bool second = 2 * t + 1 < g.T;
      for (int64_t j = 0; j < kTile; j += 16) {
        const int64_t column = b * kTile + j, left = g.I - column;
        const float* low = g.x + 2 * t * g.I + column;
        const __m512i a = _mm512_cvtepu16_epi32(narrow16(low, left));
        const __m512i c = _mm512_cvtepu16_epi32(narrow16(low + (second ? g.I : 0), left));
        const __m512i high = second ? _mm512_slli_epi32(c, 16) : _mm512_setzero_si512();
        _mm512_storeu_si512(out + j, _mm512_or_si512(a, high));
      }
    }
}

// Rows [row, row + R) of one tile: adds the products of `count` pairs of panels `a` and `b`.
template <int R>
inline void tile_rows(const uint32_t* a, const uint32_t* b, int64_t count, int64_t row, float* out, int64_t stride,
                      const __mmask16* mask) {
  __m512 acc[R][4];
  PUMICE_UNROLL
  for (int r = 0; r < R; ++r)
    PUMICE_UNROLL
    for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_maskz_loadu_ps(mask[c], out + r * stride + 16 * c);
  for (int64_t t = 0; t < count; ++t) {
    __m512bh v[4];
    PUMICE_UNROLL
    for (int c = 0; c < 4; ++c) v[c] = (__m512bh)_mm512_loadu_si512(b + t * kTile + 16 * c);
    PUMICE_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m512bh w = (__m512bh)_mm512_set1_epi32((int)a[t * kTile + row + r]);
      PUMICE_UNROLL
      for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], w, v[c]);
    }
  }
  PUMICE_UNROLL
  for (int r = 0; r < R; ++r)
    PUMICE_UNROLL
    for (int c = 0; c < 4; ++c) _mm512_mask_storeu_ps(out + r * stride + 16 * c, mask[c], acc[r][c]);
}

void tile(const Gram& g, int64_t i, int64_t j) {
  __mmask16 mask[4];
  for (int c = 0; c < 4; ++c) {
    const int64_t left = g.I - j * kTile - 16 * c;
    mask[c] = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
  }
  const int64_t rows = g.I - i * kTile < kTile ? g.I - i * kTile : kTile;
  for (int64_t t = 0; t < g.pairs; t += kPairs) {
    const int64_t count = g.pairs - t < kPairs ? g.pairs - t : kPairs;
    const uint32_t* a = g.packed + (i * g.pairs + t) * kTile;
    const uint32_t* b = g.packed + (j * g.pairs + t) * kTile;
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows)
      tile_rows<kRows>(a, b, count, row, g.sum + (i * kTile + row) * g.I + j * kTile, g.I, mask);
    for (; row < rows; ++row)
      tile_rows<1>(a, b, count, row, g.sum + (i * kTile + row) * g.I + j * kTile, g.I, mask);
  }
}

void tiles(int64_t begin, int64_t end, void* context) {
  const Gram& g = *(const Gram*)context;
  for (int64_t k = begin; k < end; ++k) {
    int64_t i = 0, left = k;
    while (left >= g.blocks - i) left -= g.blocks - i++;
    tile(g, i, i + left);
  }
}

}  // namespace

bool gram(const float* x, int64_t T, int64_t I, float* sum, uint32_t* packed) {
  if (!cpu_has("avx512_bf16")) return false;
  Gram g = {x, T, I, sum, packed, (T + 1) / 2, (I + kTile - 1) / kTile};
  if (T == 0 || I == 0) return true;
  parallel(g.blocks, pack_blocks, &g);
  parallel(g.blocks * (g.blocks + 1) / 2, tiles, &g);
  return true;
}

}  // namespace pumice

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace pumice {
bool gram(const float*, int64_t, int64_t, float*, uint32_t*) { return false; }
}  // namespace pumice
#endif
