// The device code of beam search. nvcc compiles it into kernels (cuda.cu), and the tests compile it into a program that
// runs it on a CPU, thread by thread (tests/emulator.h).
//
// scan: a block reads its part of a row once, into shared memory; finds its largest entry and, with the other parts' of
// its cluster, its share of the softmax's sum; and takes its best entries out one by one. Their number bounds the work,
// whatever the values.
// sum: finds the shares of the sum where a row's parts are no cluster.
// merge: puts the parts' candidates of an item into the written order by counting, for each, those that go before it.
// advance: see advance.h.
//
// Every operation is rounded by itself (nvcc -fmad=false), as mmkernels/beam_search/reference.py writes them down.
#pragma once

#include "advance.h"
#include "cuda.h"

namespace mmkernels {

struct BeamArguments {
  BeamStep step;
  BeamPlan plan;
  int64_t first_row;
  double* sums;          // [rows, parts, warps]
  float* statistics;     // [rows, 2]: largest entry and logarithm of the sum
  float* maxima;         // [rows, parts]; NaN where a part has a NaN or +inf
  float* kept_logits;    // [rows, parts, keep], best first; -inf past the last
  int32_t* kept_tokens;  // [rows, parts, keep]
};

// Runs the kernels of a step. `launch` starts each of them over the number of blocks that it is given.
template <class Launch>
void launch_beam_step(const BeamStep& step, const BeamPlan& plan, void* scratch, const Launch& launch) {
  const int64_t rows = step.items * step.beams, in_parts = rows * plan.parts;
  BeamArguments a{};
  a.step = step;
  a.plan = plan;
  a.sums = static_cast<double*>(scratch);
  a.statistics = reinterpret_cast<float*>(a.sums + in_parts * plan.warps);
  a.maxima = a.statistics + 2 * rows;
  a.kept_logits = a.maxima + in_parts;
  a.kept_tokens = reinterpret_cast<int32_t*>(a.kept_logits + in_parts * plan.keep);
  for (a.first_row = 0; a.first_row < rows; a.first_row += plan.group) {
    const int64_t blocks = std::min(plan.group, rows - a.first_row) * plan.parts;
    launch.scan(a, blocks);
    if (plan.sums_apart) launch.sum(a, blocks);
  }
  launch.merge(a, step.items);
}

namespace beam {

static_assert(kSumColumns == 16);  // half a warp
constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr float kInfinity = __builtin_huge_valf();

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

__device__ __forceinline__ float as_float(uint32_t bits) {
  return __uint_as_float(bits);
}
__device__ __forceinline__ float widen(float x) {
  return x;
}
__device__ __forceinline__ float widen(BFloat16 x) {
  return as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7FFF;
  if (rest >= 0x7C00) return as_float(sign | ((rest << 13) + 0x70000000));   // infinity and NaN
  return as_float(sign | __float_as_uint(as_float(rest << 13) * 0x1p112f));  // moves the bias, subnormals included
}

// Maps floats to numbers of the same order, both zeros to one. Every candidate's number is above that of -inf.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t key) {
  return as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// Returns the larger, or the NaN if there is one.
__device__ __forceinline__ float largest_of(float a, float b) {
  return a != a || a > b ? a : b;
}

// Returns the largest of a warp's numbers, or NaN if one is a NaN or +inf.
__device__ __forceinline__ float warp_largest(float x) {
  const bool wrong = __any_sync(kAllLanes, !(x < kInfinity)) != 0;
  const float largest = from_ordered(__reduce_max_sync(kAllLanes, ordered(x)));
  return wrong ? __int_as_float(0x7FC00000) : largest;
}

__device__ __forceinline__ uint64_t warp_largest(uint64_t key) {
  const uint32_t high = __reduce_max_sync(kAllLanes, static_cast<uint32_t>(key >> 32));
  const uint32_t low = __reduce_max_sync(kAllLanes, key >> 32 == high ? static_cast<uint32_t>(key) : 0u);
  return static_cast<uint64_t>(high) << 32 | low;
}

// Sums a warp's numbers. Their order changes nothing: they are multiples of a quantum.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// e^x for x <= 0: exponentials() in reference.py.
__device__ __forceinline__ float exact_exp(float x) {
  // Adding it rounds to a whole number, which then lies, 127 above itself, in the low bits.
  constexpr float kWhole = 1.5f * 8388608.f + 127.f;
  float y = x * 1.44269504088896341f;
  y = y < -100.f ? -100.f : y;
  const float whole = y + kWhole, f = y - (whole - kWhole);
  float p = 0.00132647273f;
  p = p * f + 0.00967151299f;
  p = p * f + 0.0555073358f;
  p = p * f + 0.240222424f;
  p = p * f + 0.693147004f;
  p = p * f + 1.f;
  return p * as_float(__float_as_uint(whole) << 23);
}

// The logarithm of a number >= 1: log_sums() in reference.py.
__device__ __forceinline__ float log_of_sum(double sum) {
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(sum));
  double exponent = static_cast<double>(static_cast<int>(bits >> 52) - 1022);
  double mantissa = __longlong_as_double(static_cast<long long>((bits & 0xFFFFFFFFFFFFFull) | (1022ull << 52)));
  if (mantissa < 0.7071067811865476) {
    mantissa += mantissa;
    exponent -= 1.0;
  }
  const double z = (mantissa - 1.0) / (mantissa + 1.0), w = z * z;
  double p = 1.0 / 15;
  p = p * w + 1.0 / 13;
  p = p * w + 1.0 / 11;
  p = p * w + 1.0 / 9;
  p = p * w + 1.0 / 7;
  p = p * w + 1.0 / 5;
  p = p * w + 1.0 / 3;
  p = p * w + 1.0;
  return static_cast<float>(exponent * 0.6931471805599453 + (z + z) * p);
}

// What a block works on: `length` entries of one row from token `begin`.
//
// A warp has a stretch of it, in lines of 32, and lane l has entry (l - r) mod 32 of line r. So the lanes together read
// a line without bank conflicts, and so they read all that one lane has.
template <class T, bool kMasked>
struct Part {
  int64_t row;
  int index, begin, length;
  const T* logits;
  const bool* forbidden;
  bool mask_first;
  int first, lines;  // of this thread's warp

  __device__ __forceinline__ Part(const BeamArguments& a)
      : row(a.first_row + blockIdx.x / a.plan.parts), index(static_cast<int>(blockIdx.x % a.plan.parts)) {
    const int64_t from = index * a.plan.part, left = a.step.vocabulary - from;
    begin = static_cast<int>(from);
    length = static_cast<int>(left < a.plan.part ? left : a.plan.part);
    logits = static_cast<const T*>(a.step.logits) + row * a.step.row_stride + from;
    forbidden = kMasked ? a.step.forbidden + row * a.step.forbidden_stride + from : nullptr;
    mask_first = a.step.mask_first || !a.step.normalize;
    const int stretch = static_cast<int>(a.plan.part) / a.plan.warps;
    first = stretch * static_cast<int>(threadIdx.x / 32);
    const int rest = length - first;
    lines = rest <= 0 ? 0 : ((rest < stretch ? rest : stretch) + 31) / 32;
  }

  __device__ __forceinline__ int entry(int line, int lane) const { return first + 32 * line + ((lane - line) & 31); }
  __device__ __forceinline__ int lane_of(int entry) const { return (entry + (entry - first) / 32) & 31; }
  __device__ __forceinline__ bool hidden(int i) const { return kMasked && forbidden[i]; }
  // Returns an entry as the softmax takes it.
  __device__ __forceinline__ float in_softmax(int i) const {
    return mask_first && hidden(i) ? -kInfinity : widen(logits[i]);
  }

  // Copies the part to shared memory, in words of 16 bytes but for the ends.
  __device__ void stage(char* to) {
    struct alignas(16) Word {
      uint32_t lanes[4];
    };
    const int thread = threadIdx.x, threads = blockDim.x;
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(logits) % 16);
    const int before = (16 - shift) % 16 / static_cast<int>(sizeof(T)), head = before < length ? before : length;
    const int words = (length - head) / static_cast<int>(16 / sizeof(T));
    const int tail = head + words * static_cast<int>(16 / sizeof(T));
    T* copy = reinterpret_cast<T*>(to + shift);
    const Word* from = reinterpret_cast<const Word*>(logits + head);
    Word* words_to = reinterpret_cast<Word*>(copy + head);
    constexpr int kAhead = 4;  // 4 words of 16 bytes are under way at once in each of 256 threads: 16 KiB of a block
    for (int i = thread; i < words; i += kAhead * threads) {
      Word loaded[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (i + j * threads < words) loaded[j] = from[i + j * threads];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (i + j * threads < words) words_to[i + j * threads] = loaded[j];
    }
    for (int i = thread; i < head; i += threads) copy[i] = logits[i];
    for (int i = tail + thread; i < length; i += threads) copy[i] = logits[i];
    logits = copy;
  }

  // Finds this warp's share of the softmax's sum: log_sums() in reference.py. As there, the terms of a column of a
  // block of kSumRows x kSumColumns are added neighbours first; the rest is exact.
  //
  // Half a warp has the columns of one block, half those of the next; the second half goes through its rows with
  // neighbours exchanged, so that the halves read different banks.
  __device__ double sum(float largest, float shift) const {
    const int half = threadIdx.x / 16 % 2, column = threadIdx.x % kSumColumns;
    const int stop = first + 32 * lines < length ? first + 32 * lines : length;
    double total = 0;
    for (int block = first + half * kSumRows * kSumColumns; block < stop; block += 2 * kSumRows * kSumColumns) {
      float terms[kSumRows];
#pragma unroll
      for (int r = 0; r < kSumRows; ++r) {
        const int i = block + (r ^ half) * kSumColumns + column;
        terms[r] = i < length ? exact_exp(in_softmax(i) - largest) : 0.f;
      }
#pragma unroll
      for (int apart = 1; apart < kSumRows; apart *= 2)
#pragma unroll
        for (int r = 0; r < kSumRows; r += 2 * apart) terms[r] += terms[r + apart];
      total += static_cast<double>((terms[0] + shift) - shift);
    }
    return warp_sum(total);
  }

  // Returns an entry as a candidate.
  __device__ __forceinline__ float candidate(int i) const { return hidden(i) ? -kInfinity : widen(logits[i]); }
  // Maps candidates to numbers of their order: the higher logit, then the lower token. 0 stands for no candidate.
  static __device__ __forceinline__ uint64_t key(float candidate, int i) {
    return candidate > -kInfinity
               ? static_cast<uint64_t>(ordered(candidate)) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(i))
               : 0;
  }
  static __device__ __forceinline__ int entry_of(uint64_t key) {
    return static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(key));
  }
};

struct ScanShared {
  float largest[kMaxWarps];
  float of_block;
  uint64_t best[2][kMaxWarps];
};
static_assert(sizeof(ScanShared) <= kScanShared);

template <class T, bool kMasked>
__device__ void scan(const BeamArguments& a, char* memory) {
  Part<T, kMasked> part(a);
  if (a.step.valid != nullptr && !a.step.valid[part.row]) return;  // all blocks of the row
  ScanShared& shared = *reinterpret_cast<ScanShared*>(memory);
  const int warps = a.plan.warps, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t at = part.row * a.plan.parts + part.index;
  if (a.plan.staged) {
    part.stage(memory + kScanShared);
    __syncthreads();
  }

  // Find the largest entry and the best candidate of each thread, then of each warp.
  float largest = -kInfinity, best_logit = -kInfinity;
  int best_entry = 0;
  bool wrong = false;
#pragma unroll 4
  for (int line = 0; line < part.lines; ++line) {
    const int i = part.entry(line, lane);
    if (i >= part.length) continue;
    const float x = part.in_softmax(i), candidate = part.candidate(i);
    wrong = wrong || !(x < kInfinity);
    largest = fmaxf(largest, x);
    if (candidate > best_logit) {
      best_logit = candidate;
      best_entry = i;
    }
  }
  largest = warp_largest(wrong ? __int_as_float(0x7FC00000) : largest);
  uint64_t mine = part.key(best_logit, best_entry), of_warp = warp_largest(mine);
  if (lane == 0) {
    shared.largest[warp] = largest;
    shared.best[0][warp] = of_warp;
  }
  __syncthreads();
  largest = shared.largest[0];
  for (int w = 1; w < warps; ++w) largest = largest_of(largest, shared.largest[w]);
  if (threadIdx.x == 0) a.maxima[at] = largest;

  if (a.plan.cluster) {
    if (threadIdx.x == 0) shared.of_block = largest;
    cluster_arrive();
    cluster_wait();
    for (int other = 0; other < a.plan.parts; ++other)
      largest = largest_of(largest, *cluster_address(&shared.of_block, other));
    cluster_arrive();
  }
  if (a.step.normalize && !a.plan.sums_apart) {
    // A row of -inf has no candidate, a poisoned one none that counts: nobody reads their sums.
    const double sum = largest > -kInfinity ? part.sum(largest, a.plan.shift) : 0.0;
    if (lane == 0) a.sums[at * warps + warp] = sum;
  }

  // Take the best of all warps `keep` times. Its warp then shows the next one of the thread that had it.
  float* kept_logits = a.kept_logits + at * a.plan.keep;
  int32_t* kept_tokens = a.kept_tokens + at * a.plan.keep;
  int kept = 0;
  for (; kept < a.plan.keep; ++kept) {
    uint64_t best = shared.best[kept & 1][0];
    int owner = 0;
    for (int w = 1; w < warps; ++w) {
      const uint64_t other = shared.best[kept & 1][w];
      if (other > best) {
        best = other;
        owner = w;
      }
    }
    if (best == 0) break;
    if (threadIdx.x == 0) {
      kept_logits[kept] = from_ordered(static_cast<uint32_t>(best >> 32));
      kept_tokens[kept] = part.begin + part.entry_of(best);
    }
    if (warp == owner) {
      const int from = part.lane_of(part.entry_of(best));
      uint64_t next = 0;
      for (int line = lane; line < part.lines; line += 32) {
        const int i = part.entry(line, from);
        if (i >= part.length) continue;
        const uint64_t key = part.key(part.candidate(i), i);
        if (key < best && key > next) next = key;
      }
      next = warp_largest(next);
      if (lane == from) mine = next;
      of_warp = warp_largest(mine);
    }
    if (lane == 0) shared.best[(kept + 1) & 1][warp] = of_warp;
    __syncthreads();
  }
  for (int64_t i = kept + threadIdx.x; i < a.plan.keep; i += blockDim.x) kept_logits[i] = -kInfinity;
  if (a.plan.cluster) cluster_wait();  // others may be reading this block's largest
}

template <class T, bool kMasked>
__device__ void sum(const BeamArguments& a) {
  const Part<T, kMasked> part(a);
  if (a.step.valid != nullptr && !a.step.valid[part.row]) return;
  float largest = -kInfinity;
  for (int i = 0; i < a.plan.parts; ++i) largest = largest_of(largest, a.maxima[part.row * a.plan.parts + i]);
  const double share = largest > -kInfinity ? part.sum(largest, a.plan.shift) : 0.0;
  if (threadIdx.x % 32 == 0) a.sums[(part.row * a.plan.parts + part.index) * a.plan.warps + threadIdx.x / 32] = share;
}

// Reads the candidates of an item. A list is what a part of a row kept.
struct Lists {
  const BeamArguments& a;
  int64_t first_row;

  struct Candidate {
    float score, logit;
    int64_t at;  // beam * V + token

    __device__ __forceinline__ bool before(const Candidate& other) const {
      if (score != other.score) return score > other.score;
      if (logit != other.logit) return logit > other.logit;
      return at < other.at;
    }
  };

  __device__ __forceinline__ bool counts(int64_t list) const {
    return a.step.valid == nullptr || a.step.valid[first_row + list / a.plan.parts];
  }
  // Returns false past a list's last.
  __device__ __forceinline__ bool get(int64_t list, int64_t place, Candidate& found) const {
    const int64_t beam = list / a.plan.parts, row = first_row + beam;
    const int64_t i = (first_row * a.plan.parts + list) * a.plan.keep + place;
    found.logit = a.kept_logits[i];
    if (!(found.logit > -kInfinity)) return false;
    float log_prob = found.logit;
    if (a.step.normalize) log_prob = (log_prob - a.statistics[2 * row]) - a.statistics[2 * row + 1];
    found.score = a.step.scores[row] + log_prob;
    found.at = beam * a.step.vocabulary + a.kept_tokens[i];
    return true;
  }
};

__device__ inline void merge(const BeamArguments& a) {
  const int64_t item = blockIdx.x, K = a.step.beams, C = a.step.candidates;
  const int parts = a.plan.parts, warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Lists lists{a, item * K};
  bool wrong = false;
  for (int64_t row = item * K + warp; row < (item + 1) * K; row += warps) {
    if (a.step.valid != nullptr && !a.step.valid[row]) continue;
    float largest = -kInfinity;
    for (int i = lane; i < parts; i += 32) largest = largest_of(largest, a.maxima[row * parts + i]);
    largest = warp_largest(largest);
    wrong = wrong || largest != largest || !(a.step.scores[row] < kInfinity);
    if (!a.step.normalize) continue;
    double sum = 0;
    for (int i = lane; i < parts * a.plan.warps; i += 32) sum += a.sums[row * parts * a.plan.warps + i];
    sum = warp_sum(sum);
    if (lane == 0) {
      a.statistics[2 * row] = largest;
      a.statistics[2 * row + 1] = log_of_sum(sum);
    }
  }
  for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
    a.step.out_scores[item * C + c] = -kInfinity;
    a.step.out_beams[item * C + c] = a.step.out_tokens[item * C + c] = 0;
    a.step.out_valid[item * C + c] = false;
  }
  wrong = __syncthreads_or(wrong) != 0;
  if (threadIdx.x == 0) a.step.out_poisoned[item] = wrong;
  if (wrong) return;

  const int64_t num_lists = K * parts;
  for (int64_t i = threadIdx.x; i < num_lists * a.plan.keep; i += blockDim.x) {
    const int64_t list = i / a.plan.keep, place = i % a.plan.keep;
    Lists::Candidate mine, other;
    if (place >= C || !lists.counts(list) || !lists.get(list, place, mine)) continue;
    int64_t rank = place;
    for (int64_t l = 0; l < num_lists && rank < C; ++l) {
      if (l == list || !lists.counts(l)) continue;
      for (int64_t j = 0; j < a.plan.keep && rank < C && lists.get(l, j, other) && other.before(mine); ++j) ++rank;
    }
    if (rank >= C) continue;
    a.step.out_scores[item * C + rank] = mine.score;
    a.step.out_beams[item * C + rank] = mine.at / a.step.vocabulary;
    a.step.out_tokens[item * C + rank] = mine.at % a.step.vocabulary;
    a.step.out_valid[item * C + rank] = true;
  }
}

// One thread advances one item: its candidates are few, and each depends on what those before it left.
__device__ inline void advance(const BeamAdvance& a) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item < a.items) advance_item(a, item);
}

}  // namespace beam
}  // namespace mmkernels
