// Kernels for AVX-512 with VBMI2 and BF16 (Zen 4, Sapphire Rapids and later): 32 bf16 columns by vpexpandw, multiplied
// in pairs by vdpbf16ps into fp32 sums. vpexpandw works on a loaded register; its form that reads memory is slow.
#include "kernels.h"

// GCC before 10 does not know the set; MSVC has no cast to its type of bf16 pairs.
#if (defined(__x86_64__) || defined(_M_X64)) && !defined(PUMICE_PORTABLE_ONLY) && \
    (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10))
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,popcnt,bmi,bmi2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,popcnt,bmi,bmi2")
#endif

#include "driver.h"
#include "avx512_fp32.h"

namespace pumice {
namespace {

inline __m512bh pairs(__m512i v) { return (__m512bh)v; }

inline __m512i expand16(uint32_t mask, const void* p) {
  return _mm512_mask_expand_epi16(zero(), (__mmask32)mask, in_register(_mm512_loadu_si512(p)));
}

struct Bf16Sums {
  template <class T>
  using X = BF16;
  static constexpr int kDotRows = 8, kTileRows = 4, kTileSums = 16;
  static constexpr bool kPairs = true;

  // 64 columns: bits[m] of M rows of the matrix times N rows of x.
  template <int M, int N, int U>
  static inline void word(const BF16** p, const uint64_t* bits, const BF16* x, int64_t stride, __m512 (*acc)[N][U],
                          int u) {
    PUMICE_UNROLL
    for (int half = 0; half < 2; ++half) {
      __m512bh w[M];
      PUMICE_UNROLL
      for (int m = 0; m < M; ++m) {
        // From one word to the next p moves by a single sum, not two: that chain would set the pace.
        const int64_t used = half ? _mm_popcnt_u32((uint32_t)bits[m]) : 0;
        w[m] = pairs(expand16((uint32_t)(bits[m] >> (32 * half)), p[m] + used));
      }
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) {
        const __m512bh v = pairs(_mm512_loadu_si512(x + n * stride + 32 * half));
        PUMICE_UNROLL
        for (int m = 0; m < M; ++m) {
          __m512& sum = acc[m][n][(u + half) % U];
          sum = _mm512_dpbf16_ps(sum, w[m], v);
        }
      }
    }
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m) p[m] += _mm_popcnt_u64(bits[m]);
  }

  template <class T, int M, int N>
  static void dot(const BF16* const* values, int64_t ahead, const uint8_t* mask, int64_t mask_stride, const BF16* x,
                  int64_t stride, int64_t I, float (*sums)[N]) {
    // Sums in flight, to hide the latency of vdpbf16ps. Not by M, or the last bit of y would depend on the threads.
    constexpr int U = N == 1 ? 8 : N == 2 ? 4 : N <= 4 ? 2 : 1;
    constexpr int W = U < 2 ? 1 : U / 2;  // words per turn
    __m512 acc[M][N][U];
    const BF16* p[M];
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m) {
      p[m] = values[m];
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n)
        PUMICE_UNROLL
        for (int u = 0; u < U; ++u) acc[m][n][u] = _mm512_setzero_ps();
    }
    uint64_t bits[M];
    int64_t j = 0;
    for (; 64 * (j + W) <= I; j += W)
      PUMICE_UNROLL
      for (int k = 0; k < W; ++k) {
        PUMICE_UNROLL
        for (int m = 0; m < M; ++m) {
          memcpy(&bits[m], mask + m * mask_stride + 8 * (j + k), 8);
          fetch(p[m] + ahead, 32);
        }
        word<M, N, U>(p, bits, x + 64 * (j + k), stride, acc, 2 * k);
      }
    for (; 64 * j < I; ++j) {
      PUMICE_UNROLL
      for (int m = 0; m < M; ++m) bits[m] = mask_word(mask + m * mask_stride, j, I);
      word<M, N, U>(p, bits, x + 64 * j, stride, acc, 0);
    }
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m)
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) {
        __m512 total = acc[m][n][0];
        for (int u = 1; u < U; ++u) total = _mm512_add_ps(total, acc[m][n][u]);
        sums[m][n] = _mm512_reduce_add_ps(total);
      }
  }

  template <class T, int M, int N>
  static void tile(const BF16* values, const int32_t* columns, int64_t begin, int64_t end, int64_t r, int64_t c,
                   int64_t ahead, const BF16* x, int64_t stride, float (*sums)[N]) {
    __m512 acc[M][N];
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m)
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = _mm512_setzero_ps();
    for (int64_t b = begin; b < end; ++b) {
      const BF16* w = values + b * r * c;
      const BF16* xs = x + columns[b] * c;
      if (ahead) fetch(w + ahead, r * c);
      for (int64_t k = 0; k < c; k += 32) {
        const __mmask32 inside = c - k >= 32 ? (__mmask32)0xffffffff : (__mmask32)((1u << (c - k)) - 1);
        __m512bh v[N];
        PUMICE_UNROLL
        for (int n = 0; n < N; ++n) v[n] = pairs(_mm512_maskz_loadu_epi16(inside, xs + n * stride + k));
        PUMICE_UNROLL
        for (int m = 0; m < M; ++m) {
          const __m512bh row = pairs(_mm512_maskz_loadu_epi16(inside, w + m * c + k));
          PUMICE_UNROLL
          for (int n = 0; n < N; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], row, v[n]);
        }
      }
    }
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m)
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) sums[m][n] = _mm512_reduce_add_ps(acc[m][n]);
  }
};

struct Expansion {
  static void expand_row(const uint16_t* p, const uint8_t* mask, int64_t I, uint16_t* out) {
    for (int64_t i = 0; i < I; i += 32) {
      const uint32_t bits = (uint32_t)(mask_word(mask, i / 64, I) >> (i % 64));
      const __m512i w = expand16(bits, p);
      if (I - i >= 32)
        _mm512_storeu_si512(out + i, w);
      else
        _mm512_mask_storeu_epi16(out + i, (__mmask32)((1u << (I - i)) - 1), w);
      p += _mm_popcnt_u32(bits);
    }
  }

  static void expand_row(const uint32_t* p, const uint8_t* mask, int64_t I, uint32_t* out) {
    expand_row32(p, mask, I, out);
  }
};

const Kernels table = {"avx512_bf16",
                       true,
                       {bitmask_product<Bf16Sums, BF16>, bitmask_product<Fp32Sums, float>},
                       {block_product<Bf16Sums, BF16>, block_product<Fp32Sums, float>},
                       expand_rows<Expansion, uint16_t>,
                       expand_rows<Expansion, uint32_t>};

}  // namespace

const Kernels* avx512_bf16_kernels() { return &table; }

}  // namespace pumice

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace pumice {
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace pumice

#endif
