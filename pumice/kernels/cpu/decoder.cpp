// The walk through a decoder's layers, its pieces shared out among threads.
#include "decoder.h"

#include "linear.h"
#include "threads.h"

namespace pumice {
namespace {

const int64_t kBytesPerThread = 64 * 1024;  // of keys and values below which another thread costs more than it gives
const int64_t kGatesPerThread = 4096;

struct Walk {
  const Decoder& d;
  const Token& token;
  const Kernels& kernels;
  const TileKernels& tiles;
  const DecoderKernels& pieces;
  int64_t threads;

  // Matrices that read the same x: all stored ones in one loop over the threads, tiles each in its own.
  bool run(const DecoderLayer& layer, int first, int count, const void* x, void* const* y) const {
    const Matrix* matrices[kMostMatrices];
    void* results[kMostMatrices];
    int found = 0;
    for (int k = 0; k < count; ++k) {
      const Linear& part = layer.parts[first + k];
      if (part.matrix)
        matrices[found] = part.matrix, results[found++] = y[k];
      else if (!run_tiles(*part.tiles, tiles, x, token.rows, y[k], threads))
        return false;
    }
    return !found || run_matrices(matrices, results, found, kernels, x, token.rows, threads);
  }

  void norm(const float* x, const float* weight, char* out) const {
    for (int64_t r = 0; r < token.rows; ++r)
      pieces.norm(x + r * d.D, weight, d.D, d.eps, out + r * d.D * element_size(d.dtype));
  }
};

struct Heads {
  const Attend* attend;
  const DecoderKernels* pieces;
  int64_t count, parts;
  bool out_of_memory;
};

void attend_parts(int64_t first, int64_t last, void* context) {
  Heads& job = *(Heads*)context;
  float* scores = (float*)scratch(0, (size_t)(kHeadsAtOnce * job.attend->token->length) * sizeof(float));
  if (!scores) {
    job.out_of_memory = true;
    return;
  }
  for (int64_t k = first; k < last; ++k)
    job.pieces->attend(*job.attend, job.count * k / job.parts, job.count * (k + 1) / job.parts, scores);
}

int64_t part_count(int64_t work, int64_t each, int64_t most) {
  const int64_t parts = work / each < most ? work / each : most;
  return parts < 1 ? 1 : parts;
}

bool attend(const Walk& walk, const Cache& cache, const void* q, void* out) {
  const Decoder& d = walk.d;
  const Token& token = walk.token;
  const Attend all = {q, out, &cache, &d, &token};
  Heads job = {&all, &walk.pieces, token.rows * d.heads, 1, false};
  const int64_t bytes = 2 * job.count * token.length * d.head * element_size(d.dtype);
  job.parts = part_count(bytes, kBytesPerThread, walk.threads < job.count ? walk.threads : job.count);
  parallel(job.parts, attend_parts, &job);
  return !job.out_of_memory;
}

struct Gates {
  const DecoderKernels* pieces;
  const char *gate, *up;
  char* out;
  int64_t count, parts, size;
};

void gate_parts(int64_t first, int64_t last, void* context) {
  const Gates& job = *(Gates*)context;
  for (int64_t k = first; k < last; ++k) {
    const int64_t begin = job.count * k / job.parts, end = job.count * (k + 1) / job.parts;
    job.pieces->gate(job.gate + begin * job.size, job.up + begin * job.size, end - begin, job.out + begin * job.size);
  }
}

// New keys or values [rows, kv_heads, head] to their place in the cache.
void append(const Walk& walk, const char* from, void* cache) {
  const Decoder& d = walk.d;
  const Token& token = walk.token;
  const int64_t size = element_size(d.dtype), bytes = d.head * size;
  for (int64_t r = 0; r < token.rows; ++r)
    for (int64_t h = 0; h < d.kv_heads; ++h) {
      const int64_t to = r * token.cache_batch + h * token.cache_head + (token.length - 1) * d.head;
      memcpy((char*)cache + to * size, from + (r * d.kv_heads + h) * bytes, (size_t)bytes);
    }
}

}  // namespace

bool decode(const Decoder& d, const Token& token, const Kernels& kernels, const TileKernels& tiles,
            const DecoderKernels& pieces, int64_t threads) {
  const Walk walk = {d, token, kernels, tiles, pieces, threads};
  const int64_t rows = token.rows, size = element_size(d.dtype);
  const int64_t queries = d.heads * d.head, keys = d.kv_heads * d.head;
  if (rows == 0) return true;
  // Each part begins at a multiple of 64 bytes.
  const int64_t width[] = {d.D * 4, d.D * size, queries * size, keys * size, keys * size, queries * size,
                           d.F * size, d.F * size, d.F * size};
  int64_t starts[10] = {};
  for (int k = 0; k < 9; ++k) starts[k + 1] = starts[k] + (rows * width[k] + 63) / 64 * 64;
  char* room = (char*)scratch(3, (size_t)starts[9]);
  if (!room) return false;
  float* x = (float*)room;
  char *normed = room + starts[1], *q = room + starts[2], *k = room + starts[3], *v = room + starts[4];
  char *mixed = room + starts[5], *gate = room + starts[6], *up = room + starts[7], *gated = room + starts[8];
  pieces.widen(token.x, rows * d.D, x);
  for (int64_t i = 0; i < d.count; ++i) {
    const DecoderLayer& layer = d.layers[i];
    const Cache& cache = token.caches[i];
    walk.norm(x, layer.input_norm, normed);
    void* const heads[] = {q, k, v};
    if (!walk.run(layer, kQuery, 3, normed, heads)) return false;
    for (int64_t r = 0; r < rows; ++r) {
      const char *cos = (const char*)token.cos + r * d.head * size, *sin = (const char*)token.sin + r * d.head * size;
      pieces.turn(q + r * queries * size, d.heads, d.head, layer.query_norm, d.eps, cos, sin);
      pieces.turn(k + r * keys * size, d.kv_heads, d.head, layer.key_norm, d.eps, cos, sin);
    }
    append(walk, k, cache.keys);
    append(walk, v, cache.values);
    void* const sum[] = {normed};
    if (!attend(walk, cache, q, mixed) || !walk.run(layer, kOutput, 1, mixed, sum)) return false;
    pieces.add(normed, rows * d.D, x);
    walk.norm(x, layer.mlp_norm, normed);
    void* const pair[] = {gate, up};
    if (!walk.run(layer, kGated, 2, normed, pair)) return false;
    Gates gates = {&pieces, gate, up, gated, rows * d.F, part_count(rows * d.F, kGatesPerThread, threads), size};
    parallel(gates.parts, gate_parts, &gates);
    if (!walk.run(layer, kDown, 1, gated, sum)) return false;
    pieces.add(normed, rows * d.D, x);
  }
  walk.norm(x, d.norm, (char*)token.y);
  return true;
}

}  // namespace pumice
