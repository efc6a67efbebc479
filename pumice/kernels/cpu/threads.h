#pragma once

#include <stddef.h>
#include <stdint.h>

namespace pumice {

typedef void (*Piece)(int64_t begin, int64_t end, void* context);

// PyTorch's own loop over its own threads (C symbol torch_parallel_for), whose address Python hands over.
typedef int32_t (*TorchParallelFor)(int64_t begin, int64_t end, int64_t grain, Piece, void* context);
void use_torch_threads(TorchParallelFor);

// Runs pieces 0 … count - 1, each once, on up to `count` threads, and returns when all are done.
void parallel(int64_t count, Piece, void* context);

// Memory of the calling thread, 64-byte aligned, kept for the next call; slot 0 to 4. Null when there is none left.
void* scratch(int slot, size_t bytes);

}  // namespace pumice
