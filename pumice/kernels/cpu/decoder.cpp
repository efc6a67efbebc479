// The walk through a decoder's layers: every thread walks all of them, does its share of each step and waits for the others.
//
// A step of a small model takes a few microseconds, about as long as starting a loop over threads, so they are started once
// a token and meet at barriers. What is short and the same for all (norms, sums) each thread does for itself.
#include "decoder.h"

#include <atomic>
#include <thread>

#include "linear.h"
#include "threads.h"

namespace pumice {
namespace {

const int64_t kBytesPerThread = 256 * 1024;  // of a layer's weights and cache, below which another thread costs more

inline void pause() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_ia32_pause();
#endif
}

// `count` pieces meet here again and again. Waiting is busy, since it is short, but gives way where threads lack cores.
class Barrier {
 public:
  explicit Barrier(int64_t count) : count_(count) {}

  void wait(int64_t pieces) {
    const int64_t turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(pieces, std::memory_order_acq_rel) + pieces == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins)
      if (spins < 2000)
        pause();
      else
        std::this_thread::yield();
  }

 private:
  std::atomic<int64_t> arrived_{0}, turn_{0};
  const int64_t count_;
};

// What all threads see: results of steps, each at a multiple of 64 bytes.
struct Shared {
  char *q, *k, *v, *mixed, *gate, *up, *gated, *sum;
};

struct Walk {
  const Decoder& d;
  const Token& token;
  const Kernels& kernels;
  const TileKernels& tiles;
  const LaneKernels* lanes;
  const DecoderKernels& pieces;
  Shared shared;
  int64_t count;  // of pieces
  Barrier barrier;
  std::atomic<bool> out_of_memory{false};

  int64_t size() const { return element_size(d.dtype); }
};

int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// One thread's pieces [first, last) of every step.
class Walker {
 public:
  Walker(Walk& walk, int64_t first, int64_t last) : w_(walk), d_(walk.d), t_(walk.token), first_(first), last_(last) {
    // A thread without memory still comes to the barriers.
    const int64_t numbers = t_.rows * d_.D;
    char* room = (char*)scratch(3, (size_t)(rounded(numbers * 4) + numbers * w_.size()));
    x_ = (float*)room, normed_ = room ? room + rounded(numbers * 4) : nullptr;
    if (!room) fail();
  }

  void run() {
    if (ok()) w_.pieces.widen(t_.x, t_.rows * d_.D, x_);
    for (int64_t i = 0; i < d_.count; ++i) layer(d_.layers[i], t_.caches[i]);
    if (ok() && first_ == 0) norm(d_.norm, (char*)t_.y);
  }

 private:
  bool ok() const { return x_ != nullptr; }

  void fail() {
    x_ = nullptr;
    w_.out_of_memory = true;
  }

  void meet() { w_.barrier.wait(last_ - first_); }

  // Begin and end of this thread's share of n things.
  int64_t begin_of(int64_t n) const { return n * first_ / w_.count; }
  int64_t end_of(int64_t n) const { return n * last_ / w_.count; }

  void norm(const float* weight, char* out) {
    for (int64_t r = 0; r < t_.rows; ++r) w_.pieces.norm(x_ + r * d_.D, weight, d_.D, d_.eps, out + r * d_.D * w_.size());
  }

  // This thread's share of matrices that read the same x.
  void products(const DecoderLayer& layer, int part, int count, const void* x, void* const* y) {
    const Matrix* matrices[kMostMatrices];
    void* results[kMostMatrices];
    int found = 0;
    for (int k = 0; k < count && ok(); ++k) {
      const Linear& linear = layer.parts[part + k];
      if (linear.matrix)
        matrices[found] = linear.matrix, results[found++] = y[k];
      else if (linear.tiles ? !run_tiles_share(*linear.tiles, w_.tiles, x, t_.rows, y[k], first_, last_, w_.count)
                            : !run_lanes_share(*linear.lanes, *w_.lanes, (const BF16*)x, t_.rows, (BF16*)y[k], first_, last_,
                                                w_.count))
        fail();
    }
    if (ok() && found && !run_share(matrices, results, found, w_.kernels, x, t_.rows, first_, last_, w_.count)) fail();
    meet();
  }

  // Heads of queries and keys to their places in the sequence, and the new keys and values to the cache.
  void turn(const DecoderLayer& layer, const Cache& cache) {
    const int64_t size = w_.size(), bytes = d_.head * size, all = d_.heads + 2 * d_.kv_heads, n = t_.rows * all;
    for (int64_t i = begin_of(n); i < end_of(n); ++i) {
      const int64_t r = i / all, h = i % all, k = (h - d_.heads) % d_.kv_heads;
      const char *cos = (const char*)t_.cos + r * bytes, *sin = (const char*)t_.sin + r * bytes;
      if (h < d_.heads) {
        w_.pieces.turn(w_.shared.q + (r * d_.heads + h) * bytes, 1, d_.head, layer.query_norm, d_.eps, cos, sin);
        continue;
      }
      const bool key = h < d_.heads + d_.kv_heads;
      char* from = (key ? w_.shared.k : w_.shared.v) + (r * d_.kv_heads + k) * bytes;
      if (key) w_.pieces.turn(from, 1, d_.head, layer.key_norm, d_.eps, cos, sin);
      const int64_t to = r * t_.cache_batch + k * t_.cache_head + (t_.length - 1) * d_.head;
      memcpy((char*)(key ? cache.keys : cache.values) + to * size, from, (size_t)bytes);
    }
    meet();
  }

  void attend(const Cache& cache) {
    const Attend all = {w_.shared.q, w_.shared.mixed, &cache, &d_, &t_};
    float* scores = (float*)scratch(0, (size_t)(kHeadsAtOnce * t_.length) * sizeof(float));
    if (!scores) fail();
    if (ok()) w_.pieces.attend(all, begin_of(t_.rows * d_.heads), end_of(t_.rows * d_.heads), scores);
    meet();
  }

  void gate() {
    const int64_t n = t_.rows * d_.F, begin = begin_of(n), end = end_of(n), at = begin * w_.size();
    w_.pieces.gate(w_.shared.gate + at, w_.shared.up + at, end - begin, w_.shared.gated + at);
    meet();
  }

  void layer(const DecoderLayer& layer, const Cache& cache) {
    void* const heads[] = {w_.shared.q, w_.shared.k, w_.shared.v};
    void* const pair[] = {w_.shared.gate, w_.shared.up};
    void* const sum[] = {w_.shared.sum};
    if (ok()) norm(layer.input_norm, normed_);
    products(layer, kQuery, 3, normed_, heads);
    turn(layer, cache);
    attend(cache);
    products(layer, kOutput, 1, w_.shared.mixed, sum);
    if (ok()) w_.pieces.add(w_.shared.sum, t_.rows * d_.D, x_), norm(layer.mlp_norm, normed_);
    products(layer, kGated, 2, normed_, pair);
    gate();
    products(layer, kDown, 1, w_.shared.gated, sum);
    if (ok()) w_.pieces.add(w_.shared.sum, t_.rows * d_.D, x_);
  }

  Walk& w_;
  const Decoder& d_;
  const Token& t_;
  const int64_t first_, last_;
  float* x_;      // [rows, D], each thread's own; null where memory ran out
  char* normed_;  // [rows, D]
};

// Called by each thread with the pieces that it got: all of them where there are no other threads.
void walk_pieces(int64_t first, int64_t last, void* context) { Walker(*(Walk*)context, first, last).run(); }

int64_t piece_count(const Decoder& d, const Token& token, int64_t threads) {
  int64_t bytes = 2 * token.rows * d.kv_heads * token.length * d.head * element_size(d.dtype);
  for (const Linear& part : d.layers[0].parts) {
    if (part.matrix) bytes += work_of(*part.matrix);
    if (part.tiles) bytes += part.tiles->starts[chunk_count(*part.tiles) * tile_count(*part.tiles)] * 3;
    if (part.lanes) bytes += work_of(*part.lanes);
  }
  const int64_t pieces = bytes / kBytesPerThread < threads ? bytes / kBytesPerThread : threads;
  return pieces < 1 ? 1 : pieces;
}

}  // namespace

bool decode(const Decoder& d, const Token& token, const Kernels& kernels, const TileKernels& tiles, const LaneKernels* lanes,
            const DecoderKernels& pieces, int64_t threads) {
  if (token.rows == 0) return true;
  const int64_t row = token.rows * element_size(d.dtype);
  const int64_t queries = rounded(d.heads * d.head * row), keys = rounded(d.kv_heads * d.head * row);
  const int64_t inner = rounded(d.F * row), width = rounded(d.D * row);
  char* room = (char*)scratch(4, (size_t)(2 * queries + 2 * keys + 3 * inner + width));
  if (!room) return false;
  Shared shared = {};
  char** const places[] = {&shared.q, &shared.mixed, &shared.k, &shared.v, &shared.gate, &shared.up, &shared.gated, &shared.sum};
  const int64_t bytes[] = {queries, queries, keys, keys, inner, inner, inner, width};
  for (int k = 0; k < 8; room += bytes[k++]) *places[k] = room;
  const int64_t count = piece_count(d, token, threads);
  Walk walk{d, token, kernels, tiles, lanes, pieces, shared, count, Barrier(count)};
  parallel(count, walk_pieces, &walk);
  return !walk.out_of_memory;
}

}  // namespace pumice
