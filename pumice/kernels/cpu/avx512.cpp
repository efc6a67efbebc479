// Kernels for AVX-512 F, BW, DQ and VL (Skylake server and later): sixteen columns at a time by vpexpandd, in fp32.
#include "kernels.h"

#if (defined(__x86_64__) || defined(_M_X64)) && !defined(PUMICE_PORTABLE_ONLY)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt,bmi,bmi2"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,popcnt,bmi,bmi2")
#endif

#include "driver.h"
#include "avx512_fp32.h"
#include "coded.h"
#include "avx512_coded.h"
#include "avx512_grouped.h"
#include "grouped_outer.h"
#include "avx512_tiles.h"
#include "avx512_blocks.h"
#include "avx512_conv.h"
#include "decoder_pieces.h"

namespace pumice {
namespace {

struct Avx512 : Fp32Sums {
  // 16-bit values have no expansion of their own in this set: they pass through 32-bit lanes.
  static void expand_row(const uint16_t* p, const uint8_t* mask, int64_t I, uint16_t* out) {
    for (int64_t i = 0; i < I; i += 16) {
      const __mmask16 bits = (__mmask16)(mask_word(mask, i / 64, I) >> (i % 64));
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
      const __m256i w = _mm512_cvtepi32_epi16(expand32(bits, wide));
      if (I - i >= 16)
        _mm256_storeu_si256((__m256i*)(out + i), w);
      else
        _mm256_mask_storeu_epi16(out + i, (__mmask16)((1u << (I - i)) - 1), w);
      p += _mm_popcnt_u32(bits);
    }
  }

  static void expand_row(const uint32_t* p, const uint8_t* mask, int64_t I, uint32_t* out) {
    expand_row32(p, mask, I, out);
  }
};

const Kernels table = {"avx512",
                       false,
                       nullptr,
                       {dense_product<Floats512<BF16>, Floats512<float>>, dense_product<Floats512<float>, Floats512<float>>},
                       {bitmask_product<Avx512, BF16>, bitmask_product<Avx512, float>},
                       {block_product<Avx512, BF16>, block_product<Avx512, float>},
                       expand_rows<Avx512, uint16_t>,
                       expand_rows<Avx512, uint32_t>,
                       {coded_product<CodedFp32, BF16>, coded_product<CodedFp32, float>},
                       {coded_expand<BF16>, coded_expand<float>},
                       {block_panels<FloatBlocks512<BF16>>(), block_panels<FloatBlocks512<float>>()},
                       {coded_blocks_product<BF16>, coded_blocks_product<float>},
                       nullptr,
                       nullptr};

const GroupedKernels grouped = {{stage_columns<Floats512<BF16>>, stage_columns<Floats512<float>>},
                                {hidden_rows<BF16>, hidden_rows<float>},
                                {outer_rows<Floats512<BF16>>, outer_rows<Floats512<float>>}};

typedef ManyFloats512<BF16> ManyBf16;
typedef ManyFloats512<float> ManyFp32;
const TileKernels tiles = {
    {{3, few_product<FewWords512<InFloats512, 3>>, false, {16, 16}, {many_product<ManyBf16>, many_product<ManyBf16>}, true},
     {1, few_product<FewFloats512>, false, {16, 16}, {many_product<ManyFp32>, many_product<ManyFp32>}, false}}};

const ConvKernels convolutions = {
    {{conv_product<Conv512, BF16>, lay_out<Conv512, BF16, float>, 16, kPositions, 4},
     {conv_product<Conv512, float>, lay_out_spread<Floats16>, 16, kPositions, 4}},
    {bundle_kernel<Conv512, BF16>(), {bundle_product<Conv512, float>, lay_out_spread<Floats16>, 32, kMostPositions, 4}}};

const DecoderKernels decoder_pieces[] = {pieces_of<AnyHead, BF16>(), pieces_of<AnyHead, float>()};

}  // namespace

const Kernels* avx512_kernels() { return &table; }
const GroupedKernels* avx512_grouped() { return &grouped; }
const TileKernels* avx512_tiles() { return &tiles; }
const DecoderKernels* avx512_decoder() { return decoder_pieces; }
const ConvKernels* avx512_conv() { return &convolutions; }

}  // namespace pumice

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

#include "conv.h"
#include "decoder.h"
#include "grouped.h"
#include "tiles.h"

namespace pumice {
const Kernels* avx512_kernels() { return nullptr; }
const GroupedKernels* avx512_grouped() { return nullptr; }
const TileKernels* avx512_tiles() { return nullptr; }
const DecoderKernels* avx512_decoder() { return nullptr; }
const ConvKernels* avx512_conv() { return nullptr; }
}  // namespace pumice

#endif
