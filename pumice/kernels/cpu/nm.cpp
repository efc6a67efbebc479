// From the codes of N:M groups to a bitmask, so that one kernel runs both layouts.
//
// A code is the rank of a set of positions p_1 < … < p_n among all sets of its size, C(p_1, 1) + … + C(p_n, n). Where a
// few codes fit an index of eleven bits or so, a table gives the positions of all of them at once.
#include "nm.h"

#include <string.h>

#include <vector>

namespace pumice {
namespace {

constexpr int kTableBits = 12;
constexpr uint64_t kUnknown = ~0ull;  // no group of n < 64 positions has all bits set: m is at most 32

struct Choices {
  int64_t of[33][33];
  Choices() {
    for (int p = 0; p <= 32; ++p)
      for (int k = 0; k <= 32; ++k) of[p][k] = k == 0 ? 1 : p == 0 ? 0 : of[p - 1][k - 1] + of[p - 1][k];
  }
};

// Positions of one code as bits.
uint64_t unrank(const Choices& choices, int64_t rank, int n, int m) {
  if (rank >= choices.of[m][n]) return kUnknown;
  uint64_t kept = 0;
  for (int position = m - 1, left = n; left > 0; --position)
    if (rank >= choices.of[position][left]) {
      rank -= choices.of[position][left--];
      kept |= 1ull << position;
    }
  return kept;
}

int bits_of(int64_t count) {
  int bits = 0;
  while ((1ll << bits) < count) ++bits;
  return bits;
}

// Bits [at, at + count) of a row of `bytes` bytes; count is at most 32, and nothing beyond the row is read.
inline uint64_t bits_at(const uint8_t* row, int64_t bytes, int64_t at, int count) {
  uint64_t word = 0;
  const int64_t byte = at / 8, left = bytes - byte;
  if (left >= 8)
    memcpy(&word, row + byte, 8);
  else
    for (int64_t k = 0; k < left; ++k) word |= (uint64_t)row[byte + k] << (8 * k);
  return (word >> (at % 8)) & ((1ull << count) - 1);
}

// Appends bits to a row, four bytes at a time (little-endian, as the layouts are).
struct Writer {
  uint8_t* to;
  uint64_t held = 0;
  int count = 0;
  void put(uint64_t bits, int width) {
    held |= bits << count;
    count += width;
    if (count >= 32) {
      memcpy(to, &held, 4);
      to += 4, count -= 32, held >>= 32;
    }
  }
  void finish() {
    for (; count > 0; count -= 8, held >>= 8) *to++ = (uint8_t)held;
  }
};

}  // namespace

bool nm_bitmask(const uint8_t* codes, int64_t O, int64_t I, int n, int m, uint8_t* out) {
  static const Choices choices;
  const int bits = bits_of(choices.of[m][n]);
  const int64_t groups = I / m, stored = (groups * bits + 7) / 8, bytes = (I + 7) / 8;
  // Codes to a look-up: as many as the table's index and 32 bits of positions hold.
  int at_once = bits ? kTableBits / bits : 1;
  if (at_once > 32 / m) at_once = 32 / m;
  const bool table = bits <= kTableBits && at_once > 0;
  if (!table) at_once = 1;
  std::vector<uint64_t> positions(table ? (size_t)1 << (at_once * bits) : 0);
  for (size_t index = 0; index < positions.size(); ++index)
    for (int k = 0; k < at_once; ++k) {
      const uint64_t kept = unrank(choices, (int64_t)(index >> (k * bits)) & ((1ll << bits) - 1), n, m);
      positions[index] = kept == kUnknown || positions[index] == kUnknown ? kUnknown : positions[index] | kept << (k * m);
    }
  for (int64_t o = 0; o < O; ++o) {
    const uint8_t* row = codes + o * stored;
    Writer writer = {out + o * bytes};
    for (int64_t g = 0; g < groups;) {
      const int here = groups - g >= at_once ? at_once : 1;
      const uint64_t index = bits ? bits_at(row, stored, g * bits, here * bits) : 0;
      const uint64_t kept = table && here == at_once ? positions[index] : unrank(choices, (int64_t)index, n, m);
      if (kept == kUnknown) return false;
      writer.put(kept, here * m);
      g += here;
    }
    writer.finish();
  }
  return true;
}

}  // namespace pumice
