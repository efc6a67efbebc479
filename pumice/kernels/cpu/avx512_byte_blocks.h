// Blocks of int8 times many rows of x, as bytes in fours (AVX-512 VNNI): twice the products of bf16 pairs in an instruction.
//
// A word of the panel has four columns of a row of bytes, moved up by 128 so that they have no sign; what that adds is 128
// times a row's sum of weights, which is known. With two bytes a number (for whoever wants x unrounded) a row of x is two rows
// of the panel, with one byte (where x may be rounded) it is one.
// Included by the translation unit after it has set its target and after avx512_bytes.h.
#pragma once

#include "avx512_blocks.h"

namespace pumice {
namespace {

template <class X>
void round_to_bytes(const void* from, int64_t I, int64_t begin, int64_t end, const ByteRows& rows) {
  for (int64_t row = begin; row < end; ++row) {
    const X* x = (const X*)from + row * I;
    const Unit unit = unit_of(x, I, rows.each == 2 ? (float)ByteRow::kTop : 127.0f);
    rows.unit[row] = unit.unit;
    const __m512 scale = _mm512_set1_ps(unit.inverse);
    int8_t* high = rows.bytes + row * rows.each * rows.stride;
    for (int64_t i = 0; i < rows.stride; i += 16) {
      const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load16(first16(I - i), x + i), scale));
      if (rows.each == 2)
        put_bytes(q, high + i, high + rows.stride + i);
      else
        _mm_storeu_si128((__m128i*)(high + i), _mm512_cvtepi32_epi8(q));
    }
  }
}

template <class Value>
struct ByteBlocks512 : Blocks512<Value> {
  typedef int8_t T;
  typedef Value Y;
  typedef __m512i Reg;
  static constexpr int64_t kColumns = 4, kWords = 1;

  static Reg zero() { return _mm512_setzero_si512(); }
  static void put(float* p, Reg r, bool add) { _mm512_storeu_si512(p, add ? _mm512_add_epi32(_mm512_loadu_si512(p), r) : r); }

  template <int M, int N, bool kWhole>
  static inline void step(Reg (*acc)[N], const T* p, int64_t c, const uint32_t* x, int64_t) {
    __m512i v[N];
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) v[n] = _mm512_loadu_si512(x + 16 * n);
    PUMICE_UNROLL
    for (int m = 0; m < M; ++m) {
      const __m512i w = _mm512_set1_epi32(four_at<kWhole>(p + m * c, c % kColumns));
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) acc[m][n] = _mm512_dpbusd_epi32(acc[m][n], v[n], w);
    }
  }

  static void store(const Matrix& w, int64_t o, int64_t outputs, const float* sums, const Panel& x, int64_t row,
                    int64_t rows, Y* y) {
    const auto finish = [&w, &x, o, outputs, row](int64_t k, const __m512i* v, int64_t r, float(*out)[16]) {
      const __mmask16 inside = first16(outputs - k);
      const __m512i moved = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(inside, w.sums + o + k), 7);
      const __m512 scale = load16(inside, (const Y*)w.scales + o + k);
      const __m512 more = w.bias ? _mm512_maskz_loadu_ps(inside, w.bias + o + k) : _mm512_setzero_ps();
      const float* unit = x.unit + (row + r) / x.each;
      const int64_t count = (x.rows - row - r < 16 ? x.rows - row - r : 16) / x.each;
      for (int64_t i = 0; i < count; ++i) {
        __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(v[i * x.each], moved));
        if (x.each == 2)
          sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(_mm512_sub_epi32(v[2 * i + 1], moved)));
        const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(unit[i]));
        _mm512_store_ps(out[i], _mm512_fmadd_ps(sum, factor, more));
      }
    };
    store_by_turning(w, outputs, sums, x, rows, y, finish);
  }

  // `rows` rows of bytes from `bytes` on.
  static void fill(const Matrix& w, int64_t begin, int64_t end, const int8_t* bytes, int64_t stride, int64_t rows,
                   int64_t width, uint32_t* words) {
    const __m512i up = _mm512_set1_epi8((char)128);
    if (w.c % kColumns == 0 || w.c == w.I) {
      const auto load = [bytes, stride, up](int64_t row, int64_t word, __mmask16 inside) {
        return _mm512_xor_si512(up, _mm512_maskz_loadu_epi32(inside, bytes + row * stride + 4 * word));
      };
      return fill_by_turning(load, begin, end, rows, width, words);
    }
    const int64_t of_block = steps_of_block<ByteBlocks512>(w);
    for (int64_t s = begin; s < end; ++s) {
      const int64_t within = s % of_block * kColumns, left = w.c - within < kColumns ? w.c - within : kColumns;
      const int8_t* from = bytes + s / of_block * w.c + within;
      for (int64_t r = 0; r < width; ++r) words[s * width + r] = 0x80808080u ^ (r < rows ? word_of(from + r * stride, left) : 0);
    }
  }

  static uint32_t word_of(const int8_t* p, int64_t count) {
    uint32_t word = 0;
    memcpy(&word, p, (size_t)count);
    return word;
  }
};

template <class Isa>
void fill_bytes(const Matrix& w, int64_t begin, int64_t end, const void* x, const Panel& panel) {
  const ByteRows& rows = *(const ByteRows*)x;
  const int64_t size = panel_steps<Isa>(w) * panel.width;
  for (int64_t row = 0; row < panel.rows; row += panel.width) {
    const int64_t count = panel.rows - row < panel.width ? panel.rows - row : panel.width;
    Isa::fill(w, begin, end, rows.bytes + row * rows.stride, rows.stride, count, panel.width,
              panel.words + row / panel.width * size);
  }
}

void expand_bytes(const Matrix& w, int64_t begin, int64_t end, int8_t* out, void* scratch) {
  const int64_t bytes = (w.I + 7) / 8;
  for (int64_t o = begin; o < end; ++o, out += w.I) {
    const int8_t* p = row_values<int8_t>(w, o, scratch);
    for (int64_t i = 0; i < w.I; i += 64) {
      const uint64_t bits = mask_word(w.mask + o * bytes, i / 64, w.I);
      const __mmask64 inside = w.I - i >= 64 ? ~(__mmask64)0 : (1ull << (w.I - i)) - 1;
      _mm512_mask_storeu_epi8(out + i, inside, CodedBytes::expanded(bits, &p));
    }
  }
}

// Rows of a block that lie in 64 bytes, one to each C bytes, times a row of x: the sums of each row's lanes in all of its lanes.
template <int C>
inline __m512i sums_of_rows(__m512i v) {
  v = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, (_MM_PERM_ENUM)0x4e));
  v = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, (_MM_PERM_ENUM)0xb1));
  if (C >= 32) v = _mm512_add_epi32(v, _mm512_shuffle_i64x2(v, v, 0xb1));
  if (C >= 64) v = _mm512_add_epi32(v, _mm512_shuffle_i64x2(v, v, 0x4e));
  return v;
}

// C bytes as often as they fit a register, without their sign.
template <int C>
inline __m512i again(const uint8_t* p) {
  const __m512i v = C == 16   ? _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p))
                    : C == 32 ? _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p))
                              : _mm512_loadu_si512(p);
  return _mm512_xor_si512(v, _mm512_set1_epi8((char)128));
}

// y of one row of the matrix and one row of x from the sums of its higher and its lower bytes.
inline void store_split(const Matrix& w, int64_t o, int64_t row, int32_t high, int32_t low, float unit, void* y) {
  const int32_t moved = w.sums[o] * 128;
  float sum = ((float)(high - moved) * 256.0f + (float)(low - moved)) * unit * widen(((const BF16*)w.scales)[o]);
  store<BF16>(w, o, row, 1, &sum, y);
}

// 64 G bytes of each block of a block row, from `from` on, times N rows of x.
template <int C, int G, int N>
inline void split_chunks(const Matrix& w, int64_t br, int64_t from, const Input& x, int64_t row, void* y) {
  const uint8_t* high = (const uint8_t*)x.data + row * x.stride + ByteRow::kHigh;
  const int64_t low = ByteRow::padded(w.I);
  __m512i acc[G][N][2];
  PUMICE_UNROLL
  for (int g = 0; g < G; ++g)
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) acc[g][n][0] = acc[g][n][1] = _mm512_setzero_si512();
  const int64_t ahead = from == 0 && row == 0 ? blocks_ahead<int8_t>(w.r * w.c, kFarAhead) : 0;
  for (int64_t b = w.block_starts[br]; b < w.block_starts[br + 1]; ++b) {
    const int8_t* p = (const int8_t*)w.values + b * w.r * w.c + from;
    if (ahead) fetch_far(p + ahead, w.r * w.c);
    __m512i v[N][2];
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n)
      PUMICE_UNROLL
      for (int h = 0; h < 2; ++h) v[n][h] = again<C>(high + n * x.stride + h * low + w.columns[b] * C);
    PUMICE_UNROLL
    for (int g = 0; g < G; ++g) {
      const __m512i weights = _mm512_loadu_si512(p + 64 * g);
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n)
        PUMICE_UNROLL
        for (int h = 0; h < 2; ++h) acc[g][n][h] = _mm512_dpbusd_epi32(acc[g][n][h], v[n][h], weights);
    }
  }
  PUMICE_UNROLL
  for (int g = 0; g < G; ++g)
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) {
      alignas(64) int32_t sums[2][16];
      PUMICE_UNROLL
      for (int h = 0; h < 2; ++h) _mm512_store_si512(sums[h], sums_of_rows<C>(acc[g][n][h]));
      float unit;
      memcpy(&unit, (const uint8_t*)x.data + (row + n) * x.stride, 4);
      for (int k = 0; k < 64 / C; ++k)
        store_split(w, br * w.r + from / C + g * (64 / C) + k, row + n, sums[0][k * C / 4], sums[1][k * C / 4], unit, y);
    }
}

template <int C>
void split_blocks_of(const Matrix& w, int64_t begin, int64_t end, const Input& x, void* y) {
  for (int64_t br = begin; br < end; ++br)
    for (int64_t row = 0, n; row < x.rows; row += n) {
      n = x.rows - row >= 2 ? 2 : 1;
      for (int64_t from = 0, size = w.r * C, g; from < size; from += 64 * g) {
        const int64_t left = (size - from) / 64;
        g = n == 1 && left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (n == 2)
          (g == 4   ? split_chunks<C, 4, 2>
           : g == 2 ? split_chunks<C, 2, 2>
                    : split_chunks<C, 1, 2>)(w, br, from, x, row, y);
        else
          (g == 8   ? split_chunks<C, 8, 1>
           : g == 4 ? split_chunks<C, 4, 1>
           : g == 2 ? split_chunks<C, 2, 1>
                    : split_chunks<C, 1, 1>)(w, br, from, x, row, y);
      }
    }
}

// Few rows of x, split into bytes. Blocks whose rows do not fill registers are taken row by row.
void split_blocks_product(const Matrix& w, int64_t begin, int64_t end, const Input& x, void* y, void*) {
  if (w.r * w.c % 64 == 0 && w.c == 16) return split_blocks_of<16>(w, begin, end, x, y);
  if (w.r * w.c % 64 == 0 && w.c == 32) return split_blocks_of<32>(w, begin, end, x, y);
  if (w.c == 64) return split_blocks_of<64>(w, begin, end, x, y);
  const __m512i up = _mm512_set1_epi8((char)128);
  for (int64_t br = begin; br < end; ++br)
    for (int64_t i = 0; i < w.r; ++i)
      for (int64_t row = 0; row < x.rows; ++row) {
        const uint8_t* data = (const uint8_t*)x.data + row * x.stride;
        __m512i acc[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        for (int64_t b = w.block_starts[br]; b < w.block_starts[br + 1]; ++b) {
          const int8_t* p = (const int8_t*)w.values + (b * w.r + i) * w.c;
          const uint8_t* high = data + ByteRow::kHigh + w.columns[b] * w.c;
          for (int64_t k = 0; k < w.c; k += 64) {
            const __mmask64 inside = w.c - k >= 64 ? ~(__mmask64)0 : (1ull << (w.c - k)) - 1;
            const __m512i weights = _mm512_maskz_loadu_epi8(inside, p + k);
            PUMICE_UNROLL
            for (int h = 0; h < 2; ++h) {
              const __m512i v = _mm512_maskz_loadu_epi8(inside, high + h * ByteRow::padded(w.I) + k);
              acc[h] = _mm512_dpbusd_epi32(acc[h], _mm512_xor_si512(v, up), weights);
            }
          }
        }
        float unit;
        memcpy(&unit, data, 4);
        store_split(w, br * w.r + i, row, _mm512_reduce_add_epi32(acc[0]), _mm512_reduce_add_epi32(acc[1]), unit, y);
      }
}

template <class X>
constexpr BytePanels byte_panels() {
  typedef ByteBlocks512<X> Isa;
  return {{Isa::kLanes, Isa::kMost, Isa::kTall, Isa::kWidth, Isa::kColumns, Isa::kWords, fill_bytes<Isa>, panel_product<Isa>},
          expand_bytes, round_to_bytes<X>};
}

const BytePanels byte_kernels[] = {byte_panels<BF16>(), byte_panels<float>()};

}  // namespace
}  // namespace pumice
