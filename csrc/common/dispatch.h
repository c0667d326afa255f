// Chooses the variant of the CPU kernels that runs: the widest that the machine has, or the one that MMKERNELS_CPU
// names.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace mmkernels {

enum class CpuVariant { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// setup.py defines one of these as 1 for each instruction set that the kernels are compiled for.
#ifndef MMK_HAS_AVX2
#define MMK_HAS_AVX2 0
#endif
#ifndef MMK_HAS_AVX512
#define MMK_HAS_AVX512 0
#endif
#ifndef MMK_HAS_AVX512BF16
#define MMK_HAS_AVX512BF16 0
#endif

inline CpuVariant cpu_variant() {
  static const CpuVariant chosen = [] {
    struct Known {
      const char* name;
      CpuVariant variant;
      bool built;
      bool here;
    };
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if MMK_HAS_AVX512BF16  // a compiler that cannot build for it may not know its name either
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#else
    const bool bf16 = false;
#endif
#else
    const bool avx2 = false, avx512 = false, bf16 = false;
#endif
    const std::vector<Known> widest_first{{"avx512bf16", CpuVariant::kAvx512Bf16, MMK_HAS_AVX512BF16, bf16},
                                          {"avx512", CpuVariant::kAvx512, MMK_HAS_AVX512, avx512},
                                          {"avx2", CpuVariant::kAvx2, MMK_HAS_AVX2, avx2},
                                          {"portable", CpuVariant::kPortable, true, true}};
    const char* wanted = std::getenv("MMKERNELS_CPU");
    for (const Known& known : widest_first) {
      if (wanted == nullptr ? known.built && known.here : known.name == std::string(wanted)) {
        if (!known.built)
          throw std::runtime_error(std::string("MMKERNELS_CPU: the library was built without ") + wanted);
        if (!known.here) throw std::runtime_error(std::string("MMKERNELS_CPU: this machine has no ") + wanted);
        return known.variant;
      }
    }
    throw std::runtime_error(std::string("MMKERNELS_CPU: expected avx512bf16, avx512, avx2 or portable, got ") +
                             wanted);
  }();
  return chosen;
}

// Declares the kernels of an op as each variant's object file defines them, and `instance_here()`, which returns the
// ones to run. A discarded branch of `if constexpr` needs no definition: the variant may be missing.
#define MMK_VARIANTS(Kernels, instance)                                    \
  namespace portable {                                                     \
  extern const Kernels instance;                                           \
  }                                                                        \
  namespace avx2 {                                                         \
  extern const Kernels instance;                                           \
  }                                                                        \
  namespace avx512 {                                                       \
  extern const Kernels instance;                                           \
  }                                                                        \
  namespace avx512bf16 {                                                   \
  extern const Kernels instance;                                           \
  }                                                                        \
  inline const Kernels& instance##_here() {                                \
    const CpuVariant variant = cpu_variant();                              \
    if constexpr (MMK_HAS_AVX512BF16) {                                    \
      if (variant == CpuVariant::kAvx512Bf16) return avx512bf16::instance; \
    }                                                                      \
    if constexpr (MMK_HAS_AVX512) {                                        \
      if (variant == CpuVariant::kAvx512) return avx512::instance;         \
    }                                                                      \
    if constexpr (MMK_HAS_AVX2) {                                          \
      if (variant == CpuVariant::kAvx2) return avx2::instance;             \
    }                                                                      \
    return portable::instance;                                             \
  }

}  // namespace mmkernels
