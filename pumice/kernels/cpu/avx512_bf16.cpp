// Kernels for AVX-512 with VBMI2, VNNI and BF16 (Zen 4, Sapphire Rapids and later): 32 bf16 columns by vpexpandw, multiplied
// in pairs by vdpbf16ps into fp32 sums. vpexpandw works on a loaded register; its form that reads memory is slow.
#include "kernels.h"

// GCC before 10 does not know the set; MSVC has no cast to its type of bf16 pairs.
#if (defined(__x86_64__) || defined(_M_X64)) && !defined(PUMICE_PORTABLE_ONLY) && \
    (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 10))
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512vnni,avx512bf16,avx2,fma,popcnt,bmi,bmi2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512vnni,avx512bf16,avx2,fma,popcnt,bmi,bmi2")
#endif

#include "driver.h"
#include "avx512_fp32.h"
#include "coded.h"
#include "avx512_coded.h"
#include "avx512_grouped.h"
#include "grouped_outer.h"
#include "avx512_bytes.h"
#include "avx512_tiles.h"
#include "avx512_blocks.h"
#include "avx512_byte_blocks.h"
#include "avx512_lanes.h"
#include "decoder_pieces.h"

namespace pumice {
namespace {

inline __m512bh pairs(__m512i v) { return (__m512bh)v; }

}  // namespace
}  // namespace pumice

#include "avx512_pairs.h"

namespace pumice {
namespace {

inline __m512i expand16(uint32_t mask, const void* p) {
  return _mm512_mask_expand_epi16(zero(), (__mmask32)mask, in_register(_mm512_loadu_si512(p)));
}

struct Bf16Sums {
  template <class T>
  using X = BF16;
  static constexpr int kDotRows = 8, kTogether = 3, kTileRows = 4, kTileSums = 16;

  // 64 columns: bits[m] of M rows of the matrix times N rows of x.
  template <int M, int N, int U>
  static inline void word(const BF16** p, const uint64_t* bits, const BF16* x, int64_t stride, __m512 (*acc)[N][U],
                          int u) {
    PUMICE_UNROLL
    for (int half = 0; half < 2; ++half) {
      __m512bh w[M];
      PUMICE_UNROLL
      for (int m = 0; m < M; ++m) {
        // From one word to the next p moves by a single sum, not two: that chain would set the pace.
        const int64_t used = half ? _mm_popcnt_u32((uint32_t)bits[m]) : 0;
        w[m] = pairs(expand16((uint32_t)(bits[m] >> (32 * half)), p[m] + used));
      }
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) {
        const __m512bh v = pairs(_mm512_loadu_si512(x + n * stride + 32 * half));
        PUMICE_UNROLL
        for (int m = 0; m < M; ++m) {
          __m512& sum = acc[m][n][(u + half) % U];
          sum = _mm512_dpbf16_ps(sum, w[m], v);
        }
      }
    }
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m) p[m] += _mm_popcnt_u64(bits[m]);
  }

  template <class T, int M, int N>
  static void dot(const BF16* const* values, int64_t ahead, const uint8_t* mask, int64_t mask_stride, const BF16* x,
                  int64_t stride, int64_t I, float (*sums)[N]) {
    // Sums in flight, to hide the latency of vdpbf16ps. Not by M, or the last bit of y would depend on the threads.
    constexpr int U = N == 1 ? 8 : N == 2 ? 4 : N <= 4 ? 2 : 1;
    constexpr int W = U < 2 ? 1 : U / 2;  // words per turn
    __m512 acc[M][N][U];
    const BF16* p[M];
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m) {
      p[m] = values[m];
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n)
        PUMICE_UNROLL
        for (int u = 0; u < U; ++u) acc[m][n][u] = _mm512_setzero_ps();
    }
    uint64_t bits[M];
    int64_t j = 0;
    for (; 64 * (j + W) <= I; j += W)
      PUMICE_UNROLL
      for (int k = 0; k < W; ++k) {
        PUMICE_UNROLL
        for (int m = 0; m < M; ++m) {
          memcpy(&bits[m], mask + m * mask_stride + 8 * (j + k), 8);
          fetch(p[m] + ahead, 32);
        }
        word<M, N, U>(p, bits, x + 64 * (j + k), stride, acc, 2 * k);
      }
    for (; 64 * j < I; ++j) {
      PUMICE_UNROLL
      for (int m = 0; m < M; ++m) bits[m] = mask_word(mask + m * mask_stride, j, I);
      word<M, N, U>(p, bits, x + 64 * j, stride, acc, 0);
    }
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m)
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) {
        __m512 total = acc[m][n][0];
        for (int u = 1; u < U; ++u) total = _mm512_add_ps(total, acc[m][n][u]);
        sums[m][n] = _mm512_reduce_add_ps(total);
      }
  }

  template <class T, int M, int N>
  static void tile(const BF16* values, const int32_t* columns, int64_t begin, int64_t end, int64_t r, int64_t c,
                   int64_t ahead, const BF16* x, int64_t stride, float (*sums)[N]) {
    __m512 acc[M][N];
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m)
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = _mm512_setzero_ps();
    for (int64_t b = begin; b < end; ++b) {
      const BF16* w = values + b * r * c;
      const BF16* xs = x + columns[b] * c;
      if (ahead) fetch_far(w + ahead, r * c);
      for (int64_t k = 0; k < c; k += 32) {
        const __mmask32 inside = c - k >= 32 ? (__mmask32)0xffffffff : (__mmask32)((1u << (c - k)) - 1);
        __m512bh v[N];
        PUMICE_UNROLL
        for (int n = 0; n < N; ++n) v[n] = pairs(_mm512_maskz_loadu_epi16(inside, xs + n * stride + k));
        PUMICE_UNROLL
        for (int m = 0; m < M; ++m) {
          const __m512bh row = pairs(_mm512_maskz_loadu_epi16(inside, w + m * c + k));
          PUMICE_UNROLL
          for (int n = 0; n < N; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], row, v[n]);
        }
      }
    }
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m)
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) sums[m][n] = _mm512_reduce_add_ps(acc[m][n]);
  }
};

struct Expansion {
  static void expand_row(const uint16_t* p, const uint8_t* mask, int64_t I, uint16_t* out) {
    for (int64_t i = 0; i < I; i += 32) {
      const uint32_t bits = (uint32_t)(mask_word(mask, i / 64, I) >> (i % 64));
      const __m512i w = expand16(bits, p);
      if (I - i >= 32)
        _mm512_storeu_si512(out + i, w);
      else
        _mm512_mask_storeu_epi16(out + i, (__mmask32)((1u << (I - i)) - 1), w);
      p += _mm_popcnt_u32(bits);
    }
  }

  static void expand_row(const uint32_t* p, const uint8_t* mask, int64_t I, uint32_t* out) {
    expand_row32(p, mask, I, out);
  }
};

// Four bits by looking their levels up as bf16 (vpermw), 64 at a time, multiplied in pairs and then scaled by group.
struct CodedBf16 : CodedBytes {
  template <class T>
  using X4 = BF16;

  // Which groups of a row are stored, as their numbers; the list is filled up to a multiple of 4 by its last entry.
  static int64_t list(const Matrix& w, int64_t o, int64_t groups, uint16_t* out) {
    const uint8_t* mask = w.mask + o * ((groups + 7) / 8);
    __m512i number = _mm512_load_si512(kNumbersFrom0);
    int64_t n = 0;
    for (int64_t j = 0; 64 * j < groups; ++j) {
      const uint64_t word = mask_word(mask, j, groups);
      for (int part = 0; part < 2; ++part) {
        const uint32_t bits = (uint32_t)(word >> (32 * part));
        _mm512_storeu_si512(out + n, _mm512_maskz_compress_epi16(bits, number));
        n += _mm_popcnt_u32(bits);
        number = _mm512_add_epi16(number, _mm512_set1_epi16(32));
      }
    }
    for (int k = 0; n && k < 3; ++k) out[n + k] = out[n - 1];
    return n;
  }

  alignas(64) static constexpr uint16_t kNumbersFrom0[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10,
                                                             11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                                             22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

  // bf16 of a level by the low five bits of its index: code - 8 whatever the fifth bit is, or index as a signed number.
  struct Levels {
    alignas(64) uint16_t plain[32], signs[32];
    constexpr Levels() : plain(), signs() {
      for (int i = 0; i < 32; ++i) plain[i] = bits((i & 15) - 8), signs[i] = bits(i < 16 ? i : i - 32);
    }
    static constexpr uint16_t bits(int v) {
      if (v == 0) return 0;
      int m = v < 0 ? -v : v, e = 0;
      while ((m >> e) > 1) ++e;
      return (uint16_t)((v < 0 ? 0x8000 : 0) | ((127 + e) << 7) | ((m << (7 - e)) & 127));
    }
  };

  // C columns to a group, P = 64 / C groups to a step; `count` of them are there.
  template <int C, int N, bool kWhole>
  static inline void step(const Matrix& w, int64_t at, int count, const uint16_t* list, const BF16* x, int64_t stride,
                          __m512* acc) {
    static constexpr Levels levels;
    constexpr int P = 64 / C;
    const uint8_t* codes = (const uint8_t*)w.values + at * (C / 2);
    const uint16_t* scales = (const uint16_t*)w.scales + at;
    __m256i bytes;
    __m128i packed;
    if constexpr (kWhole) {
      bytes = _mm256_loadu_si256((const __m256i*)codes);
      packed = P == 4 ? _mm_loadl_epi64((const __m128i*)scales) : _mm_loadu_si32(scales);
    } else {
      bytes = _mm256_maskz_loadu_epi8((__mmask32)((1ull << (count * C / 2)) - 1), codes);
      packed = _mm_maskz_loadu_epi16((__mmask8)((1u << count) - 1), scales);
    }
    const __m512i order = _mm512_load_si512(C == 16 ? kByFour : kByEight);
    const __m512 scale = _mm512_castsi512_ps(
        _mm512_maskz_permutexvar_epi16(0xaaaaaaaa, order, _mm512_castsi128_si512(packed)));
    __m512i low = _mm512_cvtepu8_epi16(bytes), high = _mm512_srli_epi16(low, 4);
    __m512i table = _mm512_load_si512(levels.plain);
    if (w.zeros) {
      table = _mm512_load_si512(levels.signs);
      alignas(16) uint16_t z[8] = {};
      for (int k = 0; k < (kWhole ? P : count); ++k) z[k] = (uint16_t)zero_of(w, at + k);
      const __m512i zero =
          _mm512_permutexvar_epi16(order, _mm512_castsi128_si512(_mm_load_si128((const __m128i*)z)));
      low = _mm512_sub_epi16(_mm512_and_si512(low, _mm512_set1_epi16(15)), zero);
      high = _mm512_sub_epi16(high, zero);
    }
    const __m512bh first = pairs(_mm512_permutexvar_epi16(low, table));
    const __m512bh second = pairs(_mm512_permutexvar_epi16(high, table));
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) {
      const BF16* xs = x + n * stride;
      __m512i a, b;
      if (!list) {
        a = _mm512_loadu_si512(xs), b = _mm512_loadu_si512(xs + 32);
      } else if (C == 32) {
        a = _mm512_loadu_si512(xs + C * list[0]), b = _mm512_loadu_si512(xs + C * list[1]);
      } else {
        a = two(xs + C * list[0], xs + C * list[1]), b = two(xs + C * list[2], xs + C * list[3]);
      }
      const __m512i lows = C == 16 ? _mm512_shuffle_i64x2(a, b, 0x88) : _mm512_shuffle_i64x2(a, b, 0x44);
      const __m512i highs = C == 16 ? _mm512_shuffle_i64x2(a, b, 0xdd) : _mm512_shuffle_i64x2(a, b, 0xee);
      __m512 sum = _mm512_dpbf16_ps(_mm512_setzero_ps(), first, pairs(lows));
      sum = _mm512_dpbf16_ps(sum, second, pairs(highs));
      acc[n] = _mm512_fmadd_ps(sum, scale, acc[n]);
    }
  }

  static inline __m512i two(const BF16* a, const BF16* b) {
    const __m512i lower = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a));
    return _mm512_inserti64x4(lower, _mm256_loadu_si256((const __m256i*)b), 1);
  }

  // For each word of a vector the group that it belongs to.
  alignas(64) static constexpr uint16_t kByFour[32] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,
                                                       2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3};
  alignas(64) static constexpr uint16_t kByEight[32] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                                        1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

  template <int C, int N>
  static void groups_of(const Matrix& w, int64_t o, const BF16* x, int64_t stride, void* scratch, float* sums) {
    constexpr int P = 64 / C;
    const int64_t groups = w.I / C, at = stored_before(w, o);
    const uint16_t* numbers = w.mask ? (const uint16_t*)scratch : nullptr;
    const int64_t n = w.mask ? list(w, o, groups, (uint16_t*)scratch) : groups;
    __m512 acc[2][N];
    PUMICE_UNROLL
    for (int k = 0; k < N; ++k) acc[0][k] = acc[1][k] = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 2 * P <= n; i += 2 * P) {
      _mm_prefetch((const char*)w.values + (at + i) * (C / 2) + kAhead, _MM_HINT_T0);
      if (numbers) {
        step<C, N, true>(w, at + i, P, numbers + i, x, stride, acc[0]);
        step<C, N, true>(w, at + i + P, P, numbers + i + P, x, stride, acc[1]);
      } else {
        step<C, N, true>(w, at + i, P, nullptr, x + C * i, stride, acc[0]);
        step<C, N, true>(w, at + i + P, P, nullptr, x + C * (i + P), stride, acc[1]);
      }
    }
    for (; i < n; i += P) {
      const int count = (int)(n - i < P ? n - i : P);
      step<C, N, false>(w, at + i, count, numbers ? numbers + i : nullptr, x + (numbers ? 0 : C * i), stride, acc[0]);
    }
    PUMICE_UNROLL
    for (int k = 0; k < N; ++k) sums[k] = _mm512_reduce_add_ps(_mm512_add_ps(acc[0][k], acc[1][k]));
  }

  template <class T, int N>
  static void dot4(const Matrix& w, int64_t o, const BF16* x, int64_t stride, void* scratch, float* sums) {
    if (w.group == 16)
      groups_of<16, N>(w, o, x, stride, scratch, sums);
    else
      groups_of<32, N>(w, o, x, stride, scratch, sums);
  }
};

// Two columns of many rows of x in a register, multiplied in pairs.
struct PairBlocks512 : Blocks512<BF16> {
  static constexpr int64_t kColumns = 2, kWords = 1;

  template <int M, int N, bool kWhole>
  static inline void step(Reg (*acc)[N], const BF16* p, int64_t c, const uint32_t* x, int64_t) {
    __m512bh v[N];
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) v[n] = pairs(_mm512_loadu_si512(x + 16 * n));
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m) {
      const __m512bh w = pairs(_mm512_set1_epi32(pair_at<kWhole>(p + m * c)));
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], w, v[n]);
    }
  }

  static void fill(const Matrix& w, int64_t begin, int64_t end, const T* x, int64_t rows, int64_t width, uint32_t* words) {
    if (w.c % kColumns) return fill_plainly<PairBlocks512>(w, begin, end, x, rows, width, words);
    const int64_t I = w.I;
    const auto load = [x, I](int64_t row, int64_t word, __mmask16 inside) {
      return _mm512_maskz_loadu_epi32(inside, x + row * I + 2 * word);
    };
    fill_by_turning(load, begin, end, rows, width, words);
  }
};

// bf16 in pairs, multiplied and added to fp32 by one instruction.
struct Pairs512 : Sums512 {
  typedef BF16 T;
  typedef __m512i Reg;
  static constexpr int64_t kLanes = 32, kStretch = 1024;
  static constexpr int kStep = 2, kCross = 2;

  static inline __mmask32 first32(int64_t n) {
    return n >= 32 ? 0xffffffffu : n > 0 ? (__mmask32)((1u << n) - 1) : 0;
  }
  static Reg none() { return _mm512_setzero_si512(); }
  static Reg load(const T* p) { return _mm512_loadu_si512(p); }
  static Reg load(const T* p, int64_t n) { return _mm512_maskz_loadu_epi16(first32(n), p); }
  static Sum fma(Sum s, Reg w, Reg x) { return _mm512_dpbf16_ps(s, pairs(w), pairs(x)); }
  static Reg hold(Reg r) { return in_register(r); }
  static void turn(Reg* r) { pumice::turn(r); }
  static Reg spread(const T* x, int left) {
    uint32_t two = 0;
    if (left == kStep)
      memcpy(&two, x, 4);
    else
      two = x->bits;
    return _mm512_set1_epi32((int)two);
  }
  // Two rows of w to pairs of one output each, sixteen outputs a register.
  static inline void cross(const T* w, int64_t stride, int left, int64_t outputs, Reg* out) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const bool whole = outputs >= 32;
    const __m512i a = whole ? load(w) : load(w, outputs);
    const __m512i b = left < kStep ? none() : whole ? load(w + stride) : load(w + stride, outputs);
    out[0] = _mm512_permutex2var_epi16(a, low, b);
    out[1] = _mm512_permutex2var_epi16(a, high, b);
  }
};

const Kernels table = {"avx512_bf16",
                       true,
                       split_row,
                       {dense_product<Pairs512, Pairs512>, dense_product<Floats512<float>, Floats512<float>>},
                       {bitmask_product<Bf16Sums, BF16>, bitmask_product<Fp32Sums, float>},
                       {block_product<Bf16Sums, BF16>, block_product<Fp32Sums, float>},
                       expand_rows<Expansion, uint16_t>,
                       expand_rows<Expansion, uint32_t>,
                       {coded_product<CodedBf16, BF16>, coded_product<CodedFp32, float>},
                       {coded_expand<BF16>, coded_expand<float>},
                       {block_panels<PairBlocks512>(), block_panels<FloatBlocks512<float>>()},
                       {coded_blocks_product<BF16>, coded_blocks_product<float>},
                       split_blocks_product,
                       byte_kernels};

const GroupedKernels grouped = {{stage_columns<Pairs512>, stage_columns<Floats512<float>>},
                                {hidden_rows<BF16>, hidden_rows<float>},
                                {outer_rows<Pairs512>, outer_rows<Floats512<float>>}};

struct InPairs512 {
  static inline __m512 pairs(__m512 sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, pumice::pairs(w), pumice::pairs(x)); }
};

// Two columns of transposed x, interleaved to pairs; the order of the rows that comes of it is undone at the end.
struct ManyPairs512 {
  typedef BF16 T;
  typedef BF16 X;
  typedef __m512 Reg;
  static constexpr int kWidth = 32, kRegs = 2, kTogether = 4;

  static Reg get(const float* p) { return _mm512_loadu_ps(p); }
  static void put(float* p, Reg r) { _mm512_storeu_ps(p, r); }
  static int place(int row) { return row % 8 / 4 * 16 + row / 8 * 4 + row % 4; }
  static void fetch(const T* v, const uint8_t* c) { fetch_tiles(v, c); }
  static void step(Reg* acc, const T* pair, const T* x0, const T* x1) {
    int two;
    memcpy(&two, pair, 4);
    const __m512bh w = pumice::pairs(_mm512_set1_epi32(two));
    const __m512i a = _mm512_loadu_si512(x0), b = _mm512_loadu_si512(x1);
    acc[0] = _mm512_dpbf16_ps(acc[0], w, pumice::pairs(_mm512_unpacklo_epi16(a, b)));
    acc[1] = _mm512_dpbf16_ps(acc[1], w, pumice::pairs(_mm512_unpackhi_epi16(a, b)));
  }
};

struct ManyPairs256 {
  typedef BF16 T;
  typedef BF16 X;
  typedef __m256 Reg;
  static constexpr int kWidth = 16, kRegs = 2, kTogether = 4;

  static Reg get(const float* p) { return _mm256_loadu_ps(p); }
  static void put(float* p, Reg r) { _mm256_storeu_ps(p, r); }
  static int place(int row) { return row % 8 / 4 * 8 + row / 8 * 4 + row % 4; }
  static void fetch(const T* v, const uint8_t* c) { fetch_tiles(v, c); }
  static void step(Reg* acc, const T* pair, const T* x0, const T* x1) {
    int two;
    memcpy(&two, pair, 4);
    const __m256bh w = (__m256bh)_mm256_set1_epi32(two);
    const __m256i a = _mm256_loadu_si256((const __m256i*)x0), b = _mm256_loadu_si256((const __m256i*)x1);
    acc[0] = _mm256_dpbf16_ps(acc[0], w, (__m256bh)_mm256_unpacklo_epi16(a, b));
    acc[1] = _mm256_dpbf16_ps(acc[1], w, (__m256bh)_mm256_unpackhi_epi16(a, b));
  }
};

typedef ManyFloats512<float> ManyFp32;
const TileKernels tiles = {
    {{4, few_product<FewWords512<InPairs512, 4>>, false, {16, 32}, {many_product<ManyPairs256>, many_product<ManyPairs512>},
      false},
     {1, few_product<FewFloats512>, false, {16, 16}, {many_product<ManyFp32>, many_product<ManyFp32>}, false}}};

// Heads of 32, 64, 96 or 128 numbers; queries and keys are multiplied in pairs.
struct PairsHead {
  static constexpr int64_t kMost = 128;

  template <class T, int N>
  static void scores(const BF16* q, const BF16* keys, int64_t head, int64_t length, float scale, float* scores) {
    if (head % 32 || head > kMost) return AnyHead::scores<T, N>(q, keys, head, length, scale, scores);
    const __m128 factor = _mm_set1_ps(scale);
    for (int64_t t = 0; t < length; t += 4) {
      __m512 acc[N][4];
      const BF16* key[4];
      PUMICE_UNROLL
      for (int k = 0; k < 4; ++k) {
        key[k] = keys + (t + k < length ? t + k : length - 1) * head;
        PUMICE_UNROLL
        for (int n = 0; n < N; ++n) acc[n][k] = _mm512_setzero_ps();
      }
      for (int64_t i = 0; i < head; i += 32) {
        __m512bh query[N];
        PUMICE_UNROLL
        for (int n = 0; n < N; ++n) query[n] = pairs(_mm512_loadu_si512(q + n * head + i));
        PUMICE_UNROLL
        for (int k = 0; k < 4; ++k) {
          const __m512bh v = pairs(_mm512_loadu_si512(key[k] + i));
          PUMICE_UNROLL
          for (int n = 0; n < N; ++n) acc[n][k] = _mm512_dpbf16_ps(acc[n][k], query[n], v);
        }
      }
      const __mmask8 inside = length - t >= 4 ? 15 : (__mmask8)((1u << (length - t)) - 1);
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) {
        alignas(16) float four[4];
        Sums512::four(acc[n], four);
        _mm_mask_storeu_ps(scores + n * length + t, inside, _mm_mul_ps(factor, _mm_load_ps(four)));
      }
    }
  }

  template <class T, int N>
  static void mix(const float* shares, const BF16* values, int64_t head, int64_t length, BF16* out) {
    if (head % 32 || head > kMost) return AnyHead::mix<T, N>(shares, values, head, length, out);
    for (int64_t i = 0; i < head; i += 32) {
      __m512 acc[N][2];
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[n][0] = acc[n][1] = _mm512_setzero_ps();
      for (int64_t t = 0; t < length; ++t) {
        // Even numbers and odd ones: both are a single operation away from fp32.
        const __m512i both = _mm512_loadu_si512(values + t * head + i);
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
        PUMICE_UNROLL
        for (int n = 0; n < N; ++n) {
          const __m512 share = _mm512_set1_ps(shares[n * length + t]);
          acc[n][0] = _mm512_fmadd_ps(share, even, acc[n][0]);
          acc[n][1] = _mm512_fmadd_ps(share, odd, acc[n][1]);
        }
      }
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(acc[n][0]));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(acc[n][1]));
        _mm512_storeu_si512(out + n * head + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
  }
};

const ConvKernels convolutions = {
    {{pair_product, lay_out_spread<Halves32>, 32, kPairPositions, 2},
     {conv_product<Conv512, float>, lay_out_spread<Floats16>, 16, kPositions, 4}},
    {{pair_bundles, lay_out_spread<Halves32>, 32, kMostPositions, 2},
     {bundle_product<Conv512, float>, lay_out_spread<Floats16>, 32, kMostPositions, 4}}};

const DecoderKernels decoder_pieces[] = {pieces_of<PairsHead, BF16>(), pieces_of<AnyHead, float>()};

}  // namespace

const Kernels* avx512_bf16_kernels() { return &table; }
const GroupedKernels* avx512_bf16_grouped() { return &grouped; }
const TileKernels* avx512_bf16_tiles() { return &tiles; }
const DecoderKernels* avx512_bf16_decoder() { return decoder_pieces; }
const ConvKernels* avx512_bf16_conv() { return &convolutions; }
const LaneKernels* avx512_bf16_lanes() { return &lane_kernels; }

}  // namespace pumice

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

#include "conv.h"
#include "decoder.h"
#include "grouped.h"
#include "lanes.h"
#include "tiles.h"

namespace pumice {
const Kernels* avx512_bf16_kernels() { return nullptr; }
const GroupedKernels* avx512_bf16_grouped() { return nullptr; }
const TileKernels* avx512_bf16_tiles() { return nullptr; }
const DecoderKernels* avx512_bf16_decoder() { return nullptr; }
const ConvKernels* avx512_bf16_conv() { return nullptr; }
const LaneKernels* avx512_bf16_lanes() { return nullptr; }
}  // namespace pumice

#endif
