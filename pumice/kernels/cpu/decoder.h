// One token of each of a few sequences through all layers of a decoder: what lies between its matrices, fused.
//
// A layer is x += o(attention(rope(q, k), v)), x += down(silu(gate) · up), each behind a root mean square norm. x stays in
// fp32 from the first layer to the last; matrices read and write the dtype of the model.
#pragma once

#include "kernels.h"
#include "lanes.h"
#include "tiles.h"

namespace pumice {

constexpr int64_t kMostHead = 256;  // numbers of a head
constexpr int64_t kHeadsAtOnce = 4;  // that share one pass over keys and values

// One of them is set.
struct Linear {
  const Matrix* matrix;
  const Tiles* tiles;
  const Lanes* lanes;
};

enum Part { kQuery = 0, kKey = 1, kValue = 2, kOutput = 3, kGated = 4, kUp = 5, kDown = 6, kParts = 7 };

struct DecoderLayer {
  Linear parts[kParts];
  const float* input_norm;  // [D]
  const float* mlp_norm;    // [D]
  const float* query_norm;  // [head] or null: a norm of each head before it is turned
  const float* key_norm;
};

struct Decoder {
  const DecoderLayer* layers;
  int64_t count;
  int64_t D, F, heads, kv_heads, head;
  const float* norm;  // [D], behind the last layer
  float eps, scale;   // scale: of scores
  int dtype;
  bool needs_lanes;   // whether any matrix is in lanes
};

// Where a layer keeps its keys and values: sequence b, head h, token t at b * batch + h * head + t * D of a head.
struct Cache {
  void *keys, *values;
};

struct Token {
  const void* x;            // [rows, D]
  int64_t rows;
  const void *cos, *sin;    // [rows, head]
  const Cache* caches;      // [layers]
  int64_t cache_batch, cache_head;  // in numbers
  int64_t length;           // of the sequences with this token, which is written to place length - 1
  const uint8_t* mask;      // [rows, length], 0 for a token that is not there, or null
  void* y;                  // [rows, D], normed
};

struct Attend {
  const void* q;            // [rows, heads, head]
  void* out;
  const Cache* cache;
  const Decoder* decoder;
  const Token* token;
};

// By dtype: bf16, fp32.
struct DecoderKernels {
  void (*widen)(const void* x, int64_t n, float* out);
  void (*norm)(const float* x, const float* weight, int64_t n, float eps, void* out);
  void (*add)(const void* y, int64_t n, float* x);
  // `heads` heads in place: normed where there is a norm, then turned.
  void (*turn)(void* x, int64_t heads, int64_t head, const float* norm, float eps, const void* cos, const void* sin);
  // Heads [begin, end) of all sequences; `scores` has room for kHeadsAtOnce * length.
  void (*attend)(const Attend&, int64_t begin, int64_t end, float* scores);
  void (*gate)(const void* gate, const void* up, int64_t n, void* out);
};

// Null where this build has no such code.
const DecoderKernels* portable_decoder();
const DecoderKernels* avx2_decoder();
const DecoderKernels* avx512_decoder();
const DecoderKernels* avx512_bf16_decoder();

// False when memory ran out.
bool decode(const Decoder&, const Token&, const Kernels&, const TileKernels&, const LaneKernels*, const DecoderKernels&,
            int64_t threads);

}  // namespace pumice
