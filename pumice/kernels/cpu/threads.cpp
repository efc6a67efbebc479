// Threads: PyTorch's where its loop can be called from C, else a few of our own.
#include "threads.h"

#include <stdlib.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <unistd.h>
#endif

namespace pumice {
namespace {

TorchParallelFor torch_parallel_for = nullptr;

// Workers wait for pieces; the caller works too. One loop at a time: a second caller runs its pieces alone.
class Pool {
 public:
  void run(int64_t count, Piece piece, void* context) {
    std::unique_lock<std::mutex> turn(one_at_a_time_, std::try_to_lock);
    if (!turn.owns_lock()) return piece(0, count, context);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while ((int64_t)workers_.size() + 1 < count) workers_.emplace_back([this] { work(); });
      piece_ = piece, context_ = context, next_ = 0, count_ = count, left_ = count;
    }
    wake_.notify_all();
    take();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return left_ == 0; });
    count_ = 0;
  }

 private:
  void take() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (next_ < count_) {
      const int64_t mine = next_++;
      lock.unlock();
      piece_(mine, mine + 1, context_);
      lock.lock();
      if (--left_ == 0) done_.notify_all();
    }
  }

  void work() {
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [this] { return next_ < count_; });
      }
      take();
    }
  }

  std::mutex one_at_a_time_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Piece piece_ = nullptr;
  void* context_ = nullptr;
  int64_t next_ = 0, count_ = 0, left_ = 0;
};

// Never destroyed: its workers never end, and joining them at exit would hang. After a fork the child has none of
// the parent's threads, so it starts a pool of its own.
Pool& pool() {
  static std::mutex guard;
  static Pool* current = nullptr;
  static long owner = -1;
#if defined(_WIN32)
  const long self = 0;
#else
  const long self = (long)getpid();
#endif
  std::lock_guard<std::mutex> lock(guard);
  if (owner != self) current = new Pool, owner = self;
  return *current;
}

struct Buffer {
  void* start = nullptr;
  size_t size = 0;
  ~Buffer() { free(start); }
};

}  // namespace

void use_torch_threads(TorchParallelFor function) { torch_parallel_for = function; }

void parallel(int64_t count, Piece piece, void* context) {
  if (count <= 1)
    piece(0, count, context);
  else if (torch_parallel_for)
    torch_parallel_for(0, count, 1, piece, context);
  else
    pool().run(count, piece, context);
}

void* scratch(int slot, size_t bytes) {
  static thread_local Buffer buffers[5];
  Buffer& buffer = buffers[slot];
  if (buffer.size < bytes + 64) {
    free(buffer.start);
    buffer.size = bytes + bytes / 4 + 64;
    buffer.start = malloc(buffer.size);
    if (!buffer.start) {
      buffer.size = 0;
      return nullptr;
    }
  }
  return (void*)(((uintptr_t)buffer.start + 63) & ~(uintptr_t)63);
}

}  // namespace pumice
