// Integers with scales in AVX-512 without bf16 products: sixteen weights at a time become fp32 in a register.
// Included by the AVX-512 translation units after they have set their target.
#pragma once

namespace pumice {
namespace {

struct CodedFp32 {
  template <class T>
  using X4 = float;
  template <class T>
  using X8 = float;

  static inline __m512 floats(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }

  template <class T, int N>
  static void dot8(const Matrix& w, int64_t o, const float* x, int64_t stride, void* scratch, float* sums) {
    constexpr int U = 4;  // sums in flight, to hide the latency of an FMA
    __m512 acc[N][U];
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n)
      PUMICE_UNROLL
      for (int u = 0; u < U; ++u) acc[n][u] = _mm512_setzero_ps();
    if (w.mask)
      expanded<N, U>(row_values<int8_t>(w, o, scratch), w.mask + o * ((w.I + 7) / 8), w.I, x, stride, acc);
    else
      plain<N, U>((const int8_t*)w.values + o * w.I, w.I, x, stride, acc);
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) {
      __m512 total = acc[n][0];
      for (int u = 1; u < U; ++u) total = _mm512_add_ps(total, acc[n][u]);
      sums[n] = _mm512_reduce_add_ps(total);
    }
  }

  template <int N, int U>
  static inline void plain(const int8_t* p, int64_t I, const float* x, int64_t stride, __m512 (*acc)[U]) {
    int64_t i = 0;
    for (; i + 16 * U <= I; i += 16 * U) {
      fetch_far(p + i + kFarAhead);
      PUMICE_UNROLL
      for (int u = 0; u < U; ++u) {
        const __m512 v = floats(_mm_loadu_si128((const __m128i*)(p + i + 16 * u)));
        PUMICE_UNROLL
        for (int n = 0; n < N; ++n)
          acc[n][u] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x + n * stride + i + 16 * u), acc[n][u]);
      }
    }
    for (; i < I; i += 16) {
      const __mmask16 inside = I - i >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << (I - i)) - 1);
      const __m512 v = floats(_mm_maskz_loadu_epi8(inside, p + i));
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[n][0] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x + n * stride + i), acc[n][0]);
    }
  }

  template <int N, int U>
  static inline void expanded(const int8_t* p, const uint8_t* mask, int64_t I, const float* x, int64_t stride,
                              __m512 (*acc)[U]) {
    for (int64_t j = 0; 64 * j < I; ++j) {
      const uint64_t word = mask_word(mask, j, I);
      _mm_prefetch((const char*)p + kAhead, _MM_HINT_T0);
      PUMICE_UNROLL
      for (int g = 0; g < 4; ++g) {
        const uint32_t bits = (uint32_t)(word >> (16 * g)) & 0xffff;
        const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
        const __m512 v = _mm512_cvtepi32_ps(expand32(bits, in_register(wide)));
        p += _mm_popcnt_u32(bits);
        PUMICE_UNROLL
        for (int n = 0; n < N; ++n)
          acc[n][g % U] = _mm512_fmadd_ps(v, _mm512_loadu_ps(x + n * stride + 64 * j + 16 * g), acc[n][g % U]);
      }
    }
  }

  template <class T, int N>
  static void dot4(const Matrix& w, int64_t o, const float* x, int64_t stride, void*, float* sums) {
    const __m512 levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const int64_t groups = w.I / w.group, half = w.group / 2;
    const uint8_t* mask = w.mask ? w.mask + o * ((groups + 7) / 8) : nullptr;
    int64_t at = stored_before(w, o);
    __m512 acc[N][2];
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) acc[n][0] = acc[n][1] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g) {
      if (mask && !((mask[g / 8] >> (g % 8)) & 1)) continue;
      const __m512 scale = _mm512_set1_ps(widen(((const T*)w.scales)[at]));
      const __m512 shift = _mm512_set1_ps((float)(8 - zero_of(w, at)));
      const uint8_t* codes = (const uint8_t*)w.values + at++ * half;
      for (int64_t h = 0; h < half; h += 16) {
        __m512i low, high = _mm512_setzero_si512();
        if (half == 8) {
          const __m128i v = _mm_loadl_epi64((const __m128i*)codes);
          low = _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(v, _mm_srli_epi16(v, 4)));
        } else {
          const __m128i v = _mm_loadu_si128((const __m128i*)(codes + h));
          low = _mm512_cvtepu8_epi32(v), high = _mm512_srli_epi32(low, 4);
        }
        // The look-up reads four bits of its index, so that the other code of the byte does no harm.
        const __m512 a = _mm512_mul_ps(_mm512_add_ps(_mm512_permutexvar_ps(low, levels), shift), scale);
        const __m512 b = _mm512_mul_ps(_mm512_add_ps(_mm512_permutexvar_ps(high, levels), shift), scale);
        PUMICE_UNROLL
        for (int n = 0; n < N; ++n) {
          const float* xs = x + n * stride + g * w.group + h;
          acc[n][0] = _mm512_fmadd_ps(a, _mm512_loadu_ps(xs), acc[n][0]);
          if (half != 8) acc[n][1] = _mm512_fmadd_ps(b, _mm512_loadu_ps(xs + half), acc[n][1]);
        }
      }
    }
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) sums[n] = _mm512_reduce_add_ps(_mm512_add_ps(acc[n][0], acc[n][1]));
  }
};

}  // namespace
}  // namespace pumice
