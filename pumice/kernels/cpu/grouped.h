// Products of rows of x with one weight for each expert: what a layer of a mixture of experts is made of.
//
// A stage is gather → product → finish. The finish is one of: store; scale and add to the rows of a result; or the
// activation of a pair of outputs, gate and up. Two stages are the whole multilayer perceptron of an expert. Weights are
// read where they are, rows or columns side by side, and are never copied as a whole.
#pragma once

#include <stdint.h>

namespace pumice {

enum Finish { kStore = 0, kScatter = 1, kActivate = 2, kGate = 3 };
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
  const int64_t* scatter;     // [A] row of y, for kScatter
  void* y;                    // [A or rows, columns], without gaps
  int64_t rows;               // of y, for kScatter
  int dtype;                  // of x, w, bias and y
};

// Columns [begin, end) of the result of all assignments; false when memory ran out.
typedef bool (*StagePiece)(const Stage&, int64_t begin, int64_t end);

// Null where this build has no such code; by dtype: bf16, fp32.
const StagePiece* portable_stages();
const StagePiece* avx2_stages();
const StagePiece* avx512_stages();
const StagePiece* avx512_bf16_stages();

// False when memory ran out. Pieces are ranges of columns, the same work each, taken by whichever thread is free.
bool run_stage(const Stage&, StagePiece, int64_t threads);

}  // namespace pumice
