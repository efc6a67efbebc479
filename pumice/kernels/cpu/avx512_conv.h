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

// Where the stride is one, a channel lies in its plane as it lies in x, with zeros between: it is spread out, a register of the
// plane at a time, by masks that are the same for every channel. Planes of more registers go row by row.
constexpr int64_t kMostMasks = 512;

template <class V>
void lay_out_spread(const Planes& planes, const void* x, int64_t begin, int64_t end, void* out) {
  typedef typename V::T T;
  const Conv& conv = *planes.conv;
  const int64_t size = (end - begin) * planes.width, masks = (size + V::kLanes - 1) / V::kLanes;
  if (conv.stride[0] != 1 || conv.stride[1] != 1 || masks > kMostMasks)
    return lay_out<Conv512, T, T>(planes, x, begin, end, out);
  const Phase& phase = planes.phase[0];
  typename V::Mask mask[kMostMasks];
  memset(mask, 0, sizeof(mask[0]) * (size_t)masks);
  int64_t first = -1;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row = phase.row + r;
    if (row < 0 || row >= conv.H) continue;
    if (first < 0) first = row;
    for (int64_t k = (r - begin) * planes.width + phase.begin, n = phase.end - phase.begin; n > 0; --n, ++k)
      mask[k / V::kLanes] |= (typename V::Mask)((typename V::Mask)1 << k % V::kLanes);
  }
  for (int64_t c = 0; c < conv.C; ++c) {
    const T* from = (const T*)x + (c * conv.H + (first < 0 ? 0 : first)) * conv.W;
    T* to = (T*)out + c * planes.channel + begin * planes.width;
    for (int64_t k = 0; k < masks; ++k, to += V::kLanes) {
      const int count = __builtin_popcount(mask[k]);
      V::put(to, V::spread(mask[k], V::get(from, count)));
      from += count;
    }
  }
}

template <>
struct PutStrip<Conv512, float> {
  template <int R>
  static inline void put(const Convolved& job, const Strip& strip, const __m512 (&acc)[R], float* y, const float* add) {
    const __m512 least = _mm512_set1_ps(job.conv->least), most = _mm512_set1_ps(job.conv->most);
    int64_t at = strip.place;
    PUMICE_UNROLL
    for (int r = 0; r < R; ++r) {
      const __mmask16 outputs = (__mmask16)(strip.outputs >> 16 * r);
      const int count = __builtin_popcount(outputs);
      const __mmask16 there = Conv512::first(count);
      const bool in_order = outputs == there;  // nothing is to be dropped in between
      __m512 sum = acc[r];
      if (add) {
        const __m512 given = _mm512_maskz_loadu_ps(there, add + at);
        sum = _mm512_add_ps(sum, in_order ? given : _mm512_maskz_expand_ps(outputs, given));
      }
      const __m512 done = Conv512::clamp(sum, least, most);
      _mm512_mask_storeu_ps(y + at, there, in_order ? done : _mm512_maskz_compress_ps(outputs, done));
      at += count;
    }
  }
};

struct Floats16 {
  typedef float T;
  typedef __mmask16 Mask;
  static constexpr int64_t kLanes = 16;
  static __m512 get(const float* p, int n) { return Conv512::get(p, n); }
  static __m512 spread(Mask m, __m512 v) { return _mm512_maskz_expand_ps(m, v); }
  static void put(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
};

}  // namespace
}  // namespace pumice
