// Activation functions over arrays, written so that compilers make vectors of the loops.
// Included after the translation unit has set its target.
#pragma once

#include <math.h>

#include "grouped.h"
#include "kernels.h"

namespace pumice {
namespace {

inline int32_t bits_of(float f) {
  int32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}
inline float float_of(int32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// e^x by powers of two and a polynomial (the coefficients of Cephes' expf), error below 2 units in the last place;
// beyond ±87 as at ±87. A NaN stays one.
inline float exp_of(float x) {
  const float kRound = 12582912.0f;  // adding it leaves a whole number in the low bits
  float v = x < -87.0f ? -87.0f : x;
  v = v > 87.0f ? 87.0f : v;
  const float shifted = v * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t power = bits_of(shifted) - bits_of(kRound);
  const float y = float_of((int32_t)((uint32_t)bits_of(p) + ((uint32_t)power << 23)));
  return x != x ? x : y;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

template <int kAct>
inline float act_of(float x, float alpha) {
  if (kAct == kSilu) return x * sigmoid(x);
  if (kAct == kClampedSwish) return x * sigmoid(alpha * x);
  if (kAct == kSigmoid) return sigmoid(x);
  if (kAct == kRelu) return x > 0 ? x : (x != x ? x : 0.0f);
  if (kAct == kRelu2) return x > 0 ? x * x : (x != x ? x : 0.0f);
  if (kAct == kGelu) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  // tanh(z) = 2 sigmoid(2 z) - 1, so that 0.5 (1 + tanh(z)) is sigmoid(2 z).
  return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));
}

template <int kAct, class T>
inline void activated(const float* __restrict gate, const float* __restrict up, int64_t step, int64_t n, float alpha,
                      float limit, T* __restrict out) {
  if (!up) {
    for (int64_t i = 0; i < n; ++i) narrow(act_of<kAct>(gate[i], alpha), out + i);
  } else if (kAct == kClampedSwish) {
    for (int64_t i = 0; i < n; ++i) {
      float g = gate[i * step], u = up[i * step];
      g = g > limit ? limit : g;
      u = u > limit ? limit : u;
      u = u < -limit ? -limit : u;
      narrow((u + 1.0f) * act_of<kAct>(g, alpha), out + i);
    }
  } else if (step == 1) {
    for (int64_t i = 0; i < n; ++i) narrow(act_of<kAct>(gate[i], alpha) * up[i], out + i);
  } else {
    for (int64_t i = 0; i < n; ++i) narrow(act_of<kAct>(gate[i * step], alpha) * up[i * step], out + i);
  }
}

template <class T>
inline void activate(const Stage& s, const float* gate, const float* up, int64_t step, int64_t n, T* out) {
  switch (s.act) {
    case kSilu: return activated<kSilu>(gate, up, step, n, s.alpha, s.limit, out);
    case kGelu: return activated<kGelu>(gate, up, step, n, s.alpha, s.limit, out);
    case kGeluTanh: return activated<kGeluTanh>(gate, up, step, n, s.alpha, s.limit, out);
    case kRelu: return activated<kRelu>(gate, up, step, n, s.alpha, s.limit, out);
    case kRelu2: return activated<kRelu2>(gate, up, step, n, s.alpha, s.limit, out);
    case kSigmoid: return activated<kSigmoid>(gate, up, step, n, s.alpha, s.limit, out);
    default: return activated<kClampedSwish>(gate, up, step, n, s.alpha, s.limit, out);
  }
}

}  // namespace
}  // namespace pumice
