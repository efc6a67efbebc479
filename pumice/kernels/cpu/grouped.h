// Products of rows of x with one weight for each expert: what a layer of a mixture of experts is made of.
//
// A stage is gather → product → finish. The finish is one of: store; scale and add to the rows of a result; or the
// activation of a pair of outputs, gate and up. Two stages are the whole multilayer perceptron of an expert. Weights are
// read where they are, rows or columns side by side, and are never copied as a whole.
#pragma once

#include <stdint.h>

namespace pumice {

// kAdd: as kScatter, but that y is fp32 and holds sums already.
enum Finish { kStore = 0, kScatter = 1, kActivate = 2, kGate = 3, kAdd = 4 };
enum Act { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kRelu2 = 4, kSigmoid = 5, kClampedSwish = 6 };

struct Stage {
  const void* x;              // rows of I numbers
  int64_t x_stride;
  const int64_t* gather;      // [A] row of x of each assignment, or null: assignment a reads row a
  const int64_t* offsets;     // [E + 1] assignments of each expert
  int64_t E, I;
  const void* w;              // expert e, output o, input i at e * w_expert + o * w_output + i * w_input; one of the
  int64_t w_expert, w_output, w_input;  // last two is 1
  const void* bias;           // [E, outputs of w] or null
  int64_t columns;            // of the result: outputs of w, or half of them for kGate
  int64_t first, step;        // kGate: the gate of column c is output c * step, its partner c * step + first
  int finish, act;
  float alpha, limit;         // of kClampedSwish
  const float* scale;         // [A] or null
  const int64_t* scatter;     // [A] row of y, for kScatter and kAdd
  void* y;                    // [A or rows, columns], without gaps
  int64_t rows;               // of y, for kScatter and kAdd
  int dtype;                  // of x, w, bias and y
};

// The hidden layer between two stages where it is wanted on its own: the activation of stored products, or its gradients.
struct Hidden {
  const void* products;       // [A, width], or [A, 2 width] where there are gates
  int64_t width, first, step; // the gate of column c is number c * step, its partner c * step + first; no gates: first is 0
  int act;
  float alpha, limit;         // of kClampedSwish
  void* hidden;               // [A, width], with gradients times the scale
  const void* gradient;       // [A, width] of the hidden layer times the scale, may be `hidden` itself; null: no gradients
  const float* scale;         // [A] or null
  void* to_products;          // as products
  float* to_scale;            // [A] or null
  int64_t A;
  int dtype;                  // of all but the scale and its gradient
};

// The gradient of every expert's weight: y[e, o, i] is the sum of g[a, o] x[a, i] over the expert's assignments.
struct Outer {
  const void *g, *x;          // rows of O and of I numbers
  int64_t g_stride, x_stride;
  const int64_t *g_rows, *x_rows;  // [A] rows of each assignment, or null: assignment a reads row a
  const int64_t* offsets;     // [E + 1] assignments of each expert
  int64_t E, O, I;
  void* y;                    // [E, O, I]
  int dtype;                  // of g, x and y
};

// Columns [begin, end) of the result of all assignments; false when memory ran out.
typedef bool (*StagePiece)(const Stage&, int64_t begin, int64_t end);
// Assignments [begin, end).
typedef void (*HiddenPiece)(const Hidden&, int64_t begin, int64_t end);

// Outputs [begin, end) of expert e, at most kOuterPiece; false when memory ran out.
constexpr int64_t kOuterPiece = 256;
typedef bool (*OuterPiece)(const Outer&, int64_t e, int64_t begin, int64_t end);

struct GroupedKernels {  // by dtype: bf16, fp32
  StagePiece stage[2];
  HiddenPiece hidden[2];
  OuterPiece outer[2];
};

// Null where this build has no such code.
const GroupedKernels* portable_grouped();
const GroupedKernels* avx2_grouped();
const GroupedKernels* avx512_grouped();
const GroupedKernels* avx512_bf16_grouped();

// False when memory ran out. Pieces are ranges of columns, the same work each, taken by whichever thread is free.
bool run_stage(const Stage&, StagePiece, int64_t threads);
void run_hidden(const Hidden&, HiddenPiece, int64_t threads);
bool run_outer(const Outer&, OuterPiece, int64_t threads);

}  // namespace pumice
