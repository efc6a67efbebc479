// How grouped products hold numbers in AVX-512: sixteen sums a register. Included after the target has been set.
#pragma once

#include "grouped_tile.h"

namespace pumice {
namespace {

struct Sums512 {
  typedef __m512 Sum;
  static constexpr int kM = 8, kN = 3, kDirectM = 4, kDirectN = 6, kWidth = 16, kV = 4, kR = 6;
  static constexpr bool kTurns = true;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }

  // Of four registers the sums of each one's lanes that lie in the same quarter.
  static inline Sum quarters(const Sum* s) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
    const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }

  // The sums of four registers' lanes.
  static inline void four(const Sum* s, float* out) {
    const __m512 all = quarters(s);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }

  // The sums of eight registers' lanes.
  static inline void eight(const Sum* s, float* out) {
    const __m512 a = quarters(s), b = quarters(s + 4);
    const __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    const __m512 in_order = _mm512_shuffle_f32x4(all, all, 0xd8);
    _mm256_storeu_ps(out, _mm256_add_ps(_mm512_castps512_ps256(in_order), _mm512_extractf32x8_ps(in_order, 1)));
  }

  template <int M>
  static inline void reduce(const Sum* s, float* out) {
    if (M == 8) return eight(s, out);
    PUMICE_UNROLL
    for (int m = 0; m + 4 <= M; m += 4) four(s + m, out + m);
    if (M == 1) out[0] = _mm512_reduce_add_ps(s[0]);
  }

  static inline void put(float* out, Sum s, bool add) {
    _mm512_storeu_ps(out, add ? _mm512_add_ps(_mm512_loadu_ps(out), s) : s);
  }
};

inline __mmask16 first16(int64_t n) { return n >= 16 ? (__mmask16)0xffff : n > 0 ? (__mmask16)((1u << n) - 1) : 0; }

// Numbers widened to fp32.
template <class Value>
struct Floats512 : Sums512 {
  typedef Value T;
  typedef __m512 Reg;
  static constexpr int64_t kLanes = 16, kStretch = 512;
  static constexpr int kStep = 1, kCross = 1;

  static Reg none() { return _mm512_setzero_ps(); }
  static Reg load(const T* p) { return load16(p); }
  static Reg load(const T* p, int64_t n) { return load16(first16(n), p); }
  static Sum fma(Sum s, Reg w, Reg x) { return _mm512_fmadd_ps(w, x, s); }
  static Reg hold(Reg r) { return _mm512_castsi512_ps(in_register(_mm512_castps_si512(r))); }
  static void turn(Reg* r) { pumice::turn((__m512i*)r); }
  static Reg spread(const T* x, int) { return _mm512_set1_ps(widen(*x)); }
  static inline void cross(const T* w, int64_t, int, int64_t outputs, Reg* out) {
    out[0] = outputs >= 16 ? load16(w) : load16(first16(outputs), w);
  }
};

}  // namespace
}  // namespace pumice
