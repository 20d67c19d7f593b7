// One vector of float32 as the compiler's target has it: 8 lanes with AVX2, 16 with AVX-512. Everything above is written in these.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace octavo {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

constexpr int LANES = 16;
using Vec = __m512;
using IntVec = __m512i;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec all(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec absolute(Vec a) { return _mm512_abs_ps(a); }
inline Vec nearest(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a); }
inline IntVec int_zero() { return _mm512_setzero_si512(); }
inline IntVec int_all(int32_t x) { return _mm512_set1_epi32(x); }
inline IntVec load_int(const void* p) { return _mm512_loadu_si512(p); }
inline IntVec int_add(IntVec a, IntVec b) { return _mm512_add_epi32(a, b); }
inline IntVec int_max(IntVec a, IntVec b) { return _mm512_max_epi32(a, b); }
inline int32_t int_largest(IntVec a) { return _mm512_reduce_max_epi32(a); }
inline IntVec to_int(Vec a) { return _mm512_cvtps_epi32(a); }
inline Vec to_float(IntVec a) { return _mm512_cvtepi32_ps(a); }
inline Vec bits_to_float(IntVec a) { return _mm512_castsi512_ps(a); }
inline IntVec float_to_bits(Vec a) { return _mm512_castps_si512(a); }
inline IntVec shift_left(IntVec a, int bits) { return _mm512_slli_epi32(a, bits); }
inline IntVec shift_right(IntVec a, int bits) { return _mm512_srli_epi32(a, bits); }
inline IntVec bit_and(IntVec a, IntVec b) { return _mm512_and_si512(a, b); }
// Products of neighbouring int16 pairs, added to 32-bit sums.
inline IntVec add_pairs(IntVec sum, IntVec a, IntVec b) { return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }
inline IntVec widen_int8(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store_low_halves(uint16_t* p, IntVec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a)); }
inline void store_low_bytes(int8_t* p, IntVec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }

#else

constexpr int LANES = 8;
using Vec = __m256;
using IntVec = __m256i;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec all(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec absolute(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec nearest(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float largest(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
inline IntVec int_zero() { return _mm256_setzero_si256(); }
inline IntVec int_all(int32_t x) { return _mm256_set1_epi32(x); }
inline IntVec load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline IntVec int_add(IntVec a, IntVec b) { return _mm256_add_epi32(a, b); }
inline IntVec int_max(IntVec a, IntVec b) { return _mm256_max_epi32(a, b); }
inline int32_t int_largest(IntVec a) {
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xB1)));
}
inline IntVec to_int(Vec a) { return _mm256_cvtps_epi32(a); }
inline Vec to_float(IntVec a) { return _mm256_cvtepi32_ps(a); }
inline Vec bits_to_float(IntVec a) { return _mm256_castsi256_ps(a); }
inline IntVec float_to_bits(Vec a) { return _mm256_castps_si256(a); }
inline IntVec shift_left(IntVec a, int bits) { return _mm256_slli_epi32(a, bits); }
inline IntVec shift_right(IntVec a, int bits) { return _mm256_srli_epi32(a, bits); }
inline IntVec bit_and(IntVec a, IntVec b) { return _mm256_and_si256(a, b); }
inline IntVec add_pairs(IntVec sum, IntVec a, IntVec b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
inline IntVec widen_int8(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_low_halves(uint16_t* p, IntVec a) {
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(a, _mm256_set1_epi32(0xFFFF)), _mm256_setzero_si256()), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#endif

// bfloat16 is the upper half of a float32.
inline float bf16_to_float(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
// Rounds to nearest, ties to even; a NaN stays one.
inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return uint16_t((bits >> 16) | 0x40u);
  return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
inline void store_bf16(uint16_t* p, Vec x) {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
#else
  IntVec bits = float_to_bits(x);
  IntVec odd = bit_and(shift_right(bits, 16), int_all(1));
  store_low_halves(p, shift_right(int_add(bits, int_add(int_all(0x7FFF), odd)), 16));
#endif
}

// exp(x) for x <= 88: 2^n * e^f with |f| <= ln 2 / 2, a polynomial for e^f (relative error below 3e-7); 0 for x < -87. A NaN
// stays one: where an operand is none, min and max return the second.
inline Vec exp(Vec x) {
  const Vec lowest = all(-87.0f);
  Vec clamped = min(all(88.0f), max(lowest, x));
  Vec n = nearest(mul(clamped, all(1.44269504f)));
  Vec f = fma(n, all(-0.693359375f), clamped);  // ln 2 in two parts, so that the remainder is exact
  f = fma(n, all(2.12194440e-4f), f);
  Vec y = all(1.9875691500e-4f);
  y = fma(y, f, all(1.3981999507e-3f));
  y = fma(y, f, all(8.3334519073e-3f));
  y = fma(y, f, all(4.1665795894e-2f));
  y = fma(y, f, all(1.6666665459e-1f));
  y = fma(y, f, all(5.0000001201e-1f));
  y = fma(y, mul(f, f), add(f, all(1.0f)));
  Vec scaled = mul(y, bits_to_float(shift_left(int_add(to_int(n), int_all(127)), 23)));
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ), scaled);
#else
  return _mm256_and_ps(_mm256_cmp_ps(x, lowest, _CMP_NLT_UQ), scaled);
#endif
}

inline Vec sigmoid(Vec x) { return div(all(1.0f), add(all(1.0f), exp(sub(zero(), x)))); }
// 1 - 2 / (exp(2x) + 1)
inline Vec tanh(Vec x) { return sub(all(1.0f), div(all(2.0f), add(exp(mul(all(2.0f), x)), all(1.0f)))); }

}  // namespace octavo
