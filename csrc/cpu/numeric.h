#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

namespace moetuner::cpu {

/// Brain float: the upper half of a float32. Rounds to nearest even.
struct BFloat16 {
  std::uint16_t bits;

  operator float() const { return std::bit_cast<float>(std::uint32_t{bits} << 16); }
  static BFloat16 from(float value) {
    const auto wide = std::bit_cast<std::uint32_t>(value);
    if (value != value) return {static_cast<std::uint16_t>((wide >> 16) | 0x40)};
    return {static_cast<std::uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
  }
};

/// IEEE half. Rounds to nearest even.
struct Float16 {
  std::uint16_t bits;

  operator float() const {
    const std::uint32_t sign = std::uint32_t{bits & 0x8000u} << 16;
    const std::uint32_t magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00) {  // infinity, NaN
      return std::bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    }
    // As a float32 with too small an exponent; the product sets it right, subnormals too.
    const float shifted = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(shifted));
  }
  static Float16 from(float value) {
    const auto wide = std::bit_cast<std::uint32_t>(value);
    const auto sign = static_cast<std::uint16_t>(wide >> 16 & 0x8000);
    const float magnitude = std::bit_cast<float>(wide & 0x7fffffff);
    const auto with_sign = [&](std::uint32_t half) {
      return Float16{static_cast<std::uint16_t>(sign | half)};
    };
    if (value != value) return with_sign(0x7e00);
    if (magnitude >= 65520.0f) return with_sign(0x7c00);  // rounds to infinity
    if (magnitude < 0x1p-14f) {  // subnormal: the addition rounds at its last bit
      return with_sign(std::bit_cast<std::uint32_t>(magnitude + 0.5f) - 0x3f000000);
    }
    const auto bits = std::bit_cast<std::uint32_t>(magnitude);
    const std::uint32_t rounded = bits + 0xfff + ((bits >> 13) & 1);
    return with_sign((rounded - (112u << 23)) >> 13);
  }
};

template <typename T>
T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    return T::from(value);
  }
}

}  // namespace moetuner::cpu
