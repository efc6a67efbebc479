#pragma once

#include <stdint.h>

namespace pumice {

constexpr int kMostFeatures = 32;

// Names of the features that kernels may ask for, as Linux spells them; returns how many.
int cpu_features(const char** names);
bool cpu_has(const char* name);

}  // namespace pumice
