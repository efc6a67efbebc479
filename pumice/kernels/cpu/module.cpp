// pumice._native: the kernels as a plain CPython module of the stable ABI.
//
// It takes addresses and sizes as integers and knows nothing of PyTorch, so that one build works with every version of
// it and a call costs less than a microsecond. The bindings in cpu_backend.py own the tensors and check them; what is
// checked here is what would read or write outside of them.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "attention.h"
#include "blocks.h"
#include "conv.h"
#include "decoder.h"
#include "features.h"
#include "gram.h"
#include "grouped.h"
#include "kernels.h"
#include "lanes.h"
#include "linear.h"
#include "nm.h"
#include "threads.h"
#include "tiles.h"

namespace pumice {
namespace {

const Kernels* active = nullptr;
const GroupedKernels* active_grouped = nullptr;
const TileKernels* active_tiles = nullptr;
const DecoderKernels* active_decoder = nullptr;
const LaneKernels* active_lanes = nullptr;
const ConvKernels* active_conv = nullptr;

struct Choice {
  const char* name;
  const Kernels* (*kernels)();
  const GroupedKernels* (*grouped)();
  const TileKernels* (*tiles)();
  const DecoderKernels* (*decoder)();
  const LaneKernels* (*lanes)();
  const ConvKernels* (*conv)();
  const char* needs[9];
};

const LaneKernels* no_lanes() { return nullptr; }

const Choice choices[] = {
    {"avx512_bf16",
     avx512_bf16_kernels, avx512_bf16_grouped, avx512_bf16_tiles, avx512_bf16_decoder, avx512_bf16_lanes, avx512_bf16_conv,
     {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vbmi2", "avx512_vnni", "avx512_bf16", "bmi2", nullptr}},
    {"avx512",
     avx512_kernels, avx512_grouped, avx512_tiles, avx512_decoder, no_lanes, avx512_conv,
     {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "bmi2", nullptr}},
    {"avx2",
     avx2_kernels, avx2_grouped, avx2_tiles, avx2_decoder, no_lanes, avx2_conv,
     {"avx2", "fma", "popcnt", "bmi2", nullptr}},
    {"portable",
     portable_kernels, portable_grouped, portable_tiles, portable_decoder, no_lanes, portable_conv,
     {nullptr}},
};

// Null, or the first feature that is missing; "code" where this build lacks the kernels.
const char* missing(const Choice& choice) {
  for (int i = 0; choice.needs[i]; ++i)
    if (!cpu_has(choice.needs[i])) return choice.needs[i];
  return choice.kernels() ? nullptr : "code";
}

void take(const Choice& choice) {
  active = choice.kernels(), active_grouped = choice.grouped();
  active_tiles = choice.tiles(), active_decoder = choice.decoder();
  active_lanes = choice.lanes(), active_conv = choice.conv();
}

// What a capsule is called, by what it holds.
template <class Stored>
struct Plan;
template <>
struct Plan<Matrix> {
  static constexpr const char* name = "pumice._native.plan";
};
template <>
struct Plan<Tiles> {
  static constexpr const char* name = "pumice._native.tiles";
};

template <>
struct Plan<Taps> {
  static constexpr const char* name = "pumice._native.taps";
};

template <>
struct Plan<Bundles> {
  static constexpr const char* name = "pumice._native.bundles";
};

template <>
struct Plan<Lanes> {
  static constexpr const char* name = "pumice._native.lanes";
};

template <class Stored>
void free_plan(PyObject* capsule) {
  PyMem_Free(PyCapsule_GetPointer(capsule, Plan<Stored>::name));
}

template <>
struct Plan<Decoder> {
  static constexpr const char* name = "pumice._native.decoder";
};

// Integer arguments into `out`; false with a Python error set when their number or type is wrong.
bool integers(PyObject* const* args, Py_ssize_t given, Py_ssize_t wanted, long long* out) {
  if (given != wanted) {
    PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, given);
    return false;
  }
  for (Py_ssize_t i = 0; i < wanted; ++i) {
    out[i] = PyLong_AsLongLong(args[i]);
    if (out[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

template <class T>
const T* address(long long value) {
  return (const T*)(intptr_t)value;
}

template <class Stored>
PyObject* plan_of(const Stored& w, int dtype) {
  if (w.O < 0 || w.I < 0 || dtype < 0 || dtype > kF16) {
    PyErr_SetString(PyExc_ValueError, "negative size or unknown dtype");
    return nullptr;
  }
  Stored* kept = (Stored*)PyMem_Malloc(sizeof(Stored));
  if (!kept) return PyErr_NoMemory();
  *kept = w;
  PyObject* capsule = PyCapsule_New(kept, Plan<Stored>::name, free_plan<Stored>);
  if (!capsule) PyMem_Free(kept);
  return capsule;
}

// plan_bitmask(values, count, mask, row_starts, bias or 0, O, I, dtype) -> plan
PyObject* plan_bitmask(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[8];
  if (!integers(args, count, 8, v)) return nullptr;
  Matrix w = {};
  w.values = address<void>(v[0]), w.count = v[1], w.mask = address<uint8_t>(v[2]), w.starts = address<int64_t>(v[3]);
  w.bias = address<float>(v[4]), w.O = v[5], w.I = v[6], w.dtype = (int)v[7];
  for (int64_t o = 0; o < w.O; ++o)
    if (w.starts[o + 1] < w.starts[o] || w.starts[o + 1] - w.starts[o] > w.I) {
      PyErr_SetString(PyExc_ValueError, "row_starts do not rise by 0 to I values a row");
      return nullptr;
    }
  if (w.starts[0] != 0 || w.starts[w.O] != w.count) {
    PyErr_SetString(PyExc_ValueError, "the bitmask does not have as many bits set as there are values");
    return nullptr;
  }
  return plan_of(w, w.dtype);
}

// plan_dense(values, bias or 0, O, I, dtype) -> plan
PyObject* plan_dense(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[5];
  if (!integers(args, count, 5, v)) return nullptr;
  Matrix w = {};
  w.values = address<void>(v[0]), w.bias = address<float>(v[1]), w.O = v[2], w.I = v[3], w.dtype = (int)v[4];
  w.count = w.O * w.I;
  return plan_of(w, w.dtype);
}

// plan_block(values, blocks, columns, row_starts, scales or 0, sums or 0, bias or 0, O, I, r, c, dtype) -> plan
// of blocks of numbers, or of int8 with a scale a row and the sum of each row's integers.
PyObject* plan_block(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[12];
  if (!integers(args, count, 12, v)) return nullptr;
  Matrix w = {};
  w.values = address<void>(v[0]), w.columns = address<int32_t>(v[2]), w.block_starts = address<int32_t>(v[3]);
  w.scales = address<void>(v[4]), w.sums = address<int32_t>(v[5]), w.bias = address<float>(v[6]);
  w.O = v[7], w.I = v[8], w.r = v[9], w.c = v[10], w.dtype = (int)v[11], w.coding = w.scales ? kInt8 : kNumbers;
  if (w.coding == kInt8 && w.dtype > kF32) {
    PyErr_SetString(PyExc_ValueError, "no product for float16");
    return nullptr;
  }
  static const int32_t none = 0;
  if (!w.columns) w.columns = &none;
  if (w.r < 1 || w.c < 1 || w.O % w.r || w.I % w.c) {
    PyErr_SetString(PyExc_ValueError, "blocks do not divide the matrix");
    return nullptr;
  }
  w.count = v[1] * w.r * w.c;
  bool fits = w.block_starts[0] == 0 && w.block_starts[w.O / w.r] == v[1];
  for (int64_t row = 0; row < w.O / w.r; ++row) fits = fits && w.block_starts[row] <= w.block_starts[row + 1];
  for (int64_t b = 0; fits && b < v[1]; ++b) fits = w.columns[b] >= 0 && w.columns[b] < w.I / w.c;
  if (!fits) {
    PyErr_SetString(PyExc_ValueError, "columns or row_starts point outside of the matrix");
    return nullptr;
  }
  return plan_of(w, w.dtype);
}

// plan_coded(values, stored, mask or 0, row_starts or 0, scales, zeros or 0, bias or 0, O, I, group or 0, dtype, sums or 0) ->
// plan of int8 with a scale a row (group 0), or of four bits with a scale a group; `stored` numbers or groups.
PyObject* plan_coded(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[12];
  if (!integers(args, count, 12, v)) return nullptr;
  Matrix w = {};
  w.values = address<void>(v[0]), w.count = v[1], w.mask = address<uint8_t>(v[2]), w.starts = address<int64_t>(v[3]);
  w.scales = address<void>(v[4]), w.zeros = address<uint8_t>(v[5]), w.bias = address<float>(v[6]);
  w.O = v[7], w.I = v[8], w.group = v[9], w.dtype = (int)v[10], w.coding = w.group ? kInt4 : kInt8;
  w.sums = address<int32_t>(v[11]);
  if (w.dtype > kF32 || w.group < 0 || w.group % 16 || (w.group && w.I % w.group)) {
    PyErr_SetString(PyExc_ValueError, "the groups do not fit the matrix");
    return nullptr;
  }
  const int64_t most = w.group ? w.I / w.group : w.I;
  bool fits = w.starts ? w.mask && w.starts[0] == 0 && w.starts[w.O] == w.count : w.count == w.O * most;
  for (int64_t o = 0; fits && w.starts && o < w.O; ++o)
    fits = w.starts[o + 1] >= w.starts[o] && w.starts[o + 1] - w.starts[o] <= most;
  if (!fits) {
    PyErr_SetString(PyExc_ValueError, "the positions do not match the stored integers");
    return nullptr;
  }
  return plan_of(w, w.dtype);
}

// run(plan, x, rows, y, threads): y [rows, O] = x [rows, I] times the matrix, and the bias
PyObject* run(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[4];
  const Matrix* w = count ? (const Matrix*)PyCapsule_GetPointer(args[0], Plan<Matrix>::name) : nullptr;
  if (PyErr_Occurred() || !integers(args + 1, count - 1, 4, v)) return nullptr;
  if (w->dtype == kF16) {
    PyErr_SetString(PyExc_ValueError, "no product for float16");
    return nullptr;
  }
  bool enough;
  Py_BEGIN_ALLOW_THREADS
  void* y = (void*)(intptr_t)v[2];
  enough = run_matrices(&w, &y, 1, *active, address<void>(v[0]), v[1], v[3]);
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// run_blocks(plan, x, rows, y, threads): the same for blocks and many rows
PyObject* run_blocks_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[4];
  const Matrix* w = count ? (const Matrix*)PyCapsule_GetPointer(args[0], Plan<Matrix>::name) : nullptr;
  if (PyErr_Occurred() || !integers(args + 1, count - 1, 4, v)) return nullptr;
  if (!w->columns || w->coding != kNumbers || w->dtype > kF32) {
    PyErr_SetString(PyExc_ValueError, "only for blocks of bfloat16 or float32");
    return nullptr;
  }
  bool enough;
  Py_BEGIN_ALLOW_THREADS
  enough = run_blocks(*w, *active, address<void>(v[0]), v[1], (void*)(intptr_t)v[2], v[3]);
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// run_bytes(plan, x, rows, y, each, threads): the same for int8 with its rows' sums, x being rounded to 1 or 2 bytes a number
PyObject* run_bytes_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[5];
  const Matrix* w = count ? (const Matrix*)PyCapsule_GetPointer(args[0], Plan<Matrix>::name) : nullptr;
  if (PyErr_Occurred() || !integers(args + 1, count - 1, 5, v)) return nullptr;
  if (w->O == 0) Py_RETURN_NONE;
  if (w->coding != kInt8 || !w->sums || w->I < 1 || w->I > kMostByteColumns || v[3] < 1 || v[3] > 2 || !active->bytes) {
    PyErr_SetString(PyExc_ValueError, "only for int8 with sums, 1 or 2 bytes, and sets of kernels with products of bytes");
    return nullptr;
  }
  bool enough;
  Py_BEGIN_ALLOW_THREADS
  enough = run_bytes(*w, active->bytes[w->dtype], address<void>(v[0]), v[1], (void*)(intptr_t)v[2], (int)v[3], v[4]);
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// expand(plan, begin, end, out, threads): rows [begin, end) of the matrix, dense, to out [end - begin, I]
PyObject* expand(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[4];
  const Matrix* w = count ? (const Matrix*)PyCapsule_GetPointer(args[0], Plan<Matrix>::name) : nullptr;
  if (PyErr_Occurred() || !integers(args + 1, count - 1, 4, v)) return nullptr;
  if (v[0] < 0 || v[1] < v[0] || v[1] > w->O) {
    PyErr_SetString(PyExc_ValueError, "rows outside of the matrix");
    return nullptr;
  }
  bool enough;
  Py_BEGIN_ALLOW_THREADS
  enough = expand_matrix(*w, *active, v[0], v[1], (void*)(intptr_t)v[2], v[3]);
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// row_starts(mask, O, I, out): out [O + 1] int64, where each row's values begin
PyObject* row_starts(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[4];
  if (!integers(args, count, 4, v)) return nullptr;
  const int64_t bytes = (v[2] + 7) / 8;
  int64_t* out = (int64_t*)(intptr_t)v[3];
  Py_BEGIN_ALLOW_THREADS
  out[0] = 0;
  for (int64_t o = 0; o < v[1]; ++o) {
    int64_t total = 0;
    for (int64_t j = 0; 64 * j < v[2]; ++j) {
      uint64_t word = mask_word(address<uint8_t>(v[0]) + o * bytes, j, v[2]);
      word -= (word >> 1) & 0x5555555555555555ull;
      word = (word & 0x3333333333333333ull) + ((word >> 2) & 0x3333333333333333ull);
      total += (int64_t)((((word + (word >> 4)) & 0x0f0f0f0f0f0f0f0full) * 0x0101010101010101ull) >> 56);
    }
    out[o + 1] = out[o] + total;
  }
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

// nm_bitmask(codes, O, I, n, m, out): out [O, ceil(I / 8)], the bitmask of the positions that N:M codes stand for
PyObject* nm_bitmask_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[6];
  if (!integers(args, count, 6, v)) return nullptr;
  const int64_t n = v[3], m = v[4];
  if (v[1] < 0 || v[2] < 0 || n < 1 || n > m || m > 32 || v[2] % m) {
    PyErr_SetString(PyExc_ValueError, "n and m do not fit the matrix");
    return nullptr;
  }
  bool known;
  Py_BEGIN_ALLOW_THREADS
  known = nm_bitmask(address<uint8_t>(v[0]), v[1], v[2], (int)n, (int)m, (uint8_t*)(intptr_t)v[5]);
  Py_END_ALLOW_THREADS
  if (!known) {
    PyErr_SetString(PyExc_ValueError, "a code stands for no choice of positions");
    return nullptr;
  }
  Py_RETURN_NONE;
}

// Of a CSR matrix: columns, wide, row_starts, O, I, count.
Rows rows_of(const long long* v) {
  Rows m = {};
  m.columns = address<void>(v[0]), m.wide = v[1] != 0, m.starts = address<int32_t>(v[2]);
  m.O = v[3], m.I = v[4], m.count = v[5];
  return m;
}

// lay_out_tiles(columns, wide, row_starts, O, I, count, height, order, steps, starts) -> how many numbers are stored
PyObject* lay_out_tiles_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[10];
  if (!integers(args, count, 10, v)) return nullptr;
  int64_t stored = -1;
  const bool fits = v[3] >= 0 && v[4] >= 0 && v[6] > 0 && v[6] <= kMostRows && v[6] % kSlice == 0;
  Py_BEGIN_ALLOW_THREADS
  if (fits)
    stored = lay_out_tiles(rows_of(v), v[6], (uint8_t*)(intptr_t)v[7], (uint8_t*)(intptr_t)v[8], (int64_t*)(intptr_t)v[9]);
  Py_END_ALLOW_THREADS
  if (stored < 0) {
    PyErr_SetString(PyExc_ValueError, "columns or row_starts point outside of the matrix");
    return nullptr;
  }
  return PyLong_FromLongLong(stored);
}

// fill_tiles(columns, wide, row_starts, O, I, count, values, height, order, steps, starts, dtype, to_values, to_columns,
// threads), what was laid out before
PyObject* fill_tiles_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[15];
  if (!integers(args, count, 15, v)) return nullptr;
  Tiles w = {};
  w.O = v[3], w.I = v[4], w.height = v[7], w.order = address<uint8_t>(v[8]), w.steps = address<uint8_t>(v[9]);
  w.starts = address<int64_t>(v[10]), w.dtype = (int)v[11];
  Py_BEGIN_ALLOW_THREADS
  fill_tiles(rows_of(v), address<void>(v[6]), element_size(w.dtype), w, (void*)(intptr_t)v[12], (uint8_t*)(intptr_t)v[13],
             v[14]);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

// plan_tiles(values, columns, order, steps, starts, bias or 0, O, I, height, dtype) -> plan
PyObject* plan_tiles(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[10];
  if (!integers(args, count, 10, v)) return nullptr;
  Tiles w = {};
  w.values = address<void>(v[0]), w.columns = address<uint8_t>(v[1]), w.order = address<uint8_t>(v[2]);
  w.steps = address<uint8_t>(v[3]), w.starts = address<int64_t>(v[4]), w.bias = address<float>(v[5]);
  w.O = v[6], w.I = v[7], w.height = v[8], w.dtype = (int)v[9];
  return plan_of(w, w.dtype);
}

// run_tiles(plan, x, rows, y, threads): y [rows, O] = x [rows, I] times the matrix, and the bias
PyObject* run_tiles_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[4];
  const Tiles* w = count ? (const Tiles*)PyCapsule_GetPointer(args[0], Plan<Tiles>::name) : nullptr;
  if (PyErr_Occurred() || !integers(args + 1, count - 1, 4, v)) return nullptr;
  bool enough;
  Py_BEGIN_ALLOW_THREADS
  enough = run_tiles(*w, *active_tiles, address<void>(v[0]), v[1], (void*)(intptr_t)v[2], v[3]);
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// plan_taps(values, count, offsets, starts, order, bias or 0, O, I, part, dtype) -> plan
PyObject* plan_taps(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[10];
  if (!integers(args, count, 10, v)) return nullptr;
  Taps w = {};
  w.values = address<void>(v[0]), w.count = v[1], w.offsets = address<uint16_t>(v[2]), w.starts = address<int32_t>(v[3]);
  w.order = address<int32_t>(v[4]), w.bias = address<float>(v[5]), w.O = v[6], w.I = v[7], w.part = v[8];
  w.dtype = (int)v[9];
  bool fits = w.O >= 0 && w.I > 0 && w.part > 0 && w.part <= kMostColumns && (w.dtype == kBF16 || w.dtype == kF32);
  const int64_t parts = fits ? part_count(w) : 0;
  int64_t at = 0;
  for (int64_t p = 0; fits && p < parts; ++p) {
    const int32_t* starts = w.starts + p * (w.O + 1);
    const int64_t columns = (w.I - p * w.part < w.part ? w.I - p * w.part : w.part) * kColumn;
    fits = starts[0] == at;
    for (int64_t o = 0; fits && o < w.O; ++o)
      fits = starts[o] <= starts[o + 1] && w.order[p * w.O + o] / kOutputs == o / kOutputs && w.order[p * w.O + o] < w.O;
    fits = fits && starts[w.O] <= w.count;
    for (; fits && at < starts[w.O]; ++at) fits = w.offsets[at] < columns && w.offsets[at] % kColumn == 0;
  }
  if (!fits || at != w.count) {
    PyErr_SetString(PyExc_ValueError, "the positions do not match the matrix");
    return nullptr;
  }
  return plan_of(w, w.dtype);
}

// plan_bundles(values, steps, codes, starts, bias or 0, O, I, taps, dtype) -> plan
PyObject* plan_bundles(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[9];
  if (!integers(args, count, 9, v)) return nullptr;
  Bundles w = {};
  w.values = address<void>(v[0]), w.count = v[1], w.codes = address<uint32_t>(v[2]), w.starts = address<int32_t>(v[3]);
  w.bias = address<float>(v[4]), w.O = v[5], w.I = v[6], w.taps = v[7], w.dtype = (int)v[8];
  bool fits = w.O >= 0 && w.I > 0 && w.taps > 0 && w.taps <= kMostTaps && (w.dtype == kBF16 || w.dtype == kF32) && w.starts[0] == 0;
  const int64_t bundles = fits ? bundle_count(w) : 0;
  for (int64_t b = 0; fits && b < bundles; ++b) {
    fits = w.starts[b] <= w.starts[b + 1] && w.starts[b + 1] <= w.count;
    for (int64_t at = 2 * (int64_t)w.starts[b], end = 2 * (int64_t)w.starts[b + 1]; fits && at < end; ++at) {
      const uint32_t code = w.codes[at];
      const int64_t tap = code % kMostTaps;
      fits = code == kNoColumn ? at == end - 1 : tap < w.taps && (int64_t)(code / kMostTaps) * w.taps + tap < w.I;
    }
  }
  if (!fits || w.starts[bundles] != w.count) {
    PyErr_SetString(PyExc_ValueError, "the positions do not match the matrix");
    return nullptr;
  }
  return plan_of(w, w.dtype);
}

// run_conv(plan, x, y, add or 0, N, C, H, W, kernel, stride, before, dilation, out: rows and columns, least, most: bits of
// float32, threads)
PyObject* run_conv_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[20];
  const Bundles* bundles = nullptr;
  const Taps* w = nullptr;
  if (count && PyCapsule_IsValid(args[0], Plan<Bundles>::name))
    bundles = (const Bundles*)PyCapsule_GetPointer(args[0], Plan<Bundles>::name);
  else if (count)
    w = (const Taps*)PyCapsule_GetPointer(args[0], Plan<Taps>::name);
  if (PyErr_Occurred() || !integers(args + 1, count - 1, 20, v)) return nullptr;
  Conv c = {};
  c.add = address<void>(v[2]), c.N = v[3], c.C = v[4], c.H = v[5], c.W = v[6];
  for (int a = 0; a < 2; ++a) {
    c.kernel[a] = v[7 + a], c.stride[a] = v[9 + a], c.before[a] = v[11 + a], c.dilation[a] = v[13 + a];
    c.out[a] = v[15 + a];
  }
  const int32_t bits[2] = {(int32_t)v[17], (int32_t)v[18]};
  memcpy(&c.least, bits, 4), memcpy(&c.most, bits + 1, 4);
  const int64_t taps = c.kernel[0] * c.kernel[1];
  bool fits = c.N >= 0 && c.C >= 0 && c.H >= 0 && c.W >= 0 && taps <= kMostTaps && c.C * taps == (w ? w->I : bundles->I) &&
              (w || taps == bundles->taps);
  for (int a = 0; a < 2; ++a)
    fits = fits && c.kernel[a] > 0 && c.stride[a] > 0 && c.before[a] >= 0 && c.dilation[a] > 0 && c.out[a] >= 0;
  if (!fits) {
    PyErr_SetString(PyExc_ValueError, "the convolution does not fit the matrix");
    return nullptr;
  }
  bool enough;
  Py_BEGIN_ALLOW_THREADS
  const void* x = address<void>(v[0]);
  void* y = (void*)(intptr_t)v[1];
  enough = w ? run_conv(*w, *active_conv, c, x, y, v[19]) : run_conv(*bundles, *active_conv, c, x, y, v[19]);
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// plan_lanes(codes, stored, scales, groups or 0, order, steps, starts, sums, bias or 0, O, I, group, height) -> plan of bf16,
// where `stored` steps are there
PyObject* plan_lanes(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[13];
  if (!integers(args, count, 13, v)) return nullptr;
  Lanes w = {};
  w.codes = address<uint8_t>(v[0]), w.scales = address<BF16>(v[2]), w.groups = address<uint8_t>(v[3]);
  w.order = address<uint8_t>(v[4]), w.steps = address<uint8_t>(v[5]), w.starts = address<int64_t>(v[6]);
  w.sums = address<float>(v[7]), w.bias = address<float>(v[8]);
  w.O = v[9], w.I = v[10], w.group = v[11], w.height = v[12];
  bool fits = w.O >= 0 && w.I >= 0 && (w.group == 16 || w.group == 32) && w.I % w.group == 0 && w.height >= kLaneRows &&
              w.height <= kLaneChunk && w.height % kLaneRows == 0;
  if (fits && !all_stored(w)) {
    const int64_t tiles = lane_tiles(w), slices = w.height / kLaneRows, last = w.I / w.group - (tiles - 1) * kLaneGroups;
    fits = w.starts[0] == 0;
    for (int64_t at = 0; fits && at < lane_chunks(w) * tiles; ++at) {
      int64_t steps = 0;
      for (int64_t s = 0; s < slices; ++s) steps += w.steps[at * slices + s];
      fits = w.starts[at + 1] - w.starts[at] == steps;
      for (int64_t r = 0; r < w.height; ++r) fits = fits && w.order[at * w.height + r] < w.height;
      if (at % tiles != tiles - 1 || last == kLaneGroups) continue;
      for (int64_t k = w.starts[at] * 8; fits && k < w.starts[at + 1] * 8; ++k)
        fits = (w.groups[k] & 15) < last && (w.groups[k] >> 4) < last;
    }
  }
  if (!fits || steps_before(w, lane_chunks(w)) != v[1]) {
    PyErr_SetString(PyExc_ValueError, "the steps do not match the matrix");
    return nullptr;
  }
  return plan_of(w, kBF16);
}

const Lanes* lanes_of(PyObject* const* args, Py_ssize_t count) {
  const Lanes* w = count ? (const Lanes*)PyCapsule_GetPointer(args[0], Plan<Lanes>::name) : nullptr;
  if (!PyErr_Occurred() && !active_lanes) PyErr_SetString(PyExc_ValueError, "the kernels in use have no lanes");
  return w;
}

// run_lanes(plan, x, rows, y, threads): y [rows, O] = x [rows, I] times the matrix, and the bias
PyObject* run_lanes_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[4];
  const Lanes* w = lanes_of(args, count);
  if (PyErr_Occurred() || !integers(args + 1, count - 1, 4, v)) return nullptr;
  bool enough;
  Py_BEGIN_ALLOW_THREADS
  enough = run_lanes(*w, *active_lanes, address<BF16>(v[0]), v[1], (BF16*)(intptr_t)v[2], v[3]);
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// expand_lanes(plan, begin, end, out, threads): rows [begin, end) of the matrix, dense, to out [end - begin, I]; begin is a
// multiple of the chunks' height, and end too or the last row
PyObject* expand_lanes_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[4];
  const Lanes* w = lanes_of(args, count);
  if (PyErr_Occurred() || !integers(args + 1, count - 1, 4, v)) return nullptr;
  if (v[0] < 0 || v[1] < v[0] || v[1] > w->O || v[0] % w->height || (v[1] % w->height && v[1] != w->O)) {
    PyErr_SetString(PyExc_ValueError, "rows outside of the matrix, or parts of chunks");
    return nullptr;
  }
  Py_BEGIN_ALLOW_THREADS
  expand_lanes(*w, *active_lanes, v[0] / w->height, (v[1] + w->height - 1) / w->height, (BF16*)(intptr_t)v[2], v[3]);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

// has_bytes() -> whether the set of kernels in use multiplies bytes in fours
PyObject* has_bytes(PyObject*, PyObject*) { return PyBool_FromLong(active->bytes != nullptr); }

// has_lanes(): whether the kernels in use have any
PyObject* has_lanes(PyObject*, PyObject*) { return PyBool_FromLong(active_lanes != nullptr); }

void free_decoder(PyObject* capsule) {
  Decoder* d = (Decoder*)PyCapsule_GetPointer(capsule, Plan<Decoder>::name);
  PyMem_Free((void*)d->layers);
  PyMem_Free(d);
}

// plan_decoder(parts, norms, numbers, layers, D, F, heads, kv_heads, head, dtype) -> plan. `parts`: a list of the plans of
// all matrices, which the caller keeps. `norms`: int64 [layers, 4], addresses of input_norm, mlp_norm, query_norm or 0,
// key_norm or 0; and one more, of the norm behind the last layer. `numbers`: float64, eps and scale.
PyObject* plan_decoder(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[9];
  if (!count || !integers(args + 1, count - 1, 9, v)) return nullptr;
  const int64_t layers = v[2];
  const int64_t* norms = address<int64_t>(v[0]);
  Decoder made = {};
  made.count = layers, made.D = v[3], made.F = v[4], made.heads = v[5], made.kv_heads = v[6], made.head = v[7];
  made.dtype = (int)v[8];
  made.eps = (float)address<double>(v[1])[0], made.scale = (float)address<double>(v[1])[1];
  bool fits = layers > 0 && PyList_Size(args[0]) == layers * kParts && made.kv_heads > 0 && made.head > 0 &&
              made.heads % made.kv_heads == 0 && made.head <= kMostHead && made.head % 2 == 0 && made.dtype >= 0 &&
              made.dtype <= kF32;
  DecoderLayer* kept = fits ? (DecoderLayer*)PyMem_Malloc((size_t)layers * sizeof(DecoderLayer)) : nullptr;
  Decoder* decoder = (Decoder*)PyMem_Malloc(sizeof(Decoder));
  const int64_t queries = made.heads * made.head, keys = made.kv_heads * made.head;
  const int64_t outputs[kParts] = {queries, keys, keys, made.D, made.F, made.F, made.D};
  const int64_t inputs[kParts] = {made.D, made.D, made.D, queries, made.D, made.D, made.F};
  for (int64_t i = 0; kept && i < layers; ++i) {
    for (int k = 0; k < kParts; ++k) {
      PyObject* part = PyList_GetItem(args[0], i * kParts + k);
      Linear& to = kept[i].parts[k];
      to = {};
      if (PyCapsule_IsValid(part, Plan<Tiles>::name)) {
        to.tiles = (const Tiles*)PyCapsule_GetPointer(part, Plan<Tiles>::name);
        fits = fits && to.tiles->O == outputs[k] && to.tiles->I == inputs[k] && to.tiles->dtype == made.dtype;
      } else if (PyCapsule_IsValid(part, Plan<Lanes>::name)) {
        made.needs_lanes = true;
        to.lanes = (const Lanes*)PyCapsule_GetPointer(part, Plan<Lanes>::name);
        fits = fits && to.lanes->O == outputs[k] && to.lanes->I == inputs[k] && made.dtype == kBF16;
      } else if (PyCapsule_IsValid(part, Plan<Matrix>::name)) {
        to.matrix = (const Matrix*)PyCapsule_GetPointer(part, Plan<Matrix>::name);
        fits = fits && to.matrix->O == outputs[k] && to.matrix->I == inputs[k] && to.matrix->dtype == made.dtype;
      } else {
        fits = false;
      }
    }
    kept[i].input_norm = address<float>(norms[4 * i]), kept[i].mlp_norm = address<float>(norms[4 * i + 1]);
    kept[i].query_norm = address<float>(norms[4 * i + 2]), kept[i].key_norm = address<float>(norms[4 * i + 3]);
  }
  PyObject* capsule = nullptr;
  if (!fits)
    PyErr_SetString(PyExc_ValueError, "the matrices do not fit each other");
  else if (!kept || !decoder)
    PyErr_NoMemory();
  else
    capsule = PyCapsule_New(decoder, Plan<Decoder>::name, free_decoder);
  if (!capsule) {
    PyMem_Free(kept);
    PyMem_Free(decoder);
    return nullptr;
  }
  made.layers = kept, made.norm = address<float>(norms[4 * layers]);
  *decoder = made;
  return capsule;
}

// decode(plan, x, rows, cos, sin, caches, cache_batch, cache_head, length, mask or 0, y, threads): one token of `rows`
// sequences through all layers. `caches`: int64 [layers, 2], addresses of keys and values.
PyObject* decode_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[11];
  const Decoder* d = count ? (const Decoder*)PyCapsule_GetPointer(args[0], Plan<Decoder>::name) : nullptr;
  if (PyErr_Occurred() || !integers(args + 1, count - 1, 11, v)) return nullptr;
  Token token = {};
  token.x = address<void>(v[0]), token.rows = v[1], token.cos = address<void>(v[2]), token.sin = address<void>(v[3]);
  token.caches = address<Cache>(v[4]), token.cache_batch = v[5], token.cache_head = v[6], token.length = v[7];
  token.mask = address<uint8_t>(v[8]), token.y = (void*)(intptr_t)v[9];
  if (token.rows < 0 || token.length < 1) {
    PyErr_SetString(PyExc_ValueError, "a token has its place in a sequence of at least one");
    return nullptr;
  }
  if (d->needs_lanes && !active_lanes) {
    PyErr_SetString(PyExc_ValueError, "the kernels in use have no lanes");
    return nullptr;
  }
  bool enough;
  Py_BEGIN_ALLOW_THREADS
  enough = decode(*d, token, *active, *active_tiles, active_lanes, active_decoder[d->dtype], v[10]);
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// gram(x, T, I, sum, packed) -> whether this CPU could: sum [I, I] += xᵀx, upper triangle, x fp32 read as bf16
PyObject* gram_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[5];
  if (!integers(args, count, 5, v)) return nullptr;
  bool done;
  Py_BEGIN_ALLOW_THREADS
  done = gram(address<float>(v[0]), v[1], v[2], (float*)(intptr_t)v[3], (uint32_t*)(intptr_t)v[4]);
  Py_END_ALLOW_THREADS
  return PyBool_FromLong(done);
}

// attention(q, k, v, out, packed, heads, T, D, scale in millionths, causal) -> whether this CPU could
PyObject* attention_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[10];
  if (!integers(args, count, 10, v)) return nullptr;
  int result;
  Py_BEGIN_ALLOW_THREADS
  result = attention(address<uint16_t>(v[0]), address<uint16_t>(v[1]), address<uint16_t>(v[2]), (uint16_t*)(intptr_t)v[3],
                     (uint32_t*)(intptr_t)v[4], v[5], v[6], v[7], (float)((double)v[8] * 1e-6), v[9] != 0);
  Py_END_ALLOW_THREADS
  if (result == 2) return PyErr_NoMemory();
  return PyBool_FromLong(result == 0);
}

// Whether offsets begin at 0, never fall and end at A.
bool rises(const int64_t* offsets, int64_t E, int64_t A) {
  bool fits = E >= 0 && offsets[0] == 0 && offsets[E] == A;
  for (int64_t e = 0; fits && e < E; ++e) fits = offsets[e] <= offsets[e + 1];
  return fits;
}

// Whether the row of each assignment is one of `rows`; null: assignment a has row a.
bool inside(const int64_t* row, int64_t A, int64_t rows) {
  bool fits = row || A <= rows;
  for (int64_t a = 0; fits && row && a < A; ++a) fits = row[a] >= 0 && row[a] < rows;
  return fits;
}

// stage(x, x_rows, x_stride, gather or 0, offsets, E, I, w, w_expert, w_output, w_input, bias or 0, columns, first, step,
// finish, act, alpha and limit in millionths, scale or 0, scatter or 0, y, rows, assignments, dtype, threads)
PyObject* stage_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[26];
  if (!integers(args, count, 26, v)) return nullptr;
  Stage s = {};
  s.x = address<void>(v[0]), s.x_stride = v[2], s.gather = address<int64_t>(v[3]), s.offsets = address<int64_t>(v[4]);
  s.E = v[5], s.I = v[6], s.w = address<void>(v[7]), s.w_expert = v[8], s.w_output = v[9], s.w_input = v[10];
  s.bias = address<void>(v[11]), s.columns = v[12], s.first = v[13], s.step = v[14], s.finish = (int)v[15];
  s.act = (int)v[16], s.alpha = (float)((double)v[17] * 1e-6), s.limit = (float)((double)v[18] * 1e-6);
  s.scale = address<float>(v[19]), s.scatter = address<int64_t>(v[20]), s.y = (void*)(intptr_t)v[21], s.rows = v[22];
  s.dtype = (int)v[24];
  const int64_t A = v[23], x_rows = v[1];
  const bool fits = s.dtype >= 0 && s.dtype <= kF32 && (s.w_output == 1 || s.w_input == 1) && s.step >= 1 && s.step <= 2 &&
                    (s.finish == kScatter || s.finish == kAdd) == (s.scatter != nullptr) && rises(s.offsets, s.E, A) &&
                    inside(s.gather, A, x_rows) && (!s.scatter || inside(s.scatter, A, s.rows));
  if (!fits) {
    PyErr_SetString(PyExc_ValueError, "the plan does not fit the tensors");
    return nullptr;
  }
  bool enough;
  Py_BEGIN_ALLOW_THREADS
  enough = run_stage(s, active_grouped->stage[s.dtype], v[25]);
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// hidden(products, width, first, step, act, alpha and limit in millionths, hidden, gradient or 0, scale or 0, to_products or 0,
// to_scale or 0, assignments, dtype, threads)
PyObject* hidden_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[15];
  if (!integers(args, count, 15, v)) return nullptr;
  Hidden h = {};
  h.products = address<void>(v[0]), h.width = v[1], h.first = v[2], h.step = v[3], h.act = (int)v[4];
  h.alpha = (float)((double)v[5] * 1e-6), h.limit = (float)((double)v[6] * 1e-6);
  h.hidden = (void*)(intptr_t)v[7], h.gradient = address<void>(v[8]), h.scale = address<float>(v[9]);
  h.to_products = (void*)(intptr_t)v[10], h.to_scale = (float*)(intptr_t)v[11], h.A = v[12], h.dtype = (int)v[13];
  const bool halves = h.step == 1 && (h.first == 0 || h.first == h.width), pairs = h.step == 2 && h.first == 1;
  if (h.dtype < 0 || h.dtype > kF32 || !(halves || pairs) || (h.gradient && !h.to_products)) {
    PyErr_SetString(PyExc_ValueError, "not a hidden layer");
    return nullptr;
  }
  Py_BEGIN_ALLOW_THREADS
  run_hidden(h, active_grouped->hidden[h.dtype], v[14]);
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

// outer(g, g_row_count, g_stride, g_rows or 0, x, x_row_count, x_stride, x_rows or 0, offsets, E, O, I, y, assignments, dtype,
// threads)
PyObject* outer_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  long long v[16];
  if (!integers(args, count, 16, v)) return nullptr;
  Outer s = {};
  s.g = address<void>(v[0]), s.g_stride = v[2], s.g_rows = address<int64_t>(v[3]);
  s.x = address<void>(v[4]), s.x_stride = v[6], s.x_rows = address<int64_t>(v[7]), s.offsets = address<int64_t>(v[8]);
  s.E = v[9], s.O = v[10], s.I = v[11], s.y = (void*)(intptr_t)v[12], s.dtype = (int)v[14];
  const int64_t A = v[13];
  if (!(s.dtype >= 0 && s.dtype <= kF32 && rises(s.offsets, s.E, A) && inside(s.g_rows, A, v[1]) && inside(s.x_rows, A, v[5]))) {
    PyErr_SetString(PyExc_ValueError, "the plan does not fit the tensors");
    return nullptr;
  }
  bool enough;
  Py_BEGIN_ALLOW_THREADS
  enough = run_outer(s, active_grouped->outer[s.dtype], v[15]);
  Py_END_ALLOW_THREADS
  if (!enough) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

// features() -> what the CPU has, as a list of names
PyObject* features(PyObject*, PyObject*) {
  const char* names[kMostFeatures];
  const int count = cpu_features(names);
  PyObject* list = PyList_New(count);
  for (int i = 0; list && i < count; ++i) PyList_SetItem(list, i, PyUnicode_FromString(names[i]));
  return list;
}

// kernels() -> [(name, first missing feature or None)], best first
PyObject* kernels(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (const Choice& choice : choices) {
    PyObject* entry = list ? Py_BuildValue("(sz)", choice.name, missing(choice)) : nullptr;
    if (!entry || PyList_Append(list, entry) < 0) {
      Py_XDECREF(entry);
      Py_XDECREF(list);
      return nullptr;
    }
    Py_DECREF(entry);
  }
  return list;
}

PyObject* current(PyObject*, PyObject*) { return PyUnicode_FromString(active->name); }

// force(name or None): use those kernels from now on; None is the best that this CPU has
PyObject* force(PyObject*, PyObject* name) {
  PyObject* bytes = name == Py_None ? nullptr : PyUnicode_AsUTF8String(name);
  if (name != Py_None && !bytes) return nullptr;
  const char* wanted = bytes ? PyBytes_AsString(bytes) : nullptr;
  const Choice* found = nullptr;
  for (const Choice& choice : choices)
    if (!found && (!wanted || !strcmp(wanted, choice.name)) && !missing(choice)) found = &choice;
  Py_XDECREF(bytes);
  if (!found) {
    PyErr_Format(PyExc_ValueError, "no kernels %R on this CPU", name);
    return nullptr;
  }
  take(*found);
  Py_RETURN_NONE;
}

// set_parallel_for(address or 0): the loop over PyTorch's threads
PyObject* set_parallel_for(PyObject*, PyObject* value) {
  const long long address = PyLong_AsLongLong(value);
  if (address == -1 && PyErr_Occurred()) return nullptr;
  use_torch_threads((TorchParallelFor)(intptr_t)address);
  Py_RETURN_NONE;
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return (PyCFunction)(void (*)(void))function;
}

PyMethodDef methods[] = {
    {"plan_bitmask", fast(plan_bitmask), METH_FASTCALL, "(values, count, mask, row_starts, bias, O, I, dtype) -> plan"},
    {"plan_coded", fast(plan_coded), METH_FASTCALL,
     "(values, stored, mask, row_starts, scales, zeros, bias, O, I, group, dtype, sums) -> plan"},
    {"plan_dense", fast(plan_dense), METH_FASTCALL, "(values, bias, O, I, dtype) -> plan"},
    {"plan_block", fast(plan_block), METH_FASTCALL,
     "(values, blocks, columns, row_starts, scales, sums, bias, O, I, r, c, dtype) -> plan"},
    {"run_bytes", fast(run_bytes_of), METH_FASTCALL, "(plan, x, rows, y, each, threads), for int8 and many rows"},
    {"run", fast(run), METH_FASTCALL, "(plan, x, rows, y, threads)"},
    {"run_blocks", fast(run_blocks_of), METH_FASTCALL, "(plan, x, rows, y, threads), for blocks and many rows"},
    {"expand", fast(expand), METH_FASTCALL, "(plan, begin, end, out, threads)"},
    {"nm_bitmask", fast(nm_bitmask_of), METH_FASTCALL, "(codes, O, I, n, m, out)"},
    {"lay_out_tiles", fast(lay_out_tiles_of), METH_FASTCALL,
     "(columns, wide, row_starts, O, I, count, height, order, steps, starts) -> stored"},
    {"fill_tiles", fast(fill_tiles_of), METH_FASTCALL, "Values and columns of tiles; see fill_tiles_of."},
    {"plan_tiles", fast(plan_tiles), METH_FASTCALL,
     "(values, columns, order, steps, starts, bias, O, I, height, dtype) -> plan"},
    {"run_tiles", fast(run_tiles_of), METH_FASTCALL, "(plan, x, rows, y, threads)"},
    {"plan_taps", fast(plan_taps), METH_FASTCALL,
     "(values, count, offsets, starts, order, bias, O, I, part, dtype) -> plan"},
    {"plan_bundles", fast(plan_bundles), METH_FASTCALL,
     "(values, steps, codes, starts, bias, O, I, taps, dtype) -> plan"},
    {"run_conv", fast(run_conv_of), METH_FASTCALL, "A convolution; see run_conv_of."},
    {"plan_lanes", fast(plan_lanes), METH_FASTCALL,
     "(codes, stored, scales, groups, order, steps, starts, sums, bias, O, I, group, height) -> plan"},
    {"run_lanes", fast(run_lanes_of), METH_FASTCALL, "(plan, x, rows, y, threads)"},
    {"expand_lanes", fast(expand_lanes_of), METH_FASTCALL, "(plan, begin, end, out, threads), whole chunks"},
    {"has_bytes", has_bytes, METH_NOARGS, "Whether the set of kernels in use has products of bytes."},
    {"has_lanes", has_lanes, METH_NOARGS, "Whether the set of kernels in use has lanes."},
    {"plan_decoder", fast(plan_decoder), METH_FASTCALL,
     "(parts, norms, numbers, layers, D, F, heads, kv_heads, head, dtype) -> plan"},
    {"decode", fast(decode_of), METH_FASTCALL, "One token through all layers; see decode_of."},
    {"gram", fast(gram_of), METH_FASTCALL, "(x, T, I, sum, packed) -> whether this CPU could"},
    {"attention", fast(attention_of), METH_FASTCALL,
     "(q, k, v, out, packed, heads, T, D, scale in millionths, causal) -> whether this CPU could"},
    {"stage", fast(stage_of), METH_FASTCALL, "One step of a layer of experts; see stage_of."},
    {"outer", fast(outer_of), METH_FASTCALL, "Gradients of the weights of a layer of experts; see outer_of."},
    {"hidden", fast(hidden_of), METH_FASTCALL, "A hidden layer of experts, or its gradients; see hidden_of."},
    {"row_starts", fast(row_starts), METH_FASTCALL, "(mask, O, I, out)"},
    {"features", features, METH_NOARGS, "Features of this CPU that kernels ask for."},
    {"kernels", kernels, METH_NOARGS, "Sets of kernels and the first feature that each misses here."},
    {"current", current, METH_NOARGS, "The set of kernels in use."},
    {"force", force, METH_O, "Use this set of kernels; None for the best."},
    {"set_parallel_for", set_parallel_for, METH_O, "Address of torch_parallel_for, or 0."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "pumice._native", "CPU kernels of Pumice.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace pumice

PyMODINIT_FUNC PyInit__native(void) {
  using namespace pumice;
  for (const Choice& choice : choices)
    if (!active && !missing(choice)) take(choice);
  return PyModule_Create(&definition);
}
