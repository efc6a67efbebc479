#pragma once

#include <stdint.h>

namespace pumice {

// out = softmax(scale q kᵀ) v for bf16 q, k, v, out [heads, T, D], D even. `packed` has room for
// heads * (ceil(T / 64) * 64 * D / 2 + ceil(D / 64) * 64 * ceil(T / 2)) numbers.
// 0 when done, 1 where this CPU or this build cannot, 2 when memory ran out.
int attention(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out, uint32_t* packed, int64_t heads,
              int64_t T, int64_t D, float scale, bool causal);

}  // namespace pumice
