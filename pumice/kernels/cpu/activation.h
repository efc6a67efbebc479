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

// The normal distribution's function from e^(-x²/2) (Abramowitz and Stegun, 7.1.26), off by at most 7.5e-8.
inline float normal(float x, float exponential) {
  const float t = 1.0f / (1.0f + 0.231641888f * (x < 0 ? -x : x));
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = 0.5f * p * t * exponential;
  return x < 0 ? tail : 1.0f - tail;
}

template <int kAct>
inline float act_of(float x, float alpha) {
  if (kAct == kSilu) return x * sigmoid(x);
  if (kAct == kClampedSwish) return x * sigmoid(alpha * x);
  if (kAct == kSigmoid) return sigmoid(x);
  if (kAct == kRelu) return x > 0 ? x : (x != x ? x : 0.0f);
  if (kAct == kRelu2) return x > 0 ? x * x : (x != x ? x : 0.0f);
  if (kAct == kGelu) return x * normal(x, exp_of(-0.5f * x * x));
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

// The activation of x and its slope there.
template <int kAct>
inline float slope_of(float x, float alpha, float* act) {
  if (kAct == kRelu) {
    *act = act_of<kRelu>(x, alpha);
    return x > 0 ? 1.0f : (x != x ? x : 0.0f);
  }
  if (kAct == kRelu2) {
    *act = act_of<kRelu2>(x, alpha);
    return x > 0 ? 2.0f * x : (x != x ? x : 0.0f);
  }
  if (kAct == kGelu) {
    const float e = exp_of(-0.5f * x * x), share = normal(x, e);
    *act = x * share;
    return share + x * 0.398942280401432678f * e;
  }
  // The others are x, or one, times sigmoid(z), where z is a multiple of x or of a cubic.
  float z = x, rise = 1.0f;
  if (kAct == kClampedSwish) z = alpha * x, rise = alpha;
  if (kAct == kGeluTanh) {
    const float square = 0.044715f * x * x;
    z = 1.5957691216057308f * (x + square * x), rise = 1.5957691216057308f * (1.0f + 3.0f * square);
  }
  const float share = sigmoid(z);
  rise *= share * (1.0f - share);
  *act = kAct == kSigmoid ? share : x * share;
  return kAct == kSigmoid ? rise : share + x * rise;
}

constexpr int64_t kHiddenChunk = 512;  // columns whose numbers stay in the first cache

// The gradient of `raw`, the hidden layer's before its scale, to a gate and its partner (which may be null), in place;
// `raw` becomes the hidden layer times the scale, and `dot` the product of the two, whose sum is the scale's gradient.
template <int kAct>
inline void backward(float* __restrict gate, float* __restrict partner, float* __restrict raw, float* __restrict dot,
                     int64_t n, float scale, float alpha, float limit) {
  if (!partner) {
    for (int64_t i = 0; i < n; ++i) {
      float act;
      const float slope = slope_of<kAct>(gate[i], alpha, &act), r = raw[i];
      gate[i] = scale * r * slope, raw[i] = scale * act, dot[i] = r * act;
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    float g = gate[i], u = partner[i], pass_g = 1.0f, pass_u = 1.0f, act;
    if (kAct == kClampedSwish) {
      pass_g = g > limit ? 0.0f : 1.0f;
      pass_u = u > limit || u < -limit ? 0.0f : 1.0f;
      g = g > limit ? limit : g;
      u = u > limit ? limit : u;
      u = (u < -limit ? -limit : u) + 1.0f;
    }
    const float slope = slope_of<kAct>(g, alpha, &act), r = raw[i], by = scale * r, hidden = act * u;
    gate[i] = by * slope * u * pass_g, partner[i] = by * act * pass_u, raw[i] = scale * hidden, dot[i] = r * hidden;
  }
}

template <class T>
inline void widen_some(const T* from, int64_t step, int64_t n, float* __restrict to) {
  if (step == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i * step]);
}

template <class T>
inline void narrow_some(const float* __restrict from, int64_t step, int64_t n, T* to) {
  if (step == 1)
    for (int64_t i = 0; i < n; ++i) narrow(from[i], to + i);
  else
    for (int64_t i = 0; i < n; ++i) narrow(from[i], to + i * step);
}

template <int kAct, class T>
inline void hidden_of(const Hidden& h, int64_t begin, int64_t end) {
  const int64_t both = h.first ? 2 * h.width : h.width;
  for (int64_t a = begin; a < end; ++a) {
    const T* products = (const T*)h.products + a * both;
    float sums[16] = {};
    for (int64_t c = 0; c < h.width; c += kHiddenChunk) {
      const int64_t n = h.width - c < kHiddenChunk ? h.width - c : kHiddenChunk;
      float gate[kHiddenChunk], other[kHiddenChunk], raw[kHiddenChunk], dot[kHiddenChunk + 16];
      float* partner = h.first ? other : nullptr;
      widen_some(products + c * h.step, h.step, n, gate);
      if (partner) widen_some(products + c * h.step + h.first, h.step, n, partner);
      if (!h.gradient) {
        activated<kAct>(gate, partner, 1, n, h.alpha, h.limit, (T*)h.hidden + a * h.width + c);
        continue;
      }
      widen_some((const T*)h.gradient + a * h.width + c, 1, n, raw);
      backward<kAct>(gate, partner, raw, dot, n, h.scale ? h.scale[a] : 1.0f, h.alpha, h.limit);
      narrow_some(raw, 1, n, (T*)h.hidden + a * h.width + c);
      T* to = (T*)h.to_products + a * both + c * h.step;
      narrow_some(gate, h.step, n, to);
      if (partner) narrow_some(partner, h.step, n, to + h.first);
      memset(dot + n, 0, 16 * sizeof(float));
      for (int64_t i = 0; i < n; i += 16)
        for (int j = 0; j < 16; ++j) sums[j] += dot[i + j];
    }
    if (h.to_scale) {
      float sum = 0;
      for (int j = 0; j < 16; ++j) sum += sums[j];
      h.to_scale[a] = sum;
    }
  }
}

template <class T>
void hidden_rows(const Hidden& h, int64_t begin, int64_t end) {
  switch (h.act) {
    case kSilu: return hidden_of<kSilu, T>(h, begin, end);
    case kGelu: return hidden_of<kGelu, T>(h, begin, end);
    case kGeluTanh: return hidden_of<kGeluTanh, T>(h, begin, end);
    case kRelu: return hidden_of<kRelu, T>(h, begin, end);
    case kRelu2: return hidden_of<kRelu2, T>(h, begin, end);
    case kSigmoid: return hidden_of<kSigmoid, T>(h, begin, end);
    default: return hidden_of<kClampedSwish, T>(h, begin, end);
  }
}

}  // namespace
}  // namespace pumice
