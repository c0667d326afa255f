// The most that the cores multiply and add, from registers alone: the limit that a CPU kernel is measured against.
// Compiled by benchmarks/peak.py for the machine at hand.
#include <immintrin.h>

#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int kAccumulators = 12;  // enough to hide the latency of two units of four cycles, and fits 16 registers

#if defined(__AVX512F__)
using Vec = __m512;
Vec set(float x) {
  return _mm512_set1_ps(x);
}
Vec fma(Vec a, Vec b, Vec c) {
  return _mm512_fmadd_ps(a, b, c);
}
#else
using Vec = __m256;
Vec set(float x) {
  return _mm256_set1_ps(x);
}
Vec fma(Vec a, Vec b, Vec c) {
  return _mm256_fmadd_ps(a, b, c);
}
#endif
#if defined(__AVX512BF16__)
Vec fma_pairs(Vec a, Vec b, Vec c) {
  return _mm512_dpbf16_ps(a, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(c));
}
#endif

template <class Step>
void spin(int64_t rounds, float* sink, Step step) {
  Vec acc[kAccumulators];
#pragma GCC unroll 16
  for (int j = 0; j < kAccumulators; ++j) acc[j] = set(*sink + j);
  Vec b = set(0.999f), c = set(1e-3f);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kAccumulators; ++j) acc[j] = step(acc[j], b, c);
    // The compiler may not see that b stays the same, or it would hoist the work.
    asm volatile("" : "+v"(b), "+v"(c));
  }
  Vec sum = acc[0];
#pragma GCC unroll 16
  for (int j = 1; j < kAccumulators; ++j) sum = fma(acc[j], b, sum);
  *sink = reinterpret_cast<const float*>(&sum)[0];
}

template <class Step>
double rate(int threads, int64_t rounds, double flops, Step step) {
  std::vector<float> sinks(threads * 16, 1.f);
  std::vector<std::thread> workers;
  const auto start = std::chrono::steady_clock::now();
  for (int t = 0; t < threads; ++t) workers.emplace_back([&, t] { spin(rounds, &sinks[t * 16], step); });
  for (std::thread& worker : workers) worker.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return threads * static_cast<double>(rounds) * kAccumulators * flops / seconds;
}

}  // namespace

extern "C" {
// FLOP a second of all threads together; 0 where the machine has no such product.
double peak_float32(int threads, int64_t rounds) {
  return rate(threads, rounds, 2. * sizeof(Vec) / 4, [](Vec a, Vec b, Vec c) { return fma(a, b, c); });
}
double peak_bfloat16(int threads, int64_t rounds) {
#if defined(__AVX512BF16__)
  return rate(threads, rounds, 4. * sizeof(Vec) / 4, [](Vec a, Vec b, Vec c) { return fma_pairs(a, b, c); });
#else
  (void)threads, (void)rounds;
  return 0;
#endif
}
}
