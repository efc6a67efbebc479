// What lies between a decoder's matrices, written so that compilers make vectors of the loops.
// Included after the translation unit has set its target.
#pragma once

#include <math.h>

#include "activation.h"
#include "decoder.h"

namespace pumice {
namespace {

constexpr int64_t kSums = 16;

template <class T>
void widen_all(const void* x, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(((const T*)x)[i]);
}

// x · y of n numbers, a multiple of kSums.
inline float dot_of(const float* __restrict x, const float* __restrict y, int64_t n) {
  float lanes[kSums] = {};
  for (int64_t i = 0; i < n; i += kSums)
    for (int64_t l = 0; l < kSums; ++l) lanes[l] += x[i + l] * y[i + l];
  float total = 0;
  for (int64_t l = 0; l < 4; ++l) total += (lanes[l] + lanes[l + 8]) + (lanes[l + 4] + lanes[l + 12]);
  return total;
}

inline float inverse_root(const float* x, int64_t n, float eps) {
  const int64_t whole = n / kSums * kSums;
  float sum = dot_of(x, x, whole);
  for (int64_t i = whole; i < n; ++i) sum += x[i] * x[i];
  return 1.0f / sqrtf(sum / (float)n + eps);
}

template <class T>
void norm_all(const float* __restrict x, const float* __restrict weight, int64_t n, float eps, void* out) {
  const float factor = inverse_root(x, n, eps);
  T* __restrict y = (T*)out;
  for (int64_t i = 0; i < n; ++i) narrow(x[i] * factor * weight[i], y + i);
}

template <class T>
void add_all(const void* y, int64_t n, float* __restrict x) {
  const T* __restrict from = (const T*)y;
  for (int64_t i = 0; i < n; ++i) x[i] += widen(from[i]);
}

template <class T>
void turn_heads(void* x, int64_t heads, int64_t head, const float* norm, float eps, const void* cos, const void* sin) {
  const T *c = (const T*)cos, *s = (const T*)sin;
  const int64_t half = head / 2;
  for (int64_t h = 0; h < heads; ++h) {
    T* at = (T*)x + h * head;
    float wide[kMostHead];
    widen_all<T>(at, head, wide);
    if (norm) {
      const float factor = inverse_root(wide, head, eps);
      for (int64_t i = 0; i < head; ++i) wide[i] *= factor * norm[i];
    }
    for (int64_t i = 0; i < half; ++i) {
      narrow(wide[i] * widen(c[i]) - wide[i + half] * widen(s[i]), at + i);
      narrow(wide[i + half] * widen(c[i + half]) + wide[i] * widen(s[i + half]), at + i + half);
    }
  }
}

// n scores to shares that add up to 1; a score of minus infinity is a token that is not there.
inline void softmax(float* __restrict scores, int64_t n) {
  float lanes[kSums], most = scores[0];
  const int64_t whole = n / kSums * kSums;
  if (whole) {
    for (int64_t l = 0; l < kSums; ++l) lanes[l] = scores[l];
    for (int64_t i = kSums; i < whole; i += kSums)
      for (int64_t l = 0; l < kSums; ++l) lanes[l] = lanes[l] < scores[i + l] ? scores[i + l] : lanes[l];
    for (int64_t l = 0; l < kSums; ++l) most = most < lanes[l] ? lanes[l] : most;
  }
  for (int64_t i = whole; i < n; ++i) most = most < scores[i] ? scores[i] : most;
  if (most == -INFINITY) most = 0;
  float total = 0;
  for (int64_t l = 0; l < kSums; ++l) lanes[l] = 0;
  for (int64_t i = 0; i < n; ++i) scores[i] = scores[i] == -INFINITY ? 0.0f : exp_of(scores[i] - most);
  for (int64_t i = 0; i < whole; i += kSums)
    for (int64_t l = 0; l < kSums; ++l) lanes[l] += scores[i + l];
  for (int64_t l = 0; l < kSums; ++l) total += lanes[l];
  for (int64_t i = whole; i < n; ++i) total += scores[i];
  const float factor = total > 0 ? 1.0f / total : 0.0f;
  for (int64_t i = 0; i < n; ++i) scores[i] *= factor;
}

// Scores and mixtures of N heads that share keys and values, for any width of a head.
struct AnyHead {
  // scores[n * length + t] = scale q[n] · key t; q and keys have `head` numbers, side by side.
  template <class T, int N>
  static void scores(const T* q, const T* keys, int64_t head, int64_t length, float scale, float* scores) {
    const int64_t padded = (head + kSums - 1) / kSums * kSums;
    alignas(64) float query[N][kMostHead], wide[kMostHead];
    memset(wide, 0, sizeof wide);
    for (int n = 0; n < N; ++n) {
      widen_all<T>(q + n * head, head, query[n]);
      for (int64_t i = head; i < padded; ++i) query[n][i] = 0;
    }
    for (int64_t t = 0; t < length; ++t) {
      widen_all<T>(keys + t * head, head, wide);
      for (int n = 0; n < N; ++n) scores[n * length + t] = scale * dot_of(query[n], wide, padded);
    }
  }

  // out[n] = sum over t of shares[n * length + t] * value t.
  template <class T, int N>
  static void mix(const float* shares, const T* values, int64_t head, int64_t length, T* out) {
    alignas(64) float sums[N][kMostHead], wide[kMostHead];
    memset(sums, 0, sizeof sums);
    for (int64_t t = 0; t < length; ++t) {
      widen_all<T>(values + t * head, head, wide);
      for (int n = 0; n < N; ++n) {
        const float share = shares[n * length + t];
        float* __restrict sum = sums[n];
        for (int64_t i = 0; i < head; ++i) sum[i] += share * wide[i];
      }
    }
    for (int n = 0; n < N; ++n)
      for (int64_t i = 0; i < head; ++i) narrow(sums[n][i], out + n * head + i);
  }
};

// N heads of one sequence that share keys and values.
template <class Head, class T, int N>
void attend_heads(const Attend& a, int64_t sequence, int64_t first, float* scores) {
  const Decoder& d = *a.decoder;
  const Token& token = *a.token;
  const int64_t offset = sequence * token.cache_batch + first / (d.heads / d.kv_heads) * token.cache_head;
  const int64_t place = (sequence * d.heads + first) * d.head, length = token.length;
  Head::template scores<T, N>((const T*)a.q + place, (const T*)a.cache->keys + offset, d.head, length, d.scale, scores);
  const uint8_t* mask = token.mask ? token.mask + sequence * length : nullptr;
  for (int n = 0; n < N; ++n) {
    if (mask)
      for (int64_t t = 0; t < length; ++t) scores[n * length + t] = mask[t] ? scores[n * length + t] : -INFINITY;
    softmax(scores + n * length, length);
  }
  Head::template mix<T, N>(scores, (const T*)a.cache->values + offset, d.head, length, (T*)a.out + place);
}

template <class Head, class T>
void attend_all(const Attend& a, int64_t begin, int64_t end, float* scores) {
  const Decoder& d = *a.decoder;
  const int64_t shared = d.heads / d.kv_heads;
  for (int64_t i = begin; i < end;) {
    const int64_t sequence = i / d.heads, first = i % d.heads;
    int64_t n = shared - first % shared;  // heads left that share these keys
    n = n < end - i ? n : end - i;
    n = n < kHeadsAtOnce ? n : kHeadsAtOnce;
    if (n == 4)
      attend_heads<Head, T, 4>(a, sequence, first, scores);
    else if (n == 3)
      attend_heads<Head, T, 3>(a, sequence, first, scores);
    else if (n == 2)
      attend_heads<Head, T, 2>(a, sequence, first, scores);
    else
      attend_heads<Head, T, 1>(a, sequence, first, scores);
    i += n;
  }
}

template <class T>
void gate_all(const void* gate, const void* up, int64_t n, void* out) {
  const T *__restrict g = (const T*)gate, *__restrict u = (const T*)up;
  T* __restrict y = (T*)out;
  for (int64_t i = 0; i < n; ++i) narrow(act_of<kSilu>(widen(g[i]), 0) * widen(u[i]), y + i);
}

template <class Head, class T>
constexpr DecoderKernels pieces_of() {
  return {widen_all<T>, norm_all<T>, add_all<T>, turn_heads<T>, attend_all<Head, T>, gate_all<T>};
}

}  // namespace
}  // namespace pumice
