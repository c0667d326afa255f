// Splits the work of a step of beam search on a GPU, and declares what the torch side calls.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "step_types.h"

namespace mmkernels {

// What the split depends on: the device, and sizes that tests make smaller.
struct BeamDevice {
  int multiprocessors;
  bool clusters;                  // blocks of a row can read each other's shared memory (compute capability 9.0)
  int warps = 8;                  // of a block, at most kMaxWarps
  int64_t part_bytes = 32 << 10;  // logits of a block, if they are many
  int64_t least_part = 2048;      // entries that are worth a block: 8 for each of its 256 threads
  int64_t staged_bytes =
      96 << 10;                    // the most logits that a block keeps in shared memory: of 164 KiB (8.0) or 228 (9.0)
  int64_t group_bytes = 16 << 20;  // logits between one read of them and the next: an L2 of 40 MB has them still
};

// A row is `parts` blocks. A cluster of them, or one block alone, reads the logits once; other parts of a row meet in
// memory, and the softmax's sum takes a second kernel.
struct BeamPlan {
  int warps, parts;
  int64_t part, keep;  // entries of a part; the most candidates it can place
  bool cluster, staged, sums_apart;
  int64_t group;           // rows of one launch
  float shift;             // 1.5 x 2^23 quanta of the sum: quantum_bits and log_sums in reference.py
  size_t shared, scratch;  // bytes
};

// The most warps of a block: 256 threads = 8 warps of 32.
constexpr int kMaxWarps = 8;
// A block of scan keeps ScanShared before the staged logits: 168 bytes for kMaxWarps, and on to a
// multiple of the 16 bytes that are copied at once.
constexpr size_t kScanShared = 256;

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline BeamPlan plan_beam_step(const BeamStep& s, const BeamDevice& device) {
  BeamPlan plan{};
  const int64_t rows = s.items * s.beams, V = s.vocabulary, element = bytes_of(s.dtype);
  const int64_t idle = divide_up(2 * device.multiprocessors, rows);
  int64_t parts = std::max(divide_up(V * element, device.part_bytes), std::min(idle, divide_up(V, device.least_part)));
  parts = std::min<int64_t>(parts, device.clusters ? 8 : 64);
  const int64_t unit = kSumRows * kSumColumns * device.warps;  // warps have whole blocks of the softmax's sum
  plan.warps = device.warps;
  plan.part = divide_up(divide_up(V, parts), unit) * unit;
  plan.parts = static_cast<int>(divide_up(V, plan.part));
  plan.keep = std::min(std::min(s.candidates, V), plan.part);
  plan.cluster = device.clusters && plan.parts > 1;
  plan.sums_apart = s.normalize && plan.parts > 1 && !plan.cluster;
  plan.staged = plan.part * element <= device.staged_bytes;
  plan.shared = kScanShared + (plan.staged ? plan.part * element + 16 : 0);
  plan.group = plan.sums_apart ? std::max<int64_t>(1, device.group_bytes / (V * element)) : rows;
  int bits = 0;
  while ((int64_t{1} << bits) < V) ++bits;
  plan.shift = 1.5f * std::ldexp(1.f, 23 - (52 - bits));
  const size_t in_parts = static_cast<size_t>(rows) * plan.parts;
  plan.scratch = in_parts * plan.warps * sizeof(double) + in_parts * sizeof(float) + rows * 2 * sizeof(float) +
                 in_parts * plan.keep * (sizeof(float) + sizeof(int32_t));
  return plan;
}

// All return null, or what went wrong. They run on the current device; the last two put their kernels on `stream`, wait
// for nothing and allocate nothing.
const char* beam_device(BeamDevice& device);
const char* run_beam_step(const BeamStep& step, const BeamPlan& plan, void* scratch, void* stream);
const char* run_beam_advance(const BeamAdvance& advance, void* stream);

}  // namespace mmkernels
