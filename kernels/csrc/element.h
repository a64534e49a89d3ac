// KV element types and their conversions. Included inside each ISA's anonymous namespace: nothing here may
// become a symbol that the linker shares between ISAs.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
  // In integers and one exact product, so that loops over it become vectors without F16C too.
  const uint32_t magnitude = x.bits & 0x7fffu;
  const float value = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;  // moves the exponent, subnormals too
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;           // inf and NaN keep their exponent
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, value) | special | sign);
}

// Round to nearest even, as torch does.
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
}
template <>
inline Float16 from_float<Float16>(float x) { return {__builtin_bit_cast(uint16_t, static_cast<_Float16>(x))}; }
