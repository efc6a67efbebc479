// Numbers of eight bits in bf16 models, multiplied as bytes in fours by x in two bytes (ByteRow).
// Included by the translation unit after it has set its target and before avx512_lanes.h, which splits x alike.
#pragma once

namespace pumice {
namespace {

struct Unit {
  float unit, inverse;  // NaN and 0 where the row is not finite
};

// What one of `steps` steps from zero to the largest magnitude of a row stands for.
template <class X>
inline Unit unit_of(const X* x, int64_t I, float steps) {
  __m512 most = _mm512_setzero_ps(), seen = most;
  for (int64_t i = 0; i < I; i += 16) {
    const __m512 v = load16(first16(I - i), x + i);
    most = _mm512_max_ps(most, _mm512_abs_ps(v));
    seen = _mm512_fmadd_ps(v, _mm512_setzero_ps(), seen);  // NaN as soon as one of them is not finite
  }
  const float top = _mm512_reduce_max_ps(most), nothing = _mm512_reduce_add_ps(seen);
  if (nothing != nothing) return {nothing, 0.0f};
  // Subnormal units would overflow their inverse.
  return top > 1e-30f ? Unit{top / steps, steps / top} : Unit{0.0f, 0.0f};
}

// Sixteen numbers of sixteen bits as their higher and their lower bytes: to the nearest multiple of 256, so that what is left
// has eight bits with a sign.
inline void put_bytes(__m512i q, void* high, void* low) {
  const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
  _mm_storeu_si128((__m128i*)high, _mm512_cvtepi32_epi8(upper));
  _mm_storeu_si128((__m128i*)low, _mm512_cvtepi32_epi8(q));
}

void split_row(const BF16* x, int64_t I, uint8_t* row) {
  const Unit unit = unit_of(x, I, (float)ByteRow::kTop);
  memcpy(row, &unit.unit, 4);
  const __m512 scale = _mm512_set1_ps(unit.inverse);
  const int64_t padded = ByteRow::padded(I);
  uint8_t *high = row + ByteRow::kHigh, *low = row + ByteRow::low(I), *start = row + ByteRow::start(I);
  for (int64_t i = 0; i < padded; i += 16) {
    put_bytes(_mm512_cvtps_epi32(_mm512_mul_ps(load16(first16(I - i), x + i), scale)), high + i, low + i);
  }
  const __m512i moved = _mm512_set1_epi8((char)128);
  for (int64_t begin = 0; begin < padded; begin += ByteRow::kStretch, start += 64) {
    __m512i h = _mm512_setzero_si512(), l = h;
    for (int64_t i = begin; i < begin + ByteRow::kStretch && i < padded; i += 64) {
      h = _mm512_dpbusd_epi32(h, moved, _mm512_loadu_si512(high + i));
      l = _mm512_dpbusd_epi32(l, moved, _mm512_loadu_si512(low + i));
    }
    _mm512_storeu_si512(start, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_add_epi32(_mm512_slli_epi32(h, 8), l)));
  }
}

struct CodedBytes : CodedFp32 {
  template <class T>
  using X8 = uint8_t;

  // 64 weights times as many columns of N rows of x, whose higher bytes begin at `high`.
  template <int N>
  static inline void word(__m512i v, const uint8_t* high, int64_t stride, int64_t padded, __m512i (*acc)[2]) {
    v = _mm512_xor_si512(v, _mm512_set1_epi8((char)128));
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) {
      acc[n][0] = _mm512_dpbusd_epi32(acc[n][0], v, _mm512_loadu_si512(high + n * stride));
      acc[n][1] = _mm512_dpbusd_epi32(acc[n][1], v, _mm512_loadu_si512(high + n * stride + padded));
    }
  }

  // The numbers of 64 columns, of which those with a bit are stored. Where there are few, half a register is loaded: a whole one
  // reaches into a second cache line nearly always.
  template <bool kFew = false>
  static inline __m512i expanded(uint64_t bits, const int8_t** p) {
    const int64_t count = _mm_popcnt_u64(bits);
    const __m512i v = kFew && count <= 32 ? _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)*p))
                                          : _mm512_loadu_si512(*p);
    *p += count;
    return _mm512_mask_expand_epi8(zero(), (__mmask64)bits, in_register(v));
  }

  template <class T, int N>
  static void dot8(const Matrix& w, int64_t o, const uint8_t* x, int64_t stride, void* scratch, float* sums) {
    if (w.mask && w.starts[o + 1] - w.starts[o] < w.I * 3 / 8)
      dot_row<N, true>(w, o, x, stride, scratch, sums);
    else
      dot_row<N, false>(w, o, x, stride, scratch, sums);
  }

  // `kFew`: there is a bitmask, and few columns are stored.
  template <int N, bool kFew>
  static void dot_row(const Matrix& w, int64_t o, const uint8_t* x, int64_t stride, void* scratch, float* sums) {
    constexpr int64_t kWords = ByteRow::kStretch / 64;
    constexpr int U = 2;  // words at once, to hide the latency of a product
    const int64_t padded = ByteRow::padded(w.I), words = padded / 64;
    const uint8_t *mask = w.mask ? w.mask + o * ((w.I + 7) / 8) : nullptr, *start = x + ByteRow::start(w.I);
    const uint8_t* high = x + ByteRow::kHigh;
    const int8_t* p = mask ? row_values<int8_t>(w, o, scratch) : (const int8_t*)w.values + o * w.I;
    __m512 total[N];
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) total[n] = _mm512_setzero_ps();
    for (int64_t begin = 0; begin < words; begin += kWords) {
      const int64_t end = begin + kWords < words ? begin + kWords : words;
      const int64_t whole = end < w.I / 64 ? end : w.I / 64;
      __m512i acc[U][N][2];
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) {
        PUMICE_UNROLL
        for (int u = 0; u < U; ++u) acc[u][n][0] = acc[u][n][1] = _mm512_setzero_si512();
        acc[0][n][1] = _mm512_loadu_si512(start + n * stride + 64 * (begin / kWords));
      }
      int64_t j = begin;
      if (mask) {
        for (; j + U <= whole; j += U)
          PUMICE_UNROLL
          for (int u = 0; u < U; ++u) {
            uint64_t bits;
            memcpy(&bits, mask + 8 * (j + u), 8);
            _mm_prefetch((const char*)p + kAhead, _MM_HINT_T0);
            word<N>(expanded<kFew>(bits, &p), high + 64 * (j + u), stride, padded, acc[u]);
          }
        for (; j < end; ++j) word<N>(expanded<kFew>(mask_word(mask, j, w.I), &p), high + 64 * j, stride, padded, acc[0]);
      } else {
        for (; j + U <= whole; j += U)
          PUMICE_UNROLL
          for (int u = 0; u < U; ++u) {
            fetch_far(p + 64 * (j + u) + 2 * kFarAhead);
            word<N>(_mm512_loadu_si512(p + 64 * (j + u)), high + 64 * (j + u), stride, padded, acc[u]);
          }
        for (; j < end; ++j) {
          const __mmask64 inside = j < whole ? ~(__mmask64)0 : (1ull << (w.I % 64)) - 1;
          word<N>(_mm512_maskz_loadu_epi8(inside, p + 64 * j), high + 64 * j, stride, padded, acc[0]);
        }
      }
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) {
        __m512i upper = acc[0][n][0], lower = acc[0][n][1];
        PUMICE_UNROLL
        for (int u = 1; u < U; ++u)
          upper = _mm512_add_epi32(upper, acc[u][n][0]), lower = _mm512_add_epi32(lower, acc[u][n][1]);
        total[n] = _mm512_add_ps(total[n], _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower)));
      }
    }
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) {
      float unit;
      memcpy(&unit, x + n * stride, 4);
      sums[n] = _mm512_reduce_add_ps(total[n]) * unit;
    }
  }
};

}  // namespace
}  // namespace pumice
