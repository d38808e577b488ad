// Vectors of floats as wide as the machine's, through GCC's vector extensions: the same source serves AVX-512, AVX2,
// SSE and NEON. bfloat16 is a float's upper half, so it is read by shifting, and rounded to nearest even when written.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Before a loop over registers: unrolled early enough that an array of vectors becomes registers.
#define UNROLL _Pragma("GCC unroll 16")

namespace draftsmith {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};

inline Floats splat(float value) { return value - Floats{}; }  // (value + 0 would cost an addition, for -0's sake)

/// a * b + c, always fused where the machine can, so that every kernel rounds alike.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

template <typename Vector, typename T>
inline Vector load_raw(const T* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Floats load(const float* from) { return load_raw<Floats>(from); }
inline Floats load(const BFloat16* from) {
#if defined(__AVX512F__)  // GCC 12 widens the halves of a vector one by one
  return (Floats)((Words)_mm512_cvtepu16_epi32((__m256i)load_raw<Halves>(from)) << 16);
#elif defined(__AVX2__)
  return (Floats)((Words)_mm256_cvtepu16_epi32((__m128i)load_raw<Halves>(from)) << 16);
#else
  return (Floats)(__builtin_convertvector(load_raw<Halves>(from), Words) << 16);
#endif
}

/// float16 -> floats, by their bits: exponent and mantissa move up, and a factor corrects the exponent's offset.
inline Floats load_float16(const uint16_t* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)load_raw<Halves>(from));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Floats)_mm256_cvtph_ps((__m128i)load_raw<Halves>(from));
#else
  const Words bits = __builtin_convertvector(load_raw<Halves>(from), Words);
  const Floats magnitude = (Floats)((bits & 0x7fff) << 13) * 0x1p112f;
  return (Floats)((Words)magnitude | (bits & 0x8000) << 16);
#endif
}

/// Keeps the compiler from loading a value again at each use: loads, not multiplications, are scarce then.
inline Floats in_register(Floats value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

inline void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }
inline void store(BFloat16* to, Floats value) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet_nan = (bits >> 16) | 0x40;  // rounding could carry a NaN into infinity
  const Halves halves = __builtin_convertvector((value == value) ? rounded : quiet_nan, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

/// The nearest float16 to a float of magnitude below 65,520, even when halfway, and back.
inline uint16_t float16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const float magnitude = std::abs(value);
  if (magnitude < 0x1p-14f) return uint16_t(bits >> 16 & 0x8000) | uint16_t(std::nearbyint(magnitude * 0x1p24f));
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1);
  return uint16_t(bits >> 16 & 0x8000) | uint16_t((rounded >> 13) - (112 << 10));
}
inline float float16_value(uint16_t bits) {
  uint16_t lanes[kLanes] = {bits};
  return load_float16(lanes)[0];
}

/// `count` floats of one dtype to another; bit for bit what `store(load())` gives, whatever the tail.
template <typename From, typename To>
inline void convert(const From* from, To* to, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i == count) return;
  From padded[kLanes] = {};
  To result[kLanes];
  std::memcpy(padded, from + i, (count - i) * sizeof(From));
  store(result, load(padded));
  std::memcpy(to + i, result, (count - i) * sizeof(To));
}

/// The sum over the lanes, always in the same order: halves are added to halves.
inline float sum(Floats value) {
  float lanes[kLanes];
  store(lanes, value);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

/// The place of the largest of n > 0 floats, the first of equal ones; NaN is never larger.
inline int64_t place_of_largest(const float* x, int64_t n) {
  float largest = -std::numeric_limits<float>::infinity();
  Floats most = splat(largest);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Floats value = load(x + i);
    most = (value > most) ? value : most;
  }
  for (int lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  for (; i < n; ++i) largest = x[i] > largest ? x[i] : largest;
  for (i = 0; i < n && x[i] != largest; ++i) {
  }
  return i < n ? i : 0;
}

/// e^x to about 2 units in the last place; 0 below -87, so that masked scores (-inf) vanish; NaN stays NaN.
inline Floats exp(Floats x) {
  const Floats upper = splat(88.3f);
  const Floats bounded = (x > upper) ? upper : x;
  const Floats shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const Floats power = fma(bounded, splat(1.44269504f), shifter) - shifter;
  Floats rest = fma(power, splat(-0.693359375f), bounded);  // ln 2 in two parts (Cephes)
  rest = fma(power, splat(2.12194440e-4f), rest);
  Floats series = splat(1.9875691500e-4f);
  for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    series = fma(series, rest, splat(coefficient));
  const Floats mantissa = fma(series * rest, rest, rest) + 1.0f;
  const Ints exponent = (__builtin_convertvector(power, Ints) + 127) << 23;
  return (x < splat(-87.0f)) ? Floats{} : mantissa * (Floats)exponent;
}

}  // namespace draftsmith
