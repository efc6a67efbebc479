// Kernels for AVX2 and FMA: eight columns at a time, expanded by a shuffle looked up by the mask byte.
#include "kernels.h"

#if (defined(__x86_64__) || defined(_M_X64)) && !defined(PUMICE_PORTABLE_ONLY)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,popcnt,bmi,bmi2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx2,fma,popcnt,bmi,bmi2")
#endif

#include "driver.h"
#include "coded.h"
#include "grouped_outer.h"
#include "conv_kernel.h"
#include "decoder_pieces.h"

namespace pumice {
namespace {

// For each mask byte: where each of 8 columns takes its value from, and how many values are used up.
struct Shuffles {
  alignas(16) uint8_t bytes[256][16];  // of 16-bit values, for pshufb; 0x80 gives zero
  int8_t lanes[256][8];                // of 32-bit values, for vpermd; negative means zero
  constexpr Shuffles() : bytes(), lanes() {
    for (int mask = 0; mask < 256; ++mask)
      for (int bit = 0, rank = 0; bit < 8; ++bit) {
        const bool on = (mask >> bit) & 1;
        bytes[mask][2 * bit] = (uint8_t)(on ? 2 * rank : 0x80);
        bytes[mask][2 * bit + 1] = (uint8_t)(on ? 2 * rank + 1 : 0x80);
        lanes[mask][bit] = (int8_t)(on ? rank : -1);
        rank += on;
      }
  }
};
constexpr Shuffles shuffles;

inline __m256i load_expanded(const uint32_t* p, unsigned byte) {
  __m256i index = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)shuffles.lanes[byte]));
  __m256i moved = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)p), index);
  return _mm256_andnot_si256(_mm256_srai_epi32(index, 31), moved);
}

inline __m128i load_expanded(const uint16_t* p, unsigned byte) {
  __m128i order = _mm_load_si128((const __m128i*)shuffles.bytes[byte]);
  return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)p), order);
}

inline __m256 expanded(const float* p, unsigned byte) {
  return _mm256_castsi256_ps(load_expanded((const uint32_t*)p, byte));
}

inline __m256 widened(__m128i bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}

inline __m256 expanded(const BF16* p, unsigned byte) { return widened(load_expanded((const uint16_t*)p, byte)); }

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const BF16* p) { return widened(_mm_loadu_si128((const __m128i*)p)); }

// Asks for the cache lines of n values.
template <class T>
inline void fetch(const T* p, int64_t n) {
  for (int64_t byte = 0; byte < n * (int64_t)sizeof(T); byte += 64) _mm_prefetch((const char*)p + byte, _MM_HINT_T0);
}

}  // namespace
}  // namespace pumice

#include "avx2_tiles.h"
#include "avx2_blocks.h"

namespace pumice {
namespace {

inline float sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

struct Avx2 {
  template <class T>
  using X = float;
  static constexpr int kDotRows = 8, kTogether = 1, kTileRows = 2, kTileSums = 8;

  template <class T, int M, int N>
  static void dot(const T* const* values, int64_t ahead, const uint8_t* mask, int64_t, const float* x, int64_t stride,
                  int64_t I, float (*sums)[N]) {
    const T* p = values[0];
    constexpr int U = N == 1 ? 4 : N == 2 ? 2 : 1;  // sums in flight, to hide the latency of an FMA
    __m256 acc[N][U];
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n)
      PUMICE_UNROLL
      for (int u = 0; u < U; ++u) acc[n][u] = _mm256_setzero_ps();
    for (int64_t j = 0; 64 * j < I; ++j) {
      const uint64_t word = mask_word(mask, j, I);
      _mm_prefetch((const char*)(p + ahead), _MM_HINT_T0);
      PUMICE_UNROLL
      for (int k = 0; k < 8; k += U)
        PUMICE_UNROLL
        for (int u = 0; u < U; ++u) {
          const unsigned byte = (unsigned)(word >> (8 * (k + u))) & 0xff;
          const __m256 w = expanded(p, byte);
          p += _mm_popcnt_u32(byte);
          PUMICE_UNROLL
          for (int n = 0; n < N; ++n)
            acc[n][u] = _mm256_fmadd_ps(w, load8(x + n * stride + 64 * j + 8 * (k + u)), acc[n][u]);
        }
    }
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) {
      __m256 total = acc[n][0];
      for (int u = 1; u < U; ++u) total = _mm256_add_ps(total, acc[n][u]);
      sums[0][n] = sum(total);
    }
  }

  template <class T, int M, int N>
  static void tile(const T* values, const int32_t* columns, int64_t begin, int64_t end, int64_t r, int64_t c,
                   int64_t ahead, const float* x, int64_t stride, float (*sums)[N]) {
    __m256 acc[M][N];
    float rest[M][N];
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m)
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = _mm256_setzero_ps(), rest[m][n] = 0;
    for (int64_t b = begin; b < end; ++b) {
      const T* w = values + b * r * c;
      const float* xs = x + columns[b] * c;
      if (ahead) fetch_far(w + ahead, r * c);
      int64_t k = 0;
      for (; k + 8 <= c; k += 8)
        PUMICE_UNROLL
        for (int m = 0; m < M; ++m) {
          const __m256 v = load8(w + m * c + k);
          PUMICE_UNROLL
          for (int n = 0; n < N; ++n) acc[m][n] = _mm256_fmadd_ps(v, load8(xs + n * stride + k), acc[m][n]);
        }
      for (; k < c; ++k)
        PUMICE_UNROLL
        for (int m = 0; m < M; ++m)
          PUMICE_UNROLL
          for (int n = 0; n < N; ++n) rest[m][n] += widen(w[m * c + k]) * xs[n * stride + k];
    }
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m)
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) sums[m][n] = sum(acc[m][n]) + rest[m][n];
  }

  static void put(uint16_t* out, __m128i v) { _mm_storeu_si128((__m128i*)out, v); }
  static void put(uint32_t* out, __m256i v) { _mm256_storeu_si256((__m256i*)out, v); }

  template <class T>
  static void expand_row(const T* p, const uint8_t* mask, int64_t I, T* out) {
    for (int64_t i = 0; i < I; i += 8) {
      const unsigned byte = (unsigned)(I - i < 8 ? mask[i / 8] & ((1u << (I - i)) - 1) : mask[i / 8]);
      if (I - i >= 8) {
        put(out + i, load_expanded(p, byte));
      } else {
        T rest[8];
        put(rest, load_expanded(p, byte));
        memcpy(out + i, rest, sizeof(T) * (size_t)(I - i));
      }
      p += _mm_popcnt_u32(byte);
    }
  }
};

struct Coded : PlainCoded {
  template <class T>
  using X4 = float;
  template <class T>
  using X8 = float;
};

// Grouped products in fp32, eight sums a register.
template <class Value>
struct Floats256 {
  typedef Value T;
  typedef __m256 Reg;
  typedef __m256 Sum;
  static constexpr int64_t kLanes = 8, kStretch = 512;
  static constexpr bool kTurns = false;
  static constexpr int kM = 4, kN = 3, kDirectM = 4, kDirectN = 3, kWidth = 8, kStep = 1, kCross = 1, kV = 2, kR = 4;

  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum add(Sum a, Sum b) { return _mm256_add_ps(a, b); }
  static Reg none() { return _mm256_setzero_ps(); }
  static Reg load(const T* p) { return load8(p); }
  static Reg load(const T* p, int64_t n) {
    T some[8] = {};
    if (n > 0) memcpy(some, p, sizeof(T) * (size_t)(n < 8 ? n : 8));
    return load8(some);
  }
  static Sum fma(Sum s, Reg w, Reg x) { return _mm256_fmadd_ps(w, x, s); }
  static Reg hold(Reg r) { return r; }
  static Reg spread(const T* x, int) { return _mm256_set1_ps(widen(*x)); }
  static inline void cross(const T* w, int64_t, int, int64_t outputs, Reg* out) {
    out[0] = outputs >= 8 ? load8(w) : load(w, outputs);
  }
  template <int M>
  static inline void reduce(const Sum* s, float* out) {
    for (int m = 0; m < M; ++m) out[m] = sum(s[m]);
  }
  static inline void put(float* out, Sum s, bool add) {
    _mm256_storeu_ps(out, add ? _mm256_add_ps(_mm256_loadu_ps(out), s) : s);
  }
};

const Kernels table = {"avx2",
                       false,
                       nullptr,
                       {dense_product<Floats256<BF16>, Floats256<float>>, dense_product<Floats256<float>, Floats256<float>>},
                       {bitmask_product<Avx2, BF16>, bitmask_product<Avx2, float>},
                       {block_product<Avx2, BF16>, block_product<Avx2, float>},
                       expand_rows<Avx2, uint16_t>,
                       expand_rows<Avx2, uint32_t>,
                       {coded_product<Coded, BF16>, coded_product<Coded, float>},
                       {coded_expand<BF16>, coded_expand<float>},
                       {block_panels<Blocks256<BF16>>(), block_panels<Blocks256<float>>()},
                       {coded_blocks_product<BF16>, coded_blocks_product<float>},
                       nullptr,
                       nullptr};

const GroupedKernels grouped = {{stage_columns<Floats256<BF16>>, stage_columns<Floats256<float>>},
                                {hidden_rows<BF16>, hidden_rows<float>},
                                {outer_rows<Floats256<BF16>>, outer_rows<Floats256<float>>}};

template <class T>
using Many8 = Many256<T, 1>;
template <class T>
using Many16 = Many256<T, 2>;
const TileKernels tiles = {
    {{1, few_product<Few256<BF16>>, true, {8, 16}, {many_product<Many8<BF16>>, many_product<Many16<BF16>>}, true},
     {1, few_product<Few256<float>>, false, {8, 16}, {many_product<Many8<float>>, many_product<Many16<float>>}, false}}};

struct Conv256 {
  typedef __m256 Reg;
  static constexpr int kLanes = 8;
  static Reg get(const float* p) { return _mm256_loadu_ps(p); }
  // The first n numbers.
  static Reg get(const float* p, int64_t n) {
    const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), there = _mm256_set1_epi32(n > 8 ? 8 : n > 0 ? (int)n : 0);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(there, place));
  }
  static void put(float* p, Reg r) { _mm256_storeu_ps(p, r); }
  static Reg spread(float v) { return _mm256_set1_ps(v); }
  static Reg fma(Reg sum, Reg w, Reg x) { return _mm256_fmadd_ps(w, x, sum); }
  // Of two operands the second is what remains where one is no number.
  static Reg clamp(Reg v, Reg least, Reg most) { return _mm256_min_ps(most, _mm256_max_ps(least, v)); }
};
const ConvKernels convolutions = conv_kernels<Conv256>();

const DecoderKernels decoder_pieces[] = {pieces_of<AnyHead, BF16>(), pieces_of<AnyHead, float>()};

}  // namespace

const Kernels* avx2_kernels() { return &table; }
const GroupedKernels* avx2_grouped() { return &grouped; }
const TileKernels* avx2_tiles() { return &tiles; }
const DecoderKernels* avx2_decoder() { return decoder_pieces; }
const ConvKernels* avx2_conv() { return &convolutions; }

}  // namespace pumice

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

#include "conv.h"
#include "decoder.h"
#include "grouped.h"
#include "tiles.h"

namespace pumice {
const Kernels* avx2_kernels() { return nullptr; }
const GroupedKernels* avx2_grouped() { return nullptr; }
const TileKernels* avx2_tiles() { return nullptr; }
const DecoderKernels* avx2_decoder() { return nullptr; }
const ConvKernels* avx2_conv() { return nullptr; }
}  // namespace pumice

#endif
