// Convolutions in fp32 with AVX-512. Included by the AVX-512 translation units after they have set their target.
#pragma once

#include "conv_kernel.h"

namespace pumice {
namespace {

struct Conv512 {
  typedef __m512 Reg;
  static constexpr int kLanes = 16;
  static Reg get(const float* p) { return _mm512_loadu_ps(p); }
  static void put(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  static Reg spread(float v) { return _mm512_set1_ps(v); }
  static Reg fma(Reg sum, Reg w, Reg x) { return _mm512_fmadd_ps(w, x, sum); }
  // Of two operands the second is what remains where one is no number.
  static Reg clamp(Reg v, Reg least, Reg most) { return _mm512_min_ps(most, _mm512_max_ps(least, v)); }
};

}  // namespace
}  // namespace pumice
