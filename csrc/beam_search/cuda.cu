// The kernels of beam search for NVIDIA GPUs, and their launches. This file includes no torch header.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace mmkernels::beam {

// What the blocks of a cluster do together. Compute capability 8 has no clusters, and no plan asks for one there.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_wait();
#endif
}
template <class T>
__device__ __forceinline__ T* cluster_address(T* mine, int block) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(mine, block);
#else
  return mine;
#endif
}

}  // namespace mmkernels::beam

#include "cuda_kernels.h"

namespace mmkernels {
namespace {

// kBlocks run on a multiprocessor at once: 4 x 256 threads leave each 65,536 / 1,024 = 64 registers, and ptxas need not
// save more.
constexpr int kMaxThreads = 32 * kMaxWarps, kBlocks = 4;

template <class T, bool kMasked>
__global__ void __launch_bounds__(kMaxThreads, kBlocks) scan_kernel(const __grid_constant__ BeamArguments a) {
  extern __shared__ uint4 memory[];
  beam::scan<T, kMasked>(a, reinterpret_cast<char*>(memory));
}

template <class T, bool kMasked>
__global__ void __launch_bounds__(kMaxThreads, kBlocks) sum_kernel(const __grid_constant__ BeamArguments a) {
  beam::sum<T, kMasked>(a);
}

__global__ void __launch_bounds__(kMaxThreads, kBlocks) merge_kernel(const __grid_constant__ BeamArguments a) {
  beam::merge(a);
}

__global__ void __launch_bounds__(32) advance_kernel(const __grid_constant__ BeamAdvance a) {
  beam::advance(a);
}

using Kernel = void (*)(BeamArguments);

template <class T>
Kernel choose(bool scan, bool masked) {
  if (scan) return masked ? scan_kernel<T, true> : scan_kernel<T, false>;
  return masked ? sum_kernel<T, true> : sum_kernel<T, false>;
}

Kernel choose(const BeamStep& step, bool scan) {
  const bool masked = step.forbidden != nullptr;
  switch (step.dtype) {
    case Dtype::kBFloat16:
      return choose<beam::BFloat16>(scan, masked);
    case Dtype::kFloat16:
      return choose<beam::Float16>(scan, masked);
    default:
      return choose<float>(scan, masked);
  }
}

struct Launch {
  cudaStream_t stream;
  cudaError_t& error;

  void start(Kernel kernel, const BeamArguments& a, int64_t blocks, int threads, size_t shared, int cluster) const {
    if (error != cudaSuccess) return;
    if (shared > 48 << 10) {  // a kernel may take 48 KiB unasked
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
      if (error != cudaSuccess) return;
    }
    cudaLaunchAttribute clusters{};
    clusters.id = cudaLaunchAttributeClusterDimension;
    clusters.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &clusters;
    config.numAttrs = cluster > 1 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, a);
  }
  void scan(const BeamArguments& a, int64_t blocks) const {
    start(choose(a.step, true), a, blocks, 32 * a.plan.warps, a.plan.shared, a.plan.cluster ? a.plan.parts : 1);
  }
  void sum(const BeamArguments& a, int64_t blocks) const {
    start(choose(a.step, false), a, blocks, 32 * a.plan.warps, 0, 1);
  }
  void merge(const BeamArguments& a, int64_t items) const { start(merge_kernel, a, items, kMaxThreads, 0, 1); }
};

const char* text_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* beam_device(BeamDevice& device) {
  int current = 0, major = 0;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, current);
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, current);
  if (error == cudaSuccess && major < 8) return "it needs compute capability 8.0";
  // Consumer chips (12.0) have clusters, too.
  device.clusters = major >= 9;
  return text_of(error);
}

const char* run_beam_step(const BeamStep& step, const BeamPlan& plan, void* scratch, void* stream) {
  cudaError_t error = cudaSuccess;
  launch_beam_step(step, plan, scratch, Launch{static_cast<cudaStream_t>(stream), error});
  return text_of(error);
}

const char* run_beam_advance(const BeamAdvance& advance, void* stream) {
  advance_kernel<<<static_cast<unsigned>(divide_up(advance.items, 32)), 32, 0, static_cast<cudaStream_t>(stream)>>>(
      advance);
  return text_of(cudaGetLastError());
}

}  // namespace mmkernels
