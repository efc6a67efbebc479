#pragma once

#include <stdint.h>

namespace pumice {

// The bitmask [O, ceil(I / 8)] of an N:M matrix; m divides I and is at most 32. False if a code is out of range.
bool nm_bitmask(const uint8_t* codes, int64_t O, int64_t I, int n, int m, uint8_t* out);

}  // namespace pumice
