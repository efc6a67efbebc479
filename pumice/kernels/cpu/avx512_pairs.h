// Convolutions of bf16 with scattered nonzeros, multiplied in pairs: two nonzeros of an output, and with them two rows of x,
// whose numbers are brought side by side in registers. Included by the translation unit with bf16 products.
#pragma once

#include "avx512_conv.h"

namespace pumice {
namespace {

constexpr int64_t kPairPositions = 128;

// Sums of 32 positions lie in two registers as unpacking brings them: the first four of each eight, then the others.
struct PairSums {
  __m512 low, high;

  // 32 numbers, in the order of positions.
  void add(__m512i numbers) {
    const __m512i none = _mm512_setzero_si512();
    low = _mm512_add_ps(low, _mm512_castsi512_ps(_mm512_unpacklo_epi16(none, numbers)));
    high = _mm512_add_ps(high, _mm512_castsi512_ps(_mm512_unpackhi_epi16(none, numbers)));
  }
};

inline __m512i interleaved(PairSums s, __m512 least, __m512 most) {
  const __m512i order = _mm512_set_epi16(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8, 23, 22, 21, 20, 7, 6, 5, 4,
                                         19, 18, 17, 16, 3, 2, 1, 0);
  const __m512 low = _mm512_min_ps(most, _mm512_max_ps(least, s.low));
  const __m512 high = _mm512_min_ps(most, _mm512_max_ps(least, s.high));
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

inline __mmask32 first32(int64_t n) { return n >= 32 ? ~(__mmask32)0 : n > 0 ? ((__mmask32)1 << n) - 1 : 0; }

template <>
struct Row<Conv512, BF16, BF16> {
  static inline void put(const BF16* from, int64_t stride, int64_t begin, int64_t end, int64_t width, BF16* to) {
    if (stride > 2) {
      for (int64_t k = 0; k < width; ++k) to[k] = k >= begin && k < end ? from[k * stride] : BF16{};
      return;
    }
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20,
                                          18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    for (int64_t k = 0; k < width; k += 32) {
      const __mmask32 inside = first32(end - k) & ~first32(begin - k);
      if (stride == 1) {
        _mm512_storeu_si512(to + k, _mm512_maskz_loadu_epi16(inside, from + k));
      } else {
        const __m512i a = _mm512_maskz_loadu_epi16(_pdep_u32(inside & 0xffff, 0x55555555), from + 2 * k);
        const __m512i b = _mm512_maskz_loadu_epi16(_pdep_u32(inside >> 16, 0x55555555), from + 2 * k + 32);
        _mm512_storeu_si512(to + k, _mm512_permutex2var_epi16(a, even, b));
      }
    }
  }
};

struct Halves32 {
  typedef BF16 T;
  typedef __mmask32 Mask;
  static constexpr int64_t kLanes = 32;
  static __m512i get(const BF16* p, int n) { return _mm512_maskz_loadu_epi16(first32(n), p); }
  static __m512i spread(Mask m, __m512i v) { return _mm512_maskz_expand_epi16(m, v); }
  static void put(BF16* p, __m512i v) { _mm512_storeu_si512(p, v); }
};

// As fill_panel of conv_kernel.h, 32 N positions of which have room.
template <int N>
inline void fill_pair_panel(const Convolved& job, const BF16* image, int64_t first, int64_t last, int64_t q, int64_t n,
                            BF16* panel) {
  each_column(job, image, first, last, q, [&](const BF16* from) {
    fetch_far(from + kPairPositions, kPairPositions);
    PUMICE_UNROLL
    for (int r = 0; r < N; ++r)
      _mm512_storeu_si512(panel + 32 * r, _mm512_maskz_loadu_epi16(first32(n - 32 * r), from + 32 * r));
    panel += kPairPositions;
  });
}

// As walk_part of conv_kernel.h.
template <int N, bool kFirst>
PUMICE_APART void walk_pairs(const Taps& w, int64_t part, int64_t begin, int64_t end, const BF16* panel, float* sums,
                             const BF16* y, const BF16* add, int64_t plane) {
  const int32_t* start = w.starts + part * (w.O + 1) + begin;
  const int32_t* order = w.order + part * w.O;
  const BF16* value = (const BF16*)w.values + *start;
  const uint16_t* offset = w.offsets + *start;
  const float* bias = w.bias;
  sums -= begin * kPairPositions;
  for (int64_t at = begin; at < end; ++at, ++start) {
    const int64_t o = order[at];
    float* sum = sums + o * kPairPositions;
    if (y) fetch_far(y + (o - begin) * plane, 32 * N);
    if (add) fetch_far(add + (o - begin) * plane, 32 * N);
    __m512 acc[2 * N];
    if (kFirst) {
      const __m512 first = _mm512_set1_ps(bias ? bias[o] : 0.0f);
      PUMICE_UNROLL
      for (int r = 0; r < 2 * N; ++r) acc[r] = first;
    } else {
      PUMICE_UNROLL
      for (int r = 0; r < 2 * N; ++r) acc[r] = _mm512_loadu_ps(sum + 16 * r);
    }
    int32_t left = start[1] - start[0];
    for (; left > 1; left -= 2, value += 2, offset += 2) {
      const __m512bh v = pairs(_mm512_set1_epi32(pair_at<true>(value)));
      const BF16* a = panel + 2 * (int64_t)offset[0];
      const BF16* b = panel + 2 * (int64_t)offset[1];
      static_assert(kPairPositions == 2 * kColumn, "offsets are half of the panel's");
      PUMICE_UNROLL
      for (int r = 0; r < N; ++r) {
        const __m512i one = _mm512_loadu_si512(a + 32 * r), two = _mm512_loadu_si512(b + 32 * r);
        acc[2 * r] = _mm512_dpbf16_ps(acc[2 * r], v, pairs(_mm512_unpacklo_epi16(one, two)));
        acc[2 * r + 1] = _mm512_dpbf16_ps(acc[2 * r + 1], v, pairs(_mm512_unpackhi_epi16(one, two)));
      }
    }
    if (left) {
      const __m512bh v = pairs(_mm512_set1_epi32(value->bits));
      const BF16* a = panel + 2 * (int64_t)*offset;
      PUMICE_UNROLL
      for (int r = 0; r < N; ++r) {
        const __m512i one = _mm512_loadu_si512(a + 32 * r), none = _mm512_setzero_si512();
        acc[2 * r] = _mm512_dpbf16_ps(acc[2 * r], v, pairs(_mm512_unpacklo_epi16(one, none)));
        acc[2 * r + 1] = _mm512_dpbf16_ps(acc[2 * r + 1], v, pairs(_mm512_unpackhi_epi16(one, none)));
      }
      ++value, ++offset;
    }
    PUMICE_UNROLL
    for (int r = 0; r < 2 * N; ++r) _mm512_storeu_ps(sum + 16 * r, acc[r]);
  }
}

template <int N>
inline void pair_block(const Convolved& job, int64_t image, int64_t q, int64_t n, int64_t begin, int64_t end, BF16* panel,
                       float* sums) {
  const Taps& w = *job.w;
  const Conv& conv = *job.conv;
  const BF16* x = (const BF16*)job.planes;
  const int64_t columns = conv.out[1], plane = conv.out[0] * columns;
  BF16* y = (BF16*)job.y + (image * w.O + begin) * plane;
  const BF16* add = conv.add ? (const BF16*)conv.add + (image * w.O + begin) * plane : nullptr;
  const int64_t written = q / job.width * columns + q % job.width;
  for (int64_t p = 0, parts = part_count(w); p < parts; ++p) {
    const int64_t first = p * w.part, last = first + w.part < w.I ? first + w.part : w.I;
    fill_pair_panel<N>(job, x, first, last, q, n, panel);
    const bool ends = p + 1 == parts;
    const BF16 *next = ends ? y + written : nullptr, *added = ends && add ? add + written : nullptr;
    if (p == 0)
      walk_pairs<N, true>(w, p, begin, end, panel, sums, next, added, plane);
    else
      walk_pairs<N, false>(w, p, begin, end, panel, sums, next, added, plane);
  }
  const __m512 least = _mm512_set1_ps(conv.least), most = _mm512_set1_ps(conv.most);
  alignas(64) BF16 given[32 * N] = {};
  const Runs runs(job, q, n);
  for (int64_t o = begin; o < end; ++o, sums += kPairPositions, y += plane, add += add ? plane : 0) {
    PairSums each[N];
    PUMICE_UNROLL
    for (int r = 0; r < N; ++r) each[r] = {_mm512_loadu_ps(sums + 32 * r), _mm512_loadu_ps(sums + 32 * r + 16)};
    if (add) {
      const bool straight = job.width == columns;
      if (!straight)
        for (const Runs::Run& run : runs) memcpy(given + run.k, add + run.at, (size_t)run.there * sizeof(BF16));
      PUMICE_UNROLL
      for (int r = 0; r < N; ++r)
        each[r].add(_mm512_maskz_loadu_epi16(first32(n - 32 * r), (straight ? add + q : given) + 32 * r));
    }
    if (job.width == columns) {
      PUMICE_UNROLL
      for (int r = 0; r < N; ++r)
        _mm512_mask_storeu_epi16(y + q + 32 * r, first32(n - 32 * r), interleaved(each[r], least, most));
      continue;
    }
    alignas(64) BF16 done[32 * N];
    PUMICE_UNROLL
    for (int r = 0; r < N; ++r) _mm512_store_si512(done + 32 * r, interleaved(each[r], least, most));
    for (const Runs::Run& run : runs) memcpy(y + run.at, done + run.k, (size_t)run.there * sizeof(BF16));
  }
}

void pair_product(const Convolved& job, int64_t block, int64_t begin, int64_t end, void* room, float* sums) {
  BF16* panel = (BF16*)room;
  const int64_t image = block / job.blocks, k = block % job.blocks, q = block_begin(job, k);
  const int64_t n = block_end(job, k) - q;
  switch ((n + 31) / 32) {
    case 4: return pair_block<4>(job, image, q, n, begin, end, panel, sums);
    case 3: return pair_block<3>(job, image, q, n, begin, end, panel, sums);
    case 2: return pair_block<2>(job, image, q, n, begin, end, panel, sums);
    default: return pair_block<1>(job, image, q, n, begin, end, panel, sums);
  }
}

// A bundle at 32 positions, with every number of x in a pair of columns.
PUMICE_APART void pair_strip(const Convolved& job, int64_t image, const Strip& strip, int64_t bundle) {
  const Bundles& w = *job.bundles;
  const Conv& conv = *job.conv;
  const BF16* x = (const BF16*)job.planes + strip.q;
  const __mmask32 inside = first32(strip.n);
  PairSums sums[kBundle];
  PUMICE_UNROLL
  for (int o = 0; o < kBundle; ++o) {
    const int64_t output = bundle * kBundle + o;
    sums[o].low = sums[o].high = _mm512_set1_ps(w.bias && output < w.O ? w.bias[output] : 0.0f);
  }
  const int64_t first = w.starts[bundle], last = w.starts[bundle + 1];
  const BF16* value = (const BF16*)w.values + first * kBundle * 2;
  auto column = [&](uint32_t code) {
    return _mm512_maskz_loadu_epi16(inside, column_of(job, x, code));
  };
  auto multiply = [&](__m512i one, __m512i two) {
    const __m512bh low = pairs(_mm512_unpacklo_epi16(one, two)), high = pairs(_mm512_unpackhi_epi16(one, two));
    PUMICE_UNROLL
    for (int o = 0; o < kBundle; ++o) {
      const __m512bh v = pairs(_mm512_set1_epi32(pair_at<true>(value + 2 * o)));
      sums[o].low = _mm512_dpbf16_ps(sums[o].low, v, low);
      sums[o].high = _mm512_dpbf16_ps(sums[o].high, v, high);
    }
    value += 2 * kBundle;
  };
  const bool odd = last > first && w.codes[2 * last - 1] == kNoColumn;
  for (int64_t s = first; s < last - odd; ++s) multiply(column(w.codes[2 * s]), column(w.codes[2 * s + 1]));
  if (odd) multiply(column(w.codes[2 * last - 2]), _mm512_setzero_si512());

  const __mmask32 outputs = strip.outputs;
  const __mmask32 count = first32(__builtin_popcount(outputs));
  const bool in_order = outputs == count;  // nothing is to be dropped in between, which takes longer than to store
  const int64_t plane = conv.out[0] * conv.out[1];
  const __m512 least = _mm512_set1_ps(conv.least), most = _mm512_set1_ps(conv.most);
  PUMICE_UNROLL
  for (int o = 0; o < kBundle; ++o) {
    const int64_t output = bundle * kBundle + o;
    if (output >= w.O) break;
    const int64_t at = (image * w.O + output) * plane + strip.place;
    PairSums sum = sums[o];
    if (conv.add) {
      const __m512i given = _mm512_maskz_loadu_epi16(count, (const BF16*)conv.add + at);
      sum.add(in_order ? given : _mm512_maskz_expand_epi16(outputs, given));
    }
    const __m512i done = interleaved(sum, least, most);
    _mm512_mask_storeu_epi16((BF16*)job.y + at, count, in_order ? done : _mm512_maskz_compress_epi16(outputs, done));
  }
}

void pair_bundles(const Convolved& job, int64_t block, int64_t begin, int64_t end, void*, float*) {
  each_strip<BF16, BF16, 32>(job, block, begin, end, [&](int64_t image, const Strip& strip, int64_t b) {
    pair_strip(job, image, strip, b);
  });
}

}  // namespace
}  // namespace pumice
