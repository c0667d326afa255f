// Operations of csrc/common/simd, for arrays: test_math.py compiles it once for each instruction set.
#include "../../csrc/common/simd/simd.h"

namespace {

using namespace mmkernels;

template <class Function>
void map(const float* from, float* to, int64_t count, const Function& function) {
  for (int64_t i = 0; i < count; i += Vec::kLanes) {
    const int n = static_cast<int>(count - i < Vec::kLanes ? count - i : Vec::kLanes);
    function(Vec::load(from + i, n)).store(to + i, n);
  }
}

}  // namespace

extern "C" {

void exp_of(const float* from, float* to, int64_t count) {
  map(from, to, count, [](Vec x) { return exp(x); });
}
void log_of(const float* from, float* to, int64_t count) {
  map(from, to, count, [](Vec x) { return log(x); });
}
void log1p_of(const float* from, float* to, int64_t count) {
  map(from, to, count, [](Vec x) { return log1p(x); });
}

// Rounded to 16 bits and widened again.
void bf16_of(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += Vec::kLanes) {
    const int n = static_cast<int>(count - i < Vec::kLanes ? count - i : Vec::kLanes);
    uint16_t halves[Vec::kLanes];
    Vec::load(from + i, n).store_bf16(halves, n);
    Vec::load_bf16(halves, n).store(to + i, n);
  }
}
void f16_of(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += Vec::kLanes) {
    const int n = static_cast<int>(count - i < Vec::kLanes ? count - i : Vec::kLanes);
    uint16_t halves[Vec::kLanes];
    Vec::load(from + i, n).store_f16(halves, n);
    Vec::load_f16(halves, n).store(to + i, n);
  }
}

// A square of as many rows as a vector has lanes, turned; and the sums of such rows.
void transpose_of(const float* from, float* to, int64_t) {
  Vec rows[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) rows[i] = Vec::load(from + i * Vec::kLanes);
  transpose(rows);
  for (int i = 0; i < Vec::kLanes; ++i) rows[i].store(to + i * Vec::kLanes);
}
void sums_of_rows(const float* from, float* to, int64_t) {
  Vec rows[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) rows[i] = Vec::load(from + i * Vec::kLanes);
  sums_of(rows).store(to);
}

}  // extern "C"
