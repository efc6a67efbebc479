// Integers with scales: the loops that every instruction set shares, and plain C++ that each compiles for itself.
//
// Included after driver.h by translation units that have set their target; everything lies in anonymous namespaces.
// A kernel reads x in fp32 and weights become fp32 in registers, except in the set with bf16 products.
#pragma once

#include "kernels.h"

namespace pumice {
namespace {

constexpr int kCodedRows = 4;  // rows of x for which the weights are read once

// Stored numbers (int8) or groups (four bits) before row o.
inline int64_t stored_before(const Matrix& w, int64_t o) {
  return w.starts ? w.starts[o] : o * (w.coding == kInt8 ? w.I : w.I / w.group);
}

inline int zero_of(const Matrix& w, int64_t group) {
  return w.zeros ? (w.zeros[group / 2] >> (4 * (group & 1))) & 15 : 8;
}

// Columns [64 j, 64 j + 64) of a row of int8 as floats without their scale, zero beyond I; p moves on.
inline void fill8(const Matrix& w, const uint8_t* mask, int64_t j, const int8_t** p, float* out) {
  const int64_t left = w.I - 64 * j, count = left < 64 ? left : 64;
  if (!mask && count == 64) {
    for (int k = 0; k < 64; ++k) out[k] = (float)(*p)[k];
    *p += 64;
    return;
  }
  for (int k = 0; k < 64; ++k) out[k] = 0;
  if (!mask) {
    for (int64_t k = 0; k < count; ++k) out[k] = (float)*(*p)++;
    return;
  }
  for (uint64_t word = mask_word(mask, j, w.I); word; word &= word - 1) out[lowest_bit(word)] = (float)*(*p)++;
}

// Sixteen columns of a group of four bits as floats, from column `at` (a multiple of 8 in either half) on.
inline void fill4(const uint8_t* codes, int64_t half, int64_t at, float scale, int zero, float* out) {
  for (int part = 0; part < 2; ++part) {
    const int64_t c = at + 8 * part;
    const uint8_t* from = codes + (c < half ? c : c - half);
    const int shift = c < half ? 0 : 4;
    for (int k = 0; k < 8; ++k) out[8 * part + k] = scale * (float)(((from[k] >> shift) & 15) - zero);
  }
}

struct PlainCoded {
  template <class T, int N>
  static void dot8(const Matrix& w, int64_t o, const float* x, int64_t stride, void*, float* sums) {
    float acc[N][16] = {}, v[64];
    const uint8_t* mask = w.mask ? w.mask + o * ((w.I + 7) / 8) : nullptr;
    const int8_t* p = (const int8_t*)w.values + stored_before(w, o);
    for (int64_t j = 0; 64 * j < w.I; ++j) {
      fill8(w, mask, j, &p, v);
      for (int n = 0; n < N; ++n)
        for (int k = 0; k < 4; ++k)
          for (int l = 0; l < 16; ++l) acc[n][l] += v[16 * k + l] * x[n * stride + 64 * j + 16 * k + l];
    }
    for (int n = 0; n < N; ++n) {
      sums[n] = 0;
      for (int l = 0; l < 16; ++l) sums[n] += acc[n][l];
    }
  }

  template <class T, int N>
  static void dot4(const Matrix& w, int64_t o, const float* x, int64_t stride, void*, float* sums) {
    float acc[N][16] = {}, v[16];
    const int64_t groups = w.I / w.group, half = w.group / 2;
    int64_t at = stored_before(w, o);
    for (int64_t g = 0; g < groups; ++g) {
      if (w.mask && !((w.mask[o * ((groups + 7) / 8) + g / 8] >> (g % 8)) & 1)) continue;
      const float scale = widen(((const T*)w.scales)[at]);
      const int zero = zero_of(w, at);
      for (int64_t c = 0; c < w.group; c += 16) {
        fill4((const uint8_t*)w.values + at * half, half, c, scale, zero, v);
        for (int n = 0; n < N; ++n)
          for (int l = 0; l < 16; ++l) acc[n][l] += v[l] * x[n * stride + g * w.group + c + l];
      }
      ++at;
    }
    for (int n = 0; n < N; ++n) {
      sums[n] = 0;
      for (int l = 0; l < 16; ++l) sums[n] += acc[n][l];
    }
  }
};

// One row of the matrix times n <= N rows of x.
template <class Isa, class T, int N>
inline void coded_up_to(int n, const Matrix& w, int64_t o, const Input& x, int64_t row, void* y, void* scratch) {
  if constexpr (N > 0) {
    if (n < N) return coded_up_to<Isa, T, N - 1>(n, w, o, x, row, y, scratch);
    float sums[N];
    if (w.coding == kInt8) {
      typedef typename Isa::template X8<T> X;
      Isa::template dot8<T, N>(w, o, (const X*)x.data + row * x.stride, x.stride, scratch, sums);
      const float scale = widen(((const T*)w.scales)[o]);
      for (int k = 0; k < N; ++k) sums[k] *= scale;
    } else {
      typedef typename Isa::template X4<T> X;
      Isa::template dot4<T, N>(w, o, (const X*)x.data + row * x.stride, x.stride, scratch, sums);
    }
    store<T>(w, o, row, N, sums, y);
  }
}

template <class Isa, class T>
void coded_product(const Matrix& w, int64_t begin, int64_t end, const Input& x, void* y, void* scratch) {
  const int64_t step = pass_rows(x.rows, kCodedRows);
  for (int64_t o = begin; o < end; ++o)
    for (int64_t row = 0; row < x.rows; row += step) {
      const int n = (int)(x.rows - row < step ? x.rows - row : step);
      coded_up_to<Isa, T, kCodedRows>(n, w, o, x, row, y, scratch);
    }
}

// Row i of the blocks of a block row of int8 times n <= N rows of x.
template <class T, int N>
inline void coded_blocks_up_to(int n, const Matrix& w, int64_t br, int64_t i, const Input& x, int64_t row, void* y) {
  if constexpr (N > 0) {
    if (n < N) return coded_blocks_up_to<T, N - 1>(n, w, br, i, x, row, y);
    float acc[N][16] = {}, sums[N];
    for (int64_t b = w.block_starts[br]; b < w.block_starts[br + 1]; ++b) {
      const int8_t* v = (const int8_t*)w.values + (b * w.r + i) * w.c;
      const float* xs = (const float*)x.data + row * x.stride + w.columns[b] * w.c;
      int64_t k = 0;
      for (; k + 16 <= w.c; k += 16)
        for (int m = 0; m < N; ++m)
          for (int l = 0; l < 16; ++l) acc[m][l] += (float)v[k + l] * xs[m * x.stride + k + l];
      for (; k < w.c; ++k)
        for (int m = 0; m < N; ++m) acc[m][k % 16] += (float)v[k] * xs[m * x.stride + k];
    }
    const int64_t o = br * w.r + i;
    const float scale = widen(((const T*)w.scales)[o]);
    for (int m = 0; m < N; ++m) {
      sums[m] = 0;
      for (int l = 0; l < 16; ++l) sums[m] += acc[m][l];
      sums[m] *= scale;
    }
    store<T>(w, o, row, N, sums, y);
  }
}

template <class T>
void coded_blocks_product(const Matrix& w, int64_t begin, int64_t end, const Input& x, void* y, void*) {
  const int64_t step = pass_rows(x.rows, kCodedRows);
  for (int64_t br = begin; br < end; ++br)
    for (int64_t i = 0; i < w.r; ++i)
      for (int64_t row = 0; row < x.rows; row += step) {
        const int n = (int)(x.rows - row < step ? x.rows - row : step);
        coded_blocks_up_to<T, kCodedRows>(n, w, br, i, x, row, y);
      }
}

// Rows [begin, end), dense, in the dtype of the scales: s k multiplied in fp32 and rounded once.
template <class T>
void coded_expand(const Matrix& w, int64_t begin, int64_t end, void* out, void*) {
  float v[64];
  for (int64_t o = begin; o < end; ++o) {
    T* row = (T*)out + (o - begin) * w.I;
    if (w.columns) {
      const float scale = widen(((const T*)w.scales)[o]);
      memset(row, 0, sizeof(T) * (size_t)w.I);
      for (int64_t b = w.block_starts[o / w.r]; b < w.block_starts[o / w.r + 1]; ++b) {
        const int8_t* p = (const int8_t*)w.values + (b * w.r + o % w.r) * w.c;
        for (int64_t k = 0; k < w.c; ++k) narrow((float)p[k] * scale + 0.0f, row + w.columns[b] * w.c + k);
      }
      continue;
    }
    if (w.coding == kInt8) {
      const float scale = widen(((const T*)w.scales)[o]);
      const uint8_t* mask = w.mask ? w.mask + o * ((w.I + 7) / 8) : nullptr;
      const int8_t* p = (const int8_t*)w.values + stored_before(w, o);
      for (int64_t j = 0; 64 * j < w.I; ++j) {
        fill8(w, mask, j, &p, v);
        const int64_t left = w.I - 64 * j, count = left < 64 ? left : 64;
        for (int64_t k = 0; k < count; ++k) narrow(v[k] * scale + 0.0f, row + 64 * j + k);
      }
      continue;
    }
    const int64_t groups = w.I / w.group, half = w.group / 2;
    int64_t at = stored_before(w, o);
    for (int64_t g = 0; g < groups; ++g) {
      T* to = row + g * w.group;
      if (w.mask && !((w.mask[o * ((groups + 7) / 8) + g / 8] >> (g % 8)) & 1)) {
        memset(to, 0, sizeof(T) * (size_t)w.group);
        continue;
      }
      const float scale = widen(((const T*)w.scales)[at]);
      const int zero = zero_of(w, at);
      for (int64_t c = 0; c < w.group; c += 16) {
        fill4((const uint8_t*)w.values + at * half, half, c, scale, zero, v);
        for (int k = 0; k < 16; ++k) narrow(v[k] + 0.0f, to + c + k);
      }
      ++at;
    }
  }
}

}  // namespace
}  // namespace pumice
