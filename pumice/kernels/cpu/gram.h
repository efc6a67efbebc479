#pragma once

#include <stdint.h>

namespace pumice {

// sum [I, I] += xᵀx for x [T, I], upper triangle of 64 x 64 tiles; `packed` has room for ceil(I / 64) * 64 *
// ceil(T / 2) numbers. False, with nothing done, where this CPU or this build cannot.
bool gram(const float* x, int64_t T, int64_t I, float* sum, uint32_t* packed);

}  // namespace pumice
