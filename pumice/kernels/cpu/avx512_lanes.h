// Four-bit integers in lanes (lanes.h), by products of unsigned and signed bytes in fours.
// Included by the translation unit after it has set its target.
#pragma once

#include "lanes.h"

namespace pumice {
namespace {

inline __m512 lane_floats(const BF16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}

void fill_lanes(const Lanes& w, const BF16* x, uint8_t* words, float* unit) {
  const Unit found = unit_of(x, w.I, 32767.0f);
  *unit = found.unit;
  const __m512 scale = _mm512_set1_ps(found.inverse);
  const int64_t tile = kLaneGroups * w.group;
  for (int64_t i = 0; i < w.I; i += 16) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(lane_floats(x + i), scale));
    const __m512i moved = _mm512_add_epi32(q, _mm512_set1_epi32(32768));
    alignas(16) uint32_t high[4], low[4];
    _mm_store_si128((__m128i*)high, _mm512_cvtepi32_epi8(_mm512_srli_epi32(moved, 8)));
    _mm_store_si128((__m128i*)low, _mm512_cvtepi32_epi8(moved));
    const int64_t group = i % tile / w.group, word = i % w.group / 4;
    uint32_t* to = (uint32_t*)(words + i / tile * tile * 2) + word * 2 * kLaneGroups + group;
    for (int k = 0; k < 4; ++k) to[k * 2 * kLaneGroups] = high[k], to[(k * 2 + 1) * kLaneGroups] = low[k];
  }
}

inline void put_lanes(__m512 v, __mmask16 inside, BF16* y) {
  _mm256_mask_storeu_epi16(y, inside, (__m256i)_mm512_cvtneps_pbh(v));
}

template <int C>
struct LaneStep {
  static constexpr int kWords = C / 4;

  // Sixteen times the weights of a step: four columns of sixteen rows in each register.
  static inline void weights(const uint8_t* codes, __m512i* out) {
    const __m512i upper = _mm512_set1_epi8((char)0xf0);
    PUMICE_UNROLL
    for (int j = 0; j < C / 8; ++j) {
      const __m512i v = _mm512_loadu_si512(codes + 64 * j);
      out[j] = _mm512_and_si512(_mm512_slli_epi16(v, 4), upper);
      out[j + C / 8] = _mm512_and_si512(v, upper);
    }
  }

  static inline void fetch(const uint8_t* codes, const BF16* scales) {
    PUMICE_UNROLL
    for (int j = 0; j < C / 8; ++j) _mm_prefetch((const char*)codes + 64 * j + kAhead, _MM_HINT_T0);
    _mm_prefetch((const char*)scales + kAhead / 4, _MM_HINT_T0);
  }

  static inline __m512 add(__m512 sum, __m512i high, __m512i low, __m512 scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low)), scale, sum);
  }
};

// Sums of sixteen rows to y: without what moving x up has added, in the unit of x.
inline void store_lanes(const Lanes& w, int64_t o, int64_t count, __m512 sum, float unit, BF16* y) {
  const __mmask16 inside = count >= 16 ? (__mmask16)0xffff : (__mmask16)((1u << count) - 1);
  const __m512 own = _mm512_maskz_loadu_ps(inside, w.sums + o);
  sum = _mm512_mul_ps(_mm512_fnmadd_ps(own, _mm512_set1_ps(16.0f * 32768.0f), sum), _mm512_set1_ps(unit / 16.0f));
  if (w.bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(inside, w.bias + o));
  put_lanes(sum, inside, y + o);
}

// Every group is stored: x is the same word for all rows.
template <int C, int N>
void whole_lanes(const Lanes& w, int64_t begin, int64_t end, const LaneInput& x, BF16* y) {
  typedef LaneStep<C> Step;
  const int64_t groups = w.I / C, stride = lane_input_bytes(w);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const uint8_t* codes = w.codes + chunk * groups * 8 * C;
    const BF16* scales = w.scales + chunk * groups * kLaneRows;
    __m512 acc[N];
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n) acc[n] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, codes += 8 * C, scales += kLaneRows) {
      Step::fetch(codes, scales);
      __m512i v[Step::kWords];
      Step::weights(codes, v);
      const __m512 scale = lane_floats(scales);
      const uint8_t* xs = x.words + g / kLaneGroups * (kLaneGroups * C * 2) + g % kLaneGroups * 4;
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n) {
        __m512i high = _mm512_setzero_si512(), low = high;
        PUMICE_UNROLL
        for (int k = 0; k < Step::kWords; ++k) {
          int32_t a, b;
          memcpy(&a, xs + n * stride + k * 128, 4), memcpy(&b, xs + n * stride + k * 128 + 64, 4);
          high = _mm512_dpbusd_epi32(high, _mm512_set1_epi32(a), v[k]);
          low = _mm512_dpbusd_epi32(low, _mm512_set1_epi32(b), v[k]);
        }
        acc[n] = Step::add(acc[n], high, low, scale);
      }
    }
    PUMICE_UNROLL
    for (int n = 0; n < N; ++n)
      store_lanes(w, chunk * kLaneRows, w.O - chunk * kLaneRows, acc[n], x.unit[n], y + n * w.O);
  }
}

// Some groups are missing: each row looks its words of x up among those of the tile.
template <int C, int N>
void some_lanes(const Lanes& w, int64_t begin, int64_t end, const LaneInput& x, BF16* y) {
  typedef LaneStep<C> Step;
  constexpr int K = Step::kWords;
  const int64_t tiles = lane_tiles(w), slices = w.height / kLaneRows, stride = lane_input_bytes(w);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    alignas(64) float sums[N][256] = {};  // whatever a byte of the order says stays inside
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t at = chunk * tiles + t;
      const uint8_t *codes = w.codes + w.starts[at] * 8 * C, *which = w.groups + w.starts[at] * 8;
      const BF16* scales = w.scales + w.starts[at] * kLaneRows;
      const uint8_t* row = w.order + at * w.height;
      const uint8_t* xs = x.words + t * (kLaneGroups * C * 2);
      __m512i high_words[N][K], low_words[N][K];
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n)
        PUMICE_UNROLL
        for (int k = 0; k < K; ++k) {
          high_words[n][k] = _mm512_loadu_si512(xs + n * stride + k * 128);
          low_words[n][k] = _mm512_loadu_si512(xs + n * stride + k * 128 + 64);
        }
      for (int64_t s = 0; s < slices; ++s, row += kLaneRows) {
        const int64_t steps = w.steps[at * slices + s];
        if (!steps) break;  // the rows with most groups come first
        __m512 acc[N];
        PUMICE_UNROLL
        for (int n = 0; n < N; ++n) acc[n] = _mm512_setzero_ps();
        for (int64_t i = 0; i < steps; ++i, codes += 8 * C, scales += kLaneRows, which += 8) {
          Step::fetch(codes, scales);
          _mm_prefetch((const char*)which + kAhead / 8, _MM_HINT_T0);
          const __m128i both = _mm_loadl_epi64((const __m128i*)which);
          // The look-up reads four bits of its index, so that the other half of the byte does no harm.
          const __m512i index = _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(both, _mm_srli_epi16(both, 4)));
          __m512i v[K];
          Step::weights(codes, v);
          const __m512 scale = lane_floats(scales);
          PUMICE_UNROLL
          for (int n = 0; n < N; ++n) {
            __m512i high = _mm512_setzero_si512(), low = high;
            PUMICE_UNROLL
            for (int k = 0; k < K; ++k) {
              high = _mm512_dpbusd_epi32(high, _mm512_permutexvar_epi32(index, high_words[n][k]), v[k]);
              low = _mm512_dpbusd_epi32(low, _mm512_permutexvar_epi32(index, low_words[n][k]), v[k]);
            }
            acc[n] = Step::add(acc[n], high, low, scale);
          }
        }
        PUMICE_UNROLL
        for (int n = 0; n < N; ++n) {
          alignas(64) float part[kLaneRows];
          _mm512_store_ps(part, acc[n]);
          for (int l = 0; l < kLaneRows; ++l) sums[n][row[l]] += part[l];
        }
      }
    }
    const int64_t first = chunk * w.height;
    for (int64_t o = first; o < first + w.height && o < w.O; o += kLaneRows)
      PUMICE_UNROLL
      for (int n = 0; n < N; ++n)
        store_lanes(w, o, w.O - o, _mm512_load_ps(sums[n] + (o - first)), x.unit[n], y + n * w.O);
  }
}

template <int C, int N>
inline void lanes_up_to(const Lanes& w, int64_t begin, int64_t end, const LaneInput& x, BF16* y) {
  if constexpr (N > 0) {
    if (x.rows < N) return lanes_up_to<C, N - 1>(w, begin, end, x, y);
    all_stored(w) ? whole_lanes<C, N>(w, begin, end, x, y) : some_lanes<C, N>(w, begin, end, x, y);
  }
}

void lanes_product(const Lanes& w, int64_t begin, int64_t end, const LaneInput& x, BF16* y) {
  if (w.group == 16)
    lanes_up_to<16, kLanesAtOnce>(w, begin, end, x, y);
  else
    lanes_up_to<32, kLanesAtOnce>(w, begin, end, x, y);
}

// The group of row l of a step, as it was before it was rounded to integers.
inline void expand_group(const Lanes& w, int64_t step, int64_t l, BF16* to) {
  const uint8_t* codes = w.codes + step * 8 * w.group + 4 * l;
  const __m512 scale = _mm512_set1_ps(widen(w.scales[step * kLaneRows + l]));
  const int64_t words = w.group / 8;
  for (int64_t j = 0; j < words; j += 2) {
    uint32_t two[2];
    memcpy(two, codes + 64 * j, 4), memcpy(two + 1, codes + 64 * (j + 1), 4);
    const __m128i v = _mm_setr_epi32((int)two[0], (int)two[1], (int)two[0], (int)two[1]);
    const __m512i wide = _mm512_cvtepi8_epi32(v);  // columns of the lower halves, then the same bytes for the upper ones
    const __m512i k = _mm512_srai_epi32(_mm512_mask_slli_epi32(_mm512_slli_epi32(wide, 24), 0xff, wide, 28), 28);
    // Zero times a negative scale is a negative zero, which no sparse layout keeps.
    const __m512 f = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(k), scale), _mm512_setzero_ps());
    put_lanes(f, 0x00ff, to + 4 * j);
    put_lanes(_mm512_castsi512_ps(_mm512_shuffle_i64x2(_mm512_castps_si512(f), _mm512_castps_si512(f), 0xee)), 0x00ff,
              to + w.group / 2 + 4 * j);
  }
}

void lanes_expand(const Lanes& w, int64_t begin, int64_t end, BF16* to) {
  const int64_t groups = w.I / w.group, tiles = lane_tiles(w), slices = w.height / kLaneRows;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * w.height, rows = w.O - first < w.height ? w.O - first : w.height;
    BF16* out = to + (chunk - begin) * w.height * w.I;
    if (all_stored(w)) {
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t l = 0; l < rows; ++l) expand_group(w, chunk * groups + g, l, out + l * w.I + g * w.group);
      continue;
    }
    if (rows > 0 && w.I > 0) memset(out, 0, (size_t)(rows * w.I) * sizeof(BF16));
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t at = chunk * tiles + t;
      int64_t step = w.starts[at];
      for (int64_t s = 0; s < slices; ++s)
        for (int64_t i = 0; i < w.steps[at * slices + s]; ++i, ++step)
          for (int64_t l = 0; l < kLaneRows; ++l) {
            const int64_t row = w.order[at * w.height + s * kLaneRows + l];
            const uint8_t byte = w.groups[step * 8 + l % 8];
            const int64_t g = t * kLaneGroups + (l < 8 ? byte & 15 : byte >> 4);
            // What only fills up stands for no group: its scale is zero, and so is none that is stored.
            if (widen(w.scales[step * kLaneRows + l]) != 0 && row < rows)
              expand_group(w, step, l, out + row * w.I + g * w.group);
          }
    }
  }
}

const LaneKernels lane_kernels = {fill_lanes, lanes_product, lanes_expand};

}  // namespace
}  // namespace pumice
