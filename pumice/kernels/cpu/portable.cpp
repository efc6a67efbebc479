// Kernels in plain C++: the only ones outside x86, and the yardstick for the others in the tests.
#include "driver.h"
#include "blocks_kernel.h"
#include "coded.h"
#include "conv_kernel.h"
#include "grouped_outer.h"
#include "tiles_kernel.h"
#include "decoder_pieces.h"

namespace pumice {
namespace {

struct Portable {
  template <class T>
  using X = float;
  static constexpr int kDotRows = 4, kTogether = 1, kTileRows = 4, kTileSums = 16;

  // Sums of 16 columns first, then of those: short sums keep the rounding error near that of a vector kernel.
  template <class T, int M, int N>
  static void dot(const T* const* values, int64_t, const uint8_t* mask, int64_t, const float* x, int64_t stride,
                  int64_t I, float (*sums)[N]) {
    const T* p = values[0];
    float total[4][N] = {};
    for (int64_t j = 0; 64 * j < I; ++j) {
      const uint64_t word = mask_word(mask, j, I);
      for (int g = 0; g < 4; ++g) {
        float part[N] = {};
        for (uint64_t bits = (word >> (16 * g)) & 0xffff; bits; bits &= bits - 1) {
          const float value = widen(*p++);
          const float* column = x + 64 * j + 16 * g + lowest_bit(bits);
          for (int n = 0; n < N; ++n) part[n] += value * column[n * stride];
        }
        for (int n = 0; n < N; ++n) total[g][n] += part[n];
      }
    }
    for (int n = 0; n < N; ++n) sums[0][n] = (total[0][n] + total[1][n]) + (total[2][n] + total[3][n]);
  }

  template <class T, int M, int N>
  static void tile(const T* values, const int32_t* columns, int64_t begin, int64_t end, int64_t r, int64_t c,
                   int64_t, const float* x, int64_t stride, float (*sums)[N]) {
    memset(sums, 0, sizeof(float) * M * N);
    for (int64_t b = begin; b < end; ++b)
      for (int m = 0; m < M; ++m) {
        const T* w = values + (b * r + m) * c;
        for (int n = 0; n < N; ++n) {
          const float* xs = x + n * stride + columns[b] * c;
          float part = 0;
          for (int64_t k = 0; k < c; ++k) part += widen(w[k]) * xs[k];
          sums[m][n] += part;
        }
      }
  }

  template <class T>
  static void expand_row(const T* p, const uint8_t* mask, int64_t I, T* out) {
    memset(out, 0, sizeof(T) * (size_t)I);
    for (int64_t j = 0; 64 * j < I; ++j)
      for (uint64_t word = mask_word(mask, j, I); word; word &= word - 1) out[64 * j + lowest_bit(word)] = *p++;
  }
};

struct Coded : PlainCoded {
  template <class T>
  using X4 = float;
  template <class T>
  using X8 = float;
};

struct Eight {
  float v[8];
};

// Blocks times many rows of x, eight side by side.
template <class Value>
struct PlainBlocks {
  typedef Value T;
  typedef Value Y;
  typedef Eight Reg;
  static constexpr int64_t kLanes = 8, kTall = 32, kWidth = 32;
  static constexpr int64_t kMost = 4;
  static constexpr int64_t kColumns = 1, kWords = 1;
  static constexpr int registers(int64_t) { return 1; }

  static Reg zero() { return {}; }
  static void put(float* p, const Reg& r, bool add) {
    for (int i = 0; i < 8; ++i) p[i] = add ? p[i] + r.v[i] : r.v[i];
  }
  static void fetch(const T*, int64_t) {}

  template <int M, int N, bool kWhole>
  static inline void step(Reg (*acc)[N], const T* p, int64_t c, const uint32_t* x, int64_t) {
    for (int n = 0; n < N; ++n) {
      float v[8];
      memcpy(v, x + 8 * n, sizeof v);
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < 8; ++i) acc[m][n].v[i] += widen(p[m * c]) * v[i];
    }
  }

  static void store(const Matrix& w, int64_t o, int64_t outputs, const float* sums, const Panel& x, int64_t, int64_t rows,
                    T* y) {
    store_sums(w, o, outputs, sums, x, rows, y);
  }
  static void fill(const Matrix& w, int64_t begin, int64_t end, const T* x, int64_t rows, int64_t width, uint32_t* words) {
    fill_plainly<PlainBlocks>(w, begin, end, x, rows, width, words);
  }
};

// Grouped products: arrays of a vector's size, which compilers keep in vectors where they can.
template <class Value>
struct Floats {
  typedef Value T;
  typedef Eight Reg;
  typedef Reg Sum;
  static constexpr int64_t kLanes = 8, kStretch = 512;
  static constexpr bool kTurns = false;
  static constexpr int kM = 2, kN = 2, kDirectM = 2, kDirectN = 2, kWidth = 8, kStep = 1, kCross = 1, kV = 2, kR = 2;

  static Reg zero() { return Reg{}; }
  static Reg none() { return Reg{}; }
  static Reg load(const T* p, int64_t n = 8) {
    Reg r = {};
    for (int i = 0; i < (n < 8 ? n : 8); ++i) r.v[i] = widen(p[i]);
    return r;
  }
  static Sum add(Sum a, const Sum& b) {
    for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
    return a;
  }
  static Sum fma(Sum s, Reg w, Reg x) {
    for (int i = 0; i < 8; ++i) s.v[i] += w.v[i] * x.v[i];
    return s;
  }
  static Reg hold(Reg r) { return r; }
  static Reg spread(const T* x, int) {
    Reg r;
    for (int i = 0; i < 8; ++i) r.v[i] = widen(*x);
    return r;
  }
  static void cross(const T* w, int64_t, int, int64_t outputs, Reg* out) { out[0] = load(w, outputs); }
  template <int M>
  static void reduce(const Sum* s, float* out) {
    for (int m = 0; m < M; ++m)
      out[m] = ((s[m].v[0] + s[m].v[4]) + (s[m].v[1] + s[m].v[5])) + ((s[m].v[2] + s[m].v[6]) + (s[m].v[3] + s[m].v[7]));
  }
  static void put(float* out, Sum s, bool add) {
    for (int i = 0; i < 8; ++i) out[i] = add ? out[i] + s.v[i] : s.v[i];
  }
};

const Kernels table = {"portable",
                       false,
                       nullptr,
                       {dense_product<Floats<BF16>, Floats<float>>, dense_product<Floats<float>, Floats<float>>},
                       {bitmask_product<Portable, BF16>, bitmask_product<Portable, float>},
                       {block_product<Portable, BF16>, block_product<Portable, float>},
                       expand_rows<Portable, uint16_t>,
                       expand_rows<Portable, uint32_t>,
                       {coded_product<Coded, BF16>, coded_product<Coded, float>},
                       {coded_expand<BF16>, coded_expand<float>},
                       {block_panels<PlainBlocks<BF16>>(), block_panels<PlainBlocks<float>>()},
                       {coded_blocks_product<BF16>, coded_blocks_product<float>},
                       nullptr,
                       nullptr};

const GroupedKernels grouped = {{stage_columns<Floats<BF16>>, stage_columns<Floats<float>>},
                                {hidden_rows<BF16>, hidden_rows<float>},
                                {outer_rows<Floats<BF16>>, outer_rows<Floats<float>>}};

// One row of x times tiles.
template <class Value>
struct FewTiles {
  typedef Value T;
  typedef T X;
  static constexpr int kMost = 1;

  template <int N>
  struct Table {
    const T* x;
    Table(const T* from, int64_t) : x(from) {}
  };

  template <int N>
  static void slice(const Table<N>& table, const T* v, const uint8_t* c, int64_t steps, float (*sums)[kSlice]) {
    for (int l = 0; l < kSlice; ++l) sums[0][l] = 0;
    for (int64_t s = 0; s < steps; ++s, v += kStep, c += kStep)
      for (int l = 0; l < kSlice; ++l)
        sums[0][l] += widen(v[2 * l]) * widen(table.x[c[2 * l]]) + widen(v[2 * l + 1]) * widen(table.x[c[2 * l + 1]]);
  }
};

template <class Value>
struct ManyTiles {
  typedef Value T;
  typedef float X;
  typedef typename Floats<float>::Reg Reg;
  static constexpr int kWidth = 8, kRegs = 1, kTogether = 2;

  static Reg get(const float* p) { return Floats<float>::load(p); }
  static void put(float* p, const Reg& r) { memcpy(p, r.v, sizeof r.v); }
  static int place(int row) { return row; }
  static void fetch(const T*, const uint8_t*) {}
  static void step(Reg* acc, const T* pair, const float* x0, const float* x1) {
    const float first = widen(pair[0]), second = widen(pair[1]);
    for (int i = 0; i < kWidth; ++i) acc[0].v[i] += first * x0[i] + second * x1[i];
  }
};

typedef ManyTiles<BF16> ManyBf16;
typedef ManyTiles<float> ManyFp32;
const TileKernels tiles = {
    {{1, few_product<FewTiles<BF16>>, false, {8, 8}, {many_product<ManyBf16>, many_product<ManyBf16>}, true},
     {1, few_product<FewTiles<float>>, false, {8, 8}, {many_product<ManyFp32>, many_product<ManyFp32>}, false}}};

struct PlainConv {
  typedef Eight Reg;
  static constexpr int kLanes = 8;
  static Reg get(const float* p) {
    Reg r;
    memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static Reg get(const float* p, int64_t n) {
    Reg r = {};
    if (n > 0) memcpy(r.v, p, sizeof(float) * (size_t)(n < 8 ? n : 8));
    return r;
  }
  static void put(float* p, const Reg& r) { memcpy(p, r.v, sizeof r.v); }
  static Reg spread(float v) { return {{v, v, v, v, v, v, v, v}}; }
  static Reg fma(Reg sum, const Reg& w, const Reg& x) {
    for (int i = 0; i < 8; ++i) sum.v[i] += w.v[i] * x.v[i];
    return sum;
  }
  static Reg clamp(Reg r, const Reg& least, const Reg& most) {
    for (int i = 0; i < 8; ++i) r.v[i] = clamped(r.v[i], least.v[i], most.v[i]);
    return r;
  }
};
const ConvKernels convolutions = conv_kernels<PlainConv>();

const DecoderKernels decoder_pieces[] = {pieces_of<AnyHead, BF16>(), pieces_of<AnyHead, float>()};

}  // namespace

const Kernels* portable_kernels() { return &table; }
const GroupedKernels* portable_grouped() { return &grouped; }
const TileKernels* portable_tiles() { return &tiles; }
const DecoderKernels* portable_decoder() { return decoder_pieces; }
const ConvKernels* portable_conv() { return &convolutions; }

}  // namespace pumice
