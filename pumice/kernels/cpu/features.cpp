// What this CPU can do and the operating system allows, by cpuid; nothing on other architectures.
#include "features.h"

#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#else
#include <cpuid.h>
#endif

namespace pumice {
namespace {

struct Registers {
  uint32_t a, b, c, d;
};

Registers cpuid(uint32_t leaf, uint32_t sub) {
  Registers r = {0, 0, 0, 0};
#if defined(_MSC_VER) && !defined(__clang__)
  int out[4];
  __cpuidex(out, (int)leaf, (int)sub);
  r = {(uint32_t)out[0], (uint32_t)out[1], (uint32_t)out[2], (uint32_t)out[3]};
#else
  __cpuid_count(leaf, sub, r.a, r.b, r.c, r.d);
#endif
  return r;
}

// XCR0: which register files the operating system saves; without its word the instructions fault.
uint64_t saved_registers() {
#if defined(_MSC_VER) && !defined(__clang__)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return ((uint64_t)high << 32) | low;
#endif
}

bool bit(uint32_t word, int index) { return (word >> index) & 1; }

}  // namespace

int cpu_features(const char** names) {
  const uint32_t leaves = cpuid(0, 0).a;
  if (leaves < 7) return 0;
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  const Registers more = seven.a >= 1 ? cpuid(7, 1) : Registers{0, 0, 0, 0};
  const uint64_t saved = bit(one.c, 27) ? saved_registers() : 0;
  const bool ymm = (saved & 0x6) == 0x6, zmm = ymm && (saved & 0xe0) == 0xe0, tiles = (saved & 0x60000) == 0x60000;
  const struct {
    const char* name;
    bool has;
  } table[] = {
      {"popcnt", bit(one.c, 23)},
      {"bmi2", bit(seven.b, 3) && bit(seven.b, 8)},
      {"avx2", ymm && bit(one.c, 28) && bit(seven.b, 5)},
      {"fma", ymm && bit(one.c, 12)},
      {"f16c", ymm && bit(one.c, 29)},
      {"avx_vnni", ymm && bit(more.a, 4)},
      {"avx512f", zmm && bit(seven.b, 16)},
      {"avx512dq", zmm && bit(seven.b, 17)},
      {"avx512bw", zmm && bit(seven.b, 30)},
      {"avx512vl", zmm && bit(seven.b, 31)},
      {"avx512_vbmi2", zmm && bit(seven.c, 6)},
      {"avx512_vnni", zmm && bit(seven.c, 11)},
      {"avx512_bf16", zmm && bit(more.a, 5)},
      {"avx512_fp16", zmm && bit(seven.d, 23)},
      {"amx_tile", tiles && bit(seven.d, 24)},
      {"amx_bf16", tiles && bit(seven.d, 22)},
      {"amx_int8", tiles && bit(seven.d, 25)},
      {"amx_fp16", tiles && bit(more.a, 21)},
  };
  int count = 0;
  for (const auto& entry : table)
    if (entry.has) names[count++] = entry.name;
  return count;
}

}  // namespace pumice

#else

namespace pumice {
int cpu_features(const char**) { return 0; }
}  // namespace pumice

#endif

namespace pumice {

bool cpu_has(const char* name) {
  const char* names[kMostFeatures];
  const int count = cpu_features(names);
  for (int i = 0; i < count; ++i)
    if (!strcmp(names[i], name)) return true;
  return false;
}

}  // namespace pumice
