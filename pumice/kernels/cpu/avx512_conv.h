// Convolutions in fp32 with AVX-512. Included by the AVX-512 translation units after they have set their target.
#pragma once

#include "conv_kernel.h"

namespace pumice {
namespace {

struct Conv512 {
  typedef __m512 Reg;
  static constexpr int kLanes = 16;
  static Reg get(const float* p) { return _mm512_loadu_ps(p); }
  static __mmask16 first(int64_t n) { return n >= 16 ? (__mmask16)0xffff : n > 0 ? (__mmask16)((1u << n) - 1) : 0; }
  static Reg get(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void put(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  static Reg spread(float v) { return _mm512_set1_ps(v); }
  static Reg fma(Reg sum, Reg w, Reg x) { return _mm512_fmadd_ps(w, x, sum); }
  // Of two operands the second is what remains where one is no number.
  static Reg clamp(Reg v, Reg least, Reg most) { return _mm512_min_ps(most, _mm512_max_ps(least, v)); }
};

template <>
struct Row<Conv512, float, float> {
  static inline void put(const float* from, int64_t stride, int64_t begin, int64_t end, int64_t width, float* to) {
    if (stride > 2) {
      for (int64_t k = 0; k < width; ++k) to[k] = k >= begin && k < end ? from[k * stride] : 0.0f;
      return;
    }
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    for (int64_t k = 0; k < width; k += 16) {
      const __mmask16 inside = (__mmask16)(Conv512::first(end - k) & ~Conv512::first(begin - k));
      if (stride == 1) {
        _mm512_storeu_ps(to + k, _mm512_maskz_loadu_ps(inside, from + k));
      } else {
        const __m512 a = _mm512_maskz_loadu_ps((__mmask16)_pdep_u32(inside & 0xff, 0x5555), from + 2 * k);
        const __m512 b = _mm512_maskz_loadu_ps((__mmask16)_pdep_u32(inside >> 8, 0x5555), from + 2 * k + 16);
        _mm512_storeu_ps(to + k, _mm512_permutex2var_ps(a, even, b));
      }
    }
  }
};

}  // namespace
}  // namespace pumice
