// exp, log and log1p of csrc/common/simd, for arrays: test_math.py compiles it once for each instruction set.
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

}  // extern "C"
