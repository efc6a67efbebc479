// Convolutions with scattered nonzeros: the loops that every instruction set shares, over registers of `Isa::kLanes` numbers.
// Included after the translation unit has set its target.
#pragma once

#include "blocks_kernel.h"
#include "conv.h"

namespace pumice {
namespace {

constexpr int64_t kPositions = 64;       // of a block, where x is read in fp32
constexpr int64_t kMostPositions = 128;  // of any block

inline void copy(float from, float* to) { *to = from; }
inline void copy(BF16 from, float* to) { *to = widen(from); }
inline void copy(BF16 from, BF16* to) { *to = from; }

// A row of a phase: columns [begin, end) from every `stride`-th number of x, the others zeros. `from` is where x would have column 0.
template <class Isa, class From, class To>
struct Row {
  static inline void put(const From* from, int64_t stride, int64_t begin, int64_t end, int64_t width, To* to) {
    for (int64_t k = 0; k < begin; ++k) to[k] = To{};
    if (stride == 1)
      for (int64_t k = begin; k < end; ++k) copy(from[k], to + k);
    else
      for (int64_t k = begin; k < end; ++k) copy(from[k * stride], to + k);
    for (int64_t k = end; k < width; ++k) to[k] = To{};
  }
};

// In the order of addresses: a row may write behind its end.
template <class Isa, class From, class To>
void lay_out(const Planes& planes, const void* x, int64_t begin, int64_t end, void* out) {
  const Conv& conv = *planes.conv;
  for (int64_t c = 0; c < conv.C; ++c)
    for (int64_t p = 0; p < planes.phases; ++p) {
      const Phase& phase = planes.phase[p];
      const From* channel = (const From*)x + c * conv.H * conv.W - phase.shift;
      To* to = (To*)out + c * planes.channel + (p * planes.rows + begin) * planes.width;
      for (int64_t r = begin; r < end; ++r, to += planes.width) {
        const int64_t row = phase.row + r * conv.stride[0];
        const bool there = row >= 0 && row < conv.H;
        Row<Isa, From, To>::put(there ? channel + row * conv.W : channel, conv.stride[1], there ? phase.begin : 0,
                                there ? phase.end : 0, planes.width, to);
      }
    }
}

inline float clamped(float v, float least, float most) {
  v = v < least ? least : v;  // a NaN stays one
  return v > most ? most : v;
}

// Of the positions [q, q + n) those that are outputs, in runs: `there` of them from the k-th on, which are the outputs from `at`
// on. What stands between the last column of a row and the next row's first is left out.
template <class Put>
inline void each_run(const Convolved& job, int64_t q, int64_t n, const Put& put) {
  const int64_t columns = job.conv->out[1];
  int64_t row = q / job.width, column = q % job.width;
  for (int64_t k = 0; k < n; ++row, column = 0) {
    const int64_t run = job.width - column < n - k ? job.width - column : n - k;
    const int64_t there = columns - column < run ? columns - column : run;
    if (there > 0) put(k, row * columns + column, there);
    k += run;
  }
}

// The same, kept for all outputs of a block.
struct Runs {
  struct Run {
    int64_t k, at, there;
  };
  int64_t count;
  Run run[kMostPositions];

  Runs(const Convolved& job, int64_t q, int64_t n) : count(0) {
    if (job.width == job.conv->out[1])
      run[count++] = {0, q, n};
    else
      each_run(job, q, n, [this](int64_t k, int64_t at, int64_t there) { run[count++] = {k, at, there}; });
  }

  const Run* begin() const { return run; }
  const Run* end() const { return run + count; }
};

// Sums of one output, in the order of positions, to y, which begins at `y`.
template <class T>
inline void put_positions(const Convolved& job, const float* sums, const Runs& runs, T* y, const T* add) {
  const float least = job.conv->least, most = job.conv->most;
  for (const Runs::Run& run : runs) {
    const float* from = sums + run.k;
    T* to = y + run.at;
    if (add)
      for (int64_t i = 0; i < run.there; ++i) narrow(clamped(from[i] + widen(add[run.at + i]), least, most), to + i);
    else
      for (int64_t i = 0; i < run.there; ++i) narrow(clamped(from[i], least, most), to + i);
  }
}

// Where each of the columns [first, last) of the matrix finds what it reads at position q of an image: `fill(from)`, in order.
template <class T, class Fill>
inline void each_column(const Convolved& job, const T* image, int64_t first, int64_t last, int64_t q, const Fill& fill) {
  int64_t channel = first / job.taps, tap = first % job.taps;
  for (int64_t k = first; k < last; ++k) {
    fill(image + channel * job.channel + job.shifts[tap] + q);
    if (++tap == job.taps) tap = 0, ++channel;
  }
}

// Columns [first, last) of the matrix at the positions [q, q + n) of one image, side by side.
template <class Isa, int N>
inline void fill_panel(const Convolved& job, const float* image, int64_t first, int64_t last, int64_t q, int64_t n,
                       float* panel) {
  each_column(job, image, first, last, q, [&](const float* from) {
    // What the next block reads: a line of each row is too few for the processor to foresee them.
    fetch_far(from + kPositions, kPositions);
    if (n == 16 * N) {
      PUMICE_UNROLL
      for (int r = 0; r < 16 * N / Isa::kLanes; ++r) Isa::put(panel + r * Isa::kLanes, Isa::get(from + r * Isa::kLanes));
    } else {
      memcpy(panel, from, (size_t)n * sizeof(float));
      memset(panel + n, 0, (size_t)(16 * N - n) * sizeof(float));
    }
    panel += kPositions;
  });
}

// Outputs [begin, end) walk along their nonzeros of one part, `sums` being those of the first. In the last part the lines of
// y are fetched where they will be written, and those of what is added: both where the first output's begin, and `plane` numbers
// to the next; else null.
// Not inlined: beside the loops around it there would not be registers enough.
template <class Isa, class T, int N, bool kFirst>
PUMICE_APART void walk_part(const Taps& w, int64_t part, int64_t begin, int64_t end, const float* panel, float* sums,
                            const T* y, const T* add, int64_t plane) {
  constexpr int R = 16 * N / Isa::kLanes, L = Isa::kLanes;
  const int32_t* start = w.starts + part * (w.O + 1) + begin;
  const int32_t* order = w.order + part * w.O;
  const T* value = (const T*)w.values + *start;
  const uint16_t* offset = w.offsets + *start;
  const float* bias = w.bias;
  sums -= begin * kPositions;
  for (int64_t at = begin; at < end; ++at, ++start) {
    const int64_t o = order[at];
    float* sum = sums + o * kPositions;
    if (y) fetch_far(y + (o - begin) * plane, 16 * N);
    if (add) fetch_far(add + (o - begin) * plane, 16 * N);
    typename Isa::Reg acc[R];
    if (kFirst) {
      const typename Isa::Reg first = Isa::spread(bias ? bias[o] : 0.0f);
      PUMICE_UNROLL
      for (int r = 0; r < R; ++r) acc[r] = first;
    } else {
      PUMICE_UNROLL
      for (int r = 0; r < R; ++r) acc[r] = Isa::get(sum + r * L);
    }
    for (int32_t left = start[1] - start[0]; left > 0; --left) {
      const typename Isa::Reg v = Isa::spread(widen(*value++));
        static_assert(kColumn == kPositions, "offsets are those of the panel");
      const float* from = panel + *offset++;
      PUMICE_UNROLL
      for (int r = 0; r < R; ++r) acc[r] = Isa::fma(acc[r], v, Isa::get(from + r * L));
    }
    PUMICE_UNROLL
    for (int r = 0; r < R; ++r) Isa::put(sum + r * L, acc[r]);
  }
}

template <class Isa, class T, int N>
inline void conv_block(const Convolved& job, int64_t image, int64_t q, int64_t n, int64_t begin, int64_t end, float* panel,
                       float* sums) {
  constexpr int R = 16 * N / Isa::kLanes, L = Isa::kLanes;
  const Taps& w = *job.w;
  const Conv& conv = *job.conv;
  const float* x = (const float*)job.planes;
  const int64_t plane = conv.out[0] * conv.out[1];
  T* y = (T*)job.y + (image * w.O + begin) * plane;
  const T* add = conv.add ? (const T*)conv.add + (image * w.O + begin) * plane : nullptr;
  const int64_t written = q / job.width * conv.out[1] + q % job.width;
  for (int64_t p = 0, parts = part_count(w); p < parts; ++p) {
    const int64_t first = p * w.part, last = first + w.part < w.I ? first + w.part : w.I;
    fill_panel<Isa, N>(job, x, first, last, q, n, panel);
    const bool ends = p + 1 == parts;
    const T *next = ends ? y + written : nullptr, *added = ends && add ? add + written : nullptr;
    if (p == 0)
      walk_part<Isa, T, N, true>(w, p, begin, end, panel, sums, next, added, plane);
    else
      walk_part<Isa, T, N, false>(w, p, begin, end, panel, sums, next, added, plane);
  }
  const Runs runs(job, q, n);
  const bool straight = sizeof(T) == sizeof(float) && job.width == conv.out[1] && n == 16 * N;
  const typename Isa::Reg least = Isa::spread(conv.least), most = Isa::spread(conv.most), one = Isa::spread(1.0f);
  for (int64_t o = begin; o < end; ++o, sums += kPositions, y += plane, add += add ? plane : 0) {
    if (!straight) {
      put_positions<T>(job, sums, runs, y, add);
      continue;
    }
    PUMICE_UNROLL
    for (int r = 0; r < R; ++r) {
      typename Isa::Reg sum = Isa::get(sums + r * L);
      if (add) sum = Isa::fma(sum, one, Isa::get((const float*)add + q + r * L));
      Isa::put((float*)y + q + r * L, Isa::clamp(sum, least, most));
    }
  }
}

template <class Isa, class T>
void conv_product(const Convolved& job, int64_t block, int64_t begin, int64_t end, void* room, float* sums) {
  float* panel = (float*)room;
  const int64_t image = block / job.blocks, k = block % job.blocks, q = block_begin(job, k);
  const int64_t n = block_end(job, k) - q;
  switch ((n + 15) / 16) {
    case 4: return conv_block<Isa, T, 4>(job, image, q, n, begin, end, panel, sums);
    case 3: return conv_block<Isa, T, 3>(job, image, q, n, begin, end, panel, sums);
    case 2: return conv_block<Isa, T, 2>(job, image, q, n, begin, end, panel, sums);
    default: return conv_block<Isa, T, 1>(job, image, q, n, begin, end, panel, sums);
  }
}

// Up to 32 positions, [q, q + n) of an image: which of them are outputs, as bits, and where the first of these is in y; they lie
// one after another there. -1: there is none.
struct Strip {
  int64_t q, n;
  uint32_t outputs;
  int64_t place;
};

inline Strip strip_of(const Convolved& job, int64_t q, int64_t n) {
  Strip strip = {q, n, 0, -1};
  each_run(job, q, n, [&](int64_t k, int64_t at, int64_t there) {
    strip.outputs |= (there >= 32 ? ~0u : (1u << there) - 1) << k;
    if (strip.place < 0) strip.place = at;
  });
  return strip;
}

// Where a bundle's column begins, by its code; `image` is where planes begin, or some position behind.
template <class T>
inline const T* column_of(const Convolved& job, const T* image, uint32_t code) {
  return image + (int64_t)(code / kMostTaps) * job.channel + job.shifts[code % kMostTaps];
}

// Sums of one output at a strip's positions to y, which begins at `y`, as `add` does.
template <class Isa, class T>
struct PutStrip {
  template <int R>
  static inline void put(const Convolved& job, const Strip& strip, const typename Isa::Reg (&acc)[R], T* y, const T* add) {
    float sums[R * Isa::kLanes];
    PUMICE_UNROLL
    for (int r = 0; r < R; ++r) Isa::put(sums + r * Isa::kLanes, acc[r]);
    put_positions<T>(job, sums, Runs(job, strip.q, strip.n), y, add);
  }
};

// A bundle in fp32 at the positions of a strip, K of its outputs at a time.
template <class Isa, class T, bool kWhole>
PUMICE_APART void bundle_strip(const Convolved& job, int64_t image, const Strip& strip, int64_t bundle) {
  constexpr int R = 2, L = Isa::kLanes, K = Isa::kLanes / 2;
  static_assert(kBundle % K == 0, "a bundle is whole passes");
  const Bundles& w = *job.bundles;
  const Conv& conv = *job.conv;
  const float* x = (const float*)job.planes + strip.q;
  const int64_t plane = conv.out[0] * conv.out[1], n = strip.n;
  auto get = [=](const float* from, int r) {
    return kWhole ? Isa::get(from + r * L) : Isa::get(from + r * L, n - r * L);
  };
  for (int64_t pass = 0; pass < kBundle && bundle * kBundle + pass < w.O; pass += K) {
    typename Isa::Reg acc[K][R];
    PUMICE_UNROLL
    for (int o = 0; o < K; ++o) {
      const int64_t output = bundle * kBundle + pass + o;
      PUMICE_UNROLL
      for (int r = 0; r < R; ++r) acc[o][r] = Isa::spread(w.bias && output < w.O ? w.bias[output] : 0.0f);
    }
    for (int64_t s = w.starts[bundle]; s < w.starts[bundle + 1]; ++s) {
      const T* value = (const T*)w.values + (s * kBundle + pass) * 2;
      PUMICE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t code = w.codes[2 * s + half];
        if (code == kNoColumn) break;
        const float* from = column_of(job, x, code);
        typename Isa::Reg v[R];
        PUMICE_UNROLL
        for (int r = 0; r < R; ++r) v[r] = get(from, r);
        PUMICE_UNROLL
        for (int o = 0; o < K; ++o) {
          const typename Isa::Reg b = Isa::spread(widen(value[2 * o + half]));
          PUMICE_UNROLL
          for (int r = 0; r < R; ++r) acc[o][r] = Isa::fma(acc[o][r], b, v[r]);
        }
      }
    }
    PUMICE_UNROLL
    for (int o = 0; o < K; ++o) {
      const int64_t output = bundle * kBundle + pass + o;
      if (output >= w.O) break;
      const int64_t at = (image * w.O + output) * plane;
      PutStrip<Isa, T>::template put<R>(job, strip, acc[o], (T*)job.y + at, conv.add ? (const T*)conv.add + at : nullptr);
    }
  }
}

// Bundles [begin, end) of a block, kWidth positions at a time: `put(image, strip, bundle)`. T: as y is; X: as x is read.
// Lines of y are fetched before they are written, and of x those of the next block, where it is read from memory: 64 bytes of each
// channel are too few for the processor to foresee them.
template <class T, class X, int64_t kWidth, class Put>
inline void each_strip(const Convolved& job, int64_t block, int64_t begin, int64_t end, const Put& put) {
  const Bundles& w = *job.bundles;
  const Conv& conv = *job.conv;
  const int64_t image = block / job.blocks, k = block % job.blocks, first = block_begin(job, k), columns = conv.out[1];
  const int64_t stop = block_end(job, k), plane = conv.out[0] * columns;
  const int64_t written = first / job.width * columns + (first % job.width < columns ? first % job.width : columns);
  const int64_t count = stop - first < plane - written ? stop - first : plane - written;
  const X* next = (const X*)job.planes + (k + 1 < job.blocks ? stop : conv.C * job.channel);
  const int64_t channels = job.as_it_is && (k + 1 < job.blocks || image + 1 < conv.N) ? conv.C : 0, bundles = end - begin;
  Strip strips[kMostPositions / kWidth];
  int64_t count_strips = 0;
  for (int64_t q = first; q < stop; q += kWidth) {
    strips[count_strips] = strip_of(job, q, stop - q < kWidth ? stop - q : kWidth);
    count_strips += strips[count_strips].place >= 0;
  }
  for (int64_t b = begin; b < end; ++b) {
    for (int64_t o = b * kBundle; o < (b + 1) * kBundle && o < w.O; ++o) {
      fetch_far((const T*)job.y + (image * w.O + o) * plane + written, count);
      if (conv.add) fetch_far((const T*)conv.add + (image * w.O + o) * plane + written, count);
    }
    for (int64_t c = channels * (b - begin) / bundles; c < channels * (b - begin + 1) / bundles; ++c)
      fetch_far(next + c * job.channel, stop - first);
    for (int64_t s = 0; s < count_strips; ++s) put(image, strips[s], b);
  }
}

template <class Isa, class T>
void bundle_product(const Convolved& job, int64_t block, int64_t begin, int64_t end, void*, float*) {
  constexpr int64_t kStrip = 2 * Isa::kLanes;
  each_strip<T, float, kStrip>(job, block, begin, end, [&](int64_t image, const Strip& strip, int64_t b) {
    if (strip.n == kStrip)
      bundle_strip<Isa, T, true>(job, image, strip, b);
    else
      bundle_strip<Isa, T, false>(job, image, strip, b);
  });
}

template <class Isa, class T>
constexpr ConvKernel bundle_kernel() {
  return {bundle_product<Isa, T>, lay_out<Isa, T, float>, 2 * Isa::kLanes, kMostPositions, 4};
}

template <class Isa>
constexpr ConvKernels conv_kernels() {
  return {{{conv_product<Isa, BF16>, lay_out<Isa, BF16, float>, 16, kPositions, 4},
           {conv_product<Isa, float>, lay_out<Isa, float, float>, 16, kPositions, 4}},
          {bundle_kernel<Isa, BF16>(), bundle_kernel<Isa, float>()}};
}

}  // namespace
}  // namespace pumice
