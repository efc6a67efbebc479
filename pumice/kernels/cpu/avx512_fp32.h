// Products with fp32 multiply-add in AVX-512: for fp32 values, and for bf16 where the CPU cannot multiply bf16.
// Included by the AVX-512 translation units after they have set their target.
#pragma once

namespace pumice {
namespace {

// vpexpand as compilers like to write it is slow twice over: with a memory operand it is microcode on some CPUs, and
// even with a zeroing mask it waits for the register that it overwrites (Zen 5). So the load is kept apart, and the
// merging form writes over a zero that the compiler cannot see through.
inline __m512i in_register(__m512i v) {
#if defined(__GNUC__)
  __asm__("" : "+v"(v));
#endif
  return v;
}
inline __m512i zero() {
  __m512i v = _mm512_setzero_si512();
#if defined(__GNUC__)
  __asm__("" : "+v"(v));
#endif
  return v;
}

// Lane l of register k to lane k of register l.
inline void turn(__m512i* r) {
  __m512i t[16];
  PUMICE_UNROLL
  for (int k = 0; k < 16; k += 2) {
    t[k] = _mm512_unpacklo_epi32(r[k], r[k + 1]);
    t[k + 1] = _mm512_unpackhi_epi32(r[k], r[k + 1]);
  }
  PUMICE_UNROLL
  for (int k = 0; k < 16; k += 4)
    PUMICE_UNROLL
    for (int h = 0; h < 2; ++h) {
      r[k + 2 * h] = _mm512_unpacklo_epi64(t[k + h], t[k + 2 + h]);
      r[k + 2 * h + 1] = _mm512_unpackhi_epi64(t[k + h], t[k + 2 + h]);
    }
  PUMICE_UNROLL
  for (int half = 0; half < 16; half += 8)
    PUMICE_UNROLL
    for (int k = 0; k < 4; ++k) {
      t[half + k] = _mm512_shuffle_i32x4(r[half + k], r[half + k + 4], 0x88);
      t[half + k + 4] = _mm512_shuffle_i32x4(r[half + k], r[half + k + 4], 0xdd);
    }
  PUMICE_UNROLL
  for (int k = 0; k < 4; ++k) {
    r[k] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0x88);
    r[k + 8] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0xdd);
    r[k + 4] = _mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0x88);
    r[k + 12] = _mm512_shuffle_i32x4(t[k + 4], t[k + 12], 0xdd);
  }
}

inline __m512i expand32(uint32_t mask, __m512i v) { return _mm512_mask_expand_epi32(zero(), (__mmask16)mask, v); }

inline __m512 load16(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load16(const BF16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline __m512 load16(__mmask16 k, const float* p) { return _mm512_maskz_loadu_ps(k, p); }
inline __m512 load16(__mmask16 k, const BF16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(k, p)), 16));
}

inline void expand_row32(const uint32_t* p, const uint8_t* mask, int64_t I, uint32_t* out) {
  for (int64_t i = 0; i < I; i += 16) {
    const __mmask16 bits = (__mmask16)(mask_word(mask, i / 64, I) >> (i % 64));
    const __m512i w = expand32(bits, in_register(_mm512_loadu_si512(p)));
    if (I - i >= 16)
      _mm512_storeu_si512(out + i, w);
    else
      _mm512_mask_storeu_epi32(out + i, (__mmask16)((1u << (I - i)) - 1), w);
    p += _mm_popcnt_u32(bits);
  }
}

// Asks for the cache lines of n values.
template <class T>
inline void fetch(const T* p, int64_t n) {
  for (int64_t byte = 0; byte < n * (int64_t)sizeof(T); byte += 64) _mm_prefetch((const char*)p + byte, _MM_HINT_T0);
}

struct Fp32Sums {
  template <class T>
  using X = float;
  static constexpr int kDotRows = 8, kTogether = 3, kTileRows = 4, kTileSums = 16;

  template <class T, int M, int N>
  static void dot(const T* const* values, int64_t ahead, const uint8_t* mask, int64_t mask_stride, const float* x,
                  int64_t stride, int64_t I, float (*sums)[N]) {
    // Sums in flight, to hide the latency of an FMA. Not by M, or the last bit of y would depend on the threads.
    constexpr int U = N <= 2 ? 4 : N <= 4 ? 2 : 1;
    __m512 acc[M][N][U];
    const T* p[M];
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m) {
      p[m] = values[m];
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n)
        PUMICE_UNROLL
        for (int u = 0; u < U; ++u) acc[m][n][u] = _mm512_setzero_ps();
    }
    for (int64_t j = 0; 64 * j < I; ++j) {
      uint64_t word[M];
      PUMICE_UNROLL
      for (int m = 0; m < M; ++m) {
        word[m] = mask_word(mask + m * mask_stride, j, I);
        fetch(p[m] + ahead, 32);
      }
      PUMICE_UNROLL
      for (int g = 0; g < 4; ++g) {
        __m512 w[M];
        PUMICE_UNROLL
        for (int m = 0; m < M; ++m) {
          const uint32_t bits = (uint32_t)(word[m] >> (16 * g)) & 0xffff;
          w[m] = _mm512_castsi512_ps(expand32(bits, in_register(_mm512_castps_si512(load16(p[m])))));
          p[m] += _mm_popcnt_u32(bits);
        }
        PUMICE_UNROLL
        for (int n = 0; n < N; ++n) {
          const __m512 v = load16(x + n * stride + 64 * j + 16 * g);
          PUMICE_UNROLL
          for (int m = 0; m < M; ++m) acc[m][n][g % U] = _mm512_fmadd_ps(w[m], v, acc[m][n][g % U]);
        }
      }
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
  static void tile(const T* values, const int32_t* columns, int64_t begin, int64_t end, int64_t r, int64_t c,
                   int64_t ahead, const float* x, int64_t stride, float (*sums)[N]) {
    __m512 acc[M][N];
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m)
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = _mm512_setzero_ps();
    for (int64_t b = begin; b < end; ++b) {
      const T* w = values + b * r * c;
      const float* xs = x + columns[b] * c;
      if (ahead) fetch_far(w + ahead, r * c);
      for (int64_t k = 0; k < c; k += 16) {
        const __mmask16 inside = c - k >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << (c - k)) - 1);
        __m512 v[N];
        PUMICE_UNROLL
        for (int n = 0; n < N; ++n) v[n] = load16(inside, xs + n * stride + k);
        PUMICE_UNROLL
        for (int m = 0; m < M; ++m) {
          const __m512 row = load16(inside, w + m * c + k);
          PUMICE_UNROLL
          for (int n = 0; n < N; ++n) acc[m][n] = _mm512_fmadd_ps(row, v[n], acc[m][n]);
        }
      }
    }
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m)
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) sums[m][n] = _mm512_reduce_add_ps(acc[m][n]);
  }
};

}  // namespace
}  // namespace pumice
