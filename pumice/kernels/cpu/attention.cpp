// Dense softmax attention for calibration: bf16 in and out, scores and sums in fp32 (AVX-512 BF16).
//
// PyTorch's CPU attention takes a third of the time of pruning a small language model where there is no AMX.
#include <math.h>

#include "attention.h"
#include "features.h"
#include "kernels.h"
#include "threads.h"

#if (defined(__x86_64__) || defined(_M_X64)) && !defined(PUMICE_PORTABLE_ONLY) && \
    (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10))
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

namespace pumice {
namespace {

constexpr int64_t kBlock = 64;  // queries, keys and features are worked off in 64s
constexpr int kRows = 4;

// Numbers are pairs of bf16. Keys are packed [heads][key blocks][D / 2][64 keys], so that a product runs over pairs of
// features; values [heads][D blocks][T / 2][64 features], so that it runs over pairs of keys. Zero beyond T and D.
struct Attention {
  const uint16_t *q, *k, *v;  // [heads, T, D]
  uint16_t* out;
  uint32_t *keys, *values;
  int64_t T, D, blocks, pairs, wide;  // blocks of 64 tokens, pairs of tokens, blocks of 64 features
  float scale;
  bool causal;
  volatile bool out_of_memory;
};

// One pair of tokens (or, beyond T, nothing) of 16 features from `v`, interleaved.
inline __m512i interleave(const uint16_t* low, const uint16_t* high, int64_t left) {
  const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low));
  if (!high) return a;
  return _mm512_or_si512(a, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, high)), 16));
}

void pack_heads(int64_t begin, int64_t end, void* context) {
  const Attention& g = *(const Attention*)context;
  const int64_t half = g.D / 2;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i rows = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)half));
  for (int64_t h = begin; h < end; ++h) {
    const uint16_t *k = g.k + h * g.T * g.D, *v = g.v + h * g.T * g.D;
    uint32_t* keys = g.keys + h * g.blocks * half * kBlock;
    for (int64_t t = 0; t < g.blocks * kBlock; t += 16) {
      const int64_t left = g.T - t;
      const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
      uint32_t* out = keys + (t / kBlock) * half * kBlock + t % kBlock;
      for (int64_t d = 0; d < half; ++d)
        _mm512_storeu_si512(out + d * kBlock, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, rows,
                                                                         (const int*)(k + t * g.D) + d, 4));
    }
    uint32_t* values = g.values + h * g.wide * g.pairs * kBlock;
    for (int64_t b = 0; b < g.wide; ++b)
      for (int64_t p = 0; p < g.pairs; ++p)
        for (int64_t j = 0; j < kBlock; j += 16) {
          const int64_t d = b * kBlock + j;
          const uint16_t* low = v + 2 * p * g.D + d;
          const uint16_t* high = 2 * p + 1 < g.T ? low + g.D : nullptr;
          _mm512_storeu_si512(values + (b * g.pairs + p) * kBlock + j, interleave(low, high, g.D - d));
        }
  }
}

// out [R, 64] = the products of `count` pairs of R rows of `a` with a packed block `b`.
template <int R>
inline void product(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t count, float* out, int64_t out_stride) {
  __m512 acc[R][4];
  PUMICE_UNROLL
  for (int r = 0; r < R; ++r)
    PUMICE_UNROLL
    for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_setzero_ps();
  for (int64_t t = 0; t < count; ++t) {
    __m512bh v[4];
    PUMICE_UNROLL
    for (int c = 0; c < 4; ++c) v[c] = (__m512bh)_mm512_loadu_si512(b + t * kBlock + 16 * c);
    PUMICE_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m512bh w = (__m512bh)_mm512_set1_epi32((int)a[r * stride + t]);
      PUMICE_UNROLL
      for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_dpbf16_ps(acc[r][c], w, v[c]);
    }
  }
  PUMICE_UNROLL
  for (int r = 0; r < R; ++r)
    PUMICE_UNROLL
    for (int c = 0; c < 4; ++c) _mm512_storeu_ps(out + r * out_stride + 16 * c, acc[r][c]);
}

void products(const uint32_t* a, int64_t stride, const uint32_t* b, int64_t count, int64_t rows, float* out,
              int64_t out_stride) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) product<kRows>(a + row * stride, stride, b, count, out + row * out_stride, out_stride);
  for (; row < rows; ++row) product<1>(a + row * stride, stride, b, count, out + row * out_stride, out_stride);
}

// exp for x <= 0: 2^n times a polynomial of the rest (Taylor to the fifth power, relative error below 3e-6).
inline __m512 exp16(__m512 x) {
  x = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(x, 0);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.33335581e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.61812911e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.55041087e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40226507e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93147181e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// Scores [width] of one query to bf16 weights in place of them, the first `seen` of them; returns 1 / their sum.
float softmax(float* scores, int64_t seen, int64_t width, float scale, uint16_t* weights) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t j = 0; j < width; j += 16) {
    const int64_t left = seen - j;
    const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
    most = _mm512_mask_max_ps(most, mask, most, _mm512_loadu_ps(scores + j));
  }
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most)), factor = _mm512_set1_ps(scale);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < width; j += 16) {
    const int64_t left = seen - j;
    const __mmask16 mask = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
    const __m512 e = _mm512_maskz_mov_ps(mask, exp16(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + j), top), factor)));
    sum = _mm512_add_ps(sum, e);
    _mm256_storeu_si256((__m256i*)(weights + j), (__m256i)_mm512_cvtneps_pbh(e));
  }
  return 1.0f / _mm512_reduce_add_ps(sum);
}

void query_block(Attention& g, int64_t h, int64_t i) {
  const int64_t half = g.D / 2, rows = g.T - i * kBlock < kBlock ? g.T - i * kBlock : kBlock;
  const int64_t blocks = g.causal ? i + 1 : g.blocks, width = blocks * kBlock;
  float* scores = (float*)scratch(0, (size_t)(kBlock * width * 4 + kBlock * g.wide * kBlock * 4));
  uint16_t* weights = (uint16_t*)scratch(1, (size_t)(kBlock * width * 2 + kBlock * g.D * 2 + 64));
  if (!scores || !weights) {
    g.out_of_memory = true;
    return;
  }
  float* sums = scores + kBlock * width;
  uint32_t* queries = (uint32_t*)(weights + kBlock * width);
  memcpy(queries, g.q + (h * g.T + i * kBlock) * g.D, (size_t)(rows * g.D * 2));
  for (int64_t b = 0; b < blocks; ++b)
    products(queries, half, g.keys + (h * g.blocks + b) * half * kBlock, half, rows, scores + b * kBlock, width);
  float inverse[kBlock];
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t seen = g.causal ? i * kBlock + r + 1 : g.T;
    inverse[r] = softmax(scores + r * width, seen, width, g.scale, weights + r * width);
  }
  const int64_t pairs = width / 2 < g.pairs ? width / 2 : g.pairs;
  for (int64_t b = 0; b < g.wide; ++b)
    products((const uint32_t*)weights, width / 2, g.values + (h * g.wide + b) * g.pairs * kBlock, pairs, rows,
             sums + b * kBlock, g.wide * kBlock);
  for (int64_t r = 0; r < rows; ++r) {
    uint16_t* out = g.out + (h * g.T + i * kBlock + r) * g.D;
    const __m512 factor = _mm512_set1_ps(inverse[r]);
    for (int64_t d = 0; d < g.D; d += 16) {
      const __mmask16 mask = g.D - d >= 16 ? 0xffff : (__mmask16)((1u << (g.D - d)) - 1);
      const __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(sums + r * g.wide * kBlock + d), factor);
      _mm256_mask_storeu_epi16(out + d, mask, (__m256i)_mm512_cvtneps_pbh(sum));
    }
  }
}

// Late query blocks see more keys, so a piece takes one from either end.
void query_blocks(int64_t begin, int64_t end, void* context) {
  Attention& g = *(Attention*)context;
  const int64_t halves = (g.blocks + 1) / 2;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t h = k / halves, i = k % halves, other = g.blocks - 1 - i;
    query_block(g, h, i);
    if (other != i) query_block(g, h, other);
  }
}

}  // namespace

int attention(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out, uint32_t* packed, int64_t heads,
              int64_t T, int64_t D, float scale, bool causal) {
  if (!cpu_has("avx512_bf16") || D % 2) return 1;
  if (heads == 0 || T == 0) return 0;
  Attention g = {q, k, v, out, packed, nullptr, T, D, (T + kBlock - 1) / kBlock, (T + 1) / 2, (D + kBlock - 1) / kBlock,
                 scale, causal, false};
  g.values = packed + heads * g.blocks * (D / 2) * kBlock;
  parallel(heads, pack_heads, &g);
  parallel(heads * ((g.blocks + 1) / 2), query_blocks, &g);
  return g.out_of_memory ? 2 : 0;
}

}  // namespace pumice

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
namespace pumice {
int attention(const uint16_t*, const uint16_t*, const uint16_t*, uint16_t*, uint32_t*, int64_t, int64_t, int64_t, float,
              bool) {
  return 1;
}
}  // namespace pumice
#endif
