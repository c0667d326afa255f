// Runs CUDA device code on a CPU: each thread of a block is a fiber, and a barrier or a warp's exchange is where it
// waits for the others. Blocks of a cluster run together, others one after another.
//
// Include it before the device code, and compile with AddressSanitizer: shared memory is as large as the launch asks
// for and is gone when its block ends. What the hardware leaves undefined is an error here: lanes of a warp at
// different exchanges, threads that wait for one that never comes. A missing barrier shows when the threads run in
// another order: see `schedule`.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __forceinline__ inline

namespace emulator {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// Holds the threads of a warp, a block or a cluster until all have arrived.
struct Barrier {
  int members = 0, arrived = 0;
  int64_t generation = 0;
  const char* what = nullptr;
  bool any = false, any_published = false;

  // Returns the generation to wait past.
  int64_t arrive(const char* at) {
    if (arrived > 0 && what != at) fail("threads of a group meet at different operations");
    what = at;
    const int64_t mine = generation;
    if (++arrived == members) {
      arrived = 0;
      any_published = any;
      any = false;
      complete();
      ++generation;
    }
    return mine;
  }
  std::function<void()> complete = [] {};
};

struct Warp {
  Barrier barrier;
  uint64_t slots[32], published[32];
};

struct Cluster;

struct Block {
  Index index, size;
  Cluster* cluster;
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  char* shared;
  int running;
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* sanitizer_stack;
  Block* block;
  Index thread;
  bool done;
  // It waits until *generation passes `past`.
  const int64_t* generation;
  int64_t past, cluster_past;
};

constexpr size_t kStack = 64 << 10;

struct Machine {
  ucontext_t scheduler;
  void* scheduler_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  Fiber* current = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  const std::function<void(char*)>* body = nullptr;

  static Machine& get() {
    static Machine machine;
    return machine;
  }

  void enter(Fiber& fiber) {
    current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_stack, fiber.stack.get(), kStack);
#endif
    swapcontext(&scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_stack, nullptr, nullptr);
#endif
  }

  void leave() {
    Fiber& fiber = *current;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fiber.done ? nullptr : &fiber.sanitizer_stack, scheduler_bottom, scheduler_size);
#endif
    swapcontext(&fiber.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, &scheduler_bottom, &scheduler_size);
#endif
  }

  void wait(const int64_t& generation, int64_t past) {
    current->generation = &generation;
    current->past = past;
    while (generation <= past) leave();
    current->generation = nullptr;
  }

  static void start() {
    Machine& machine = get();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_bottom, &machine.scheduler_size);
#endif
    Block& block = *machine.current->block;
    (*machine.body)(block.shared);
    machine.current->done = true;
    if (--block.running == 0) {
      std::free(block.shared);
      block.shared = nullptr;
    }
    machine.leave();
  }
};

inline Fiber& current() {
  return *Machine::get().current;
}

// Runs one cluster to its end. `schedule`: 0 runs the threads in order, 1 backwards, others in a random order each
// time.
inline void run_cluster(int64_t first_block, int blocks, int threads, size_t shared, unsigned schedule,
                        const std::function<void(char*)>& body) {
  Machine& machine = Machine::get();
  machine.body = &body;
  Cluster cluster;
  cluster.barrier.members = blocks * threads;
  while (machine.fibers.size() < static_cast<size_t>(blocks * threads)) {
    machine.fibers.push_back(std::make_unique<Fiber>());
    machine.fibers.back()->stack = std::make_unique<char[]>(kStack);
  }
  std::vector<Fiber*> order;
  for (int b = 0; b < blocks; ++b) {
    cluster.blocks.push_back(std::make_unique<Block>());
    Block& block = *cluster.blocks.back();
    block.index.x = static_cast<unsigned>(first_block + b);
    block.size = {static_cast<unsigned>(threads), 1, 1};
    block.cluster = &cluster;
    block.barrier.members = block.running = threads;
    block.shared = static_cast<char*>(std::malloc(shared));
    std::memset(block.shared, 0xFF, shared);
    for (int w = 0; w < threads / 32; ++w) {
      block.warps.push_back(std::make_unique<Warp>());
      Warp* warp = block.warps.back().get();
      warp->barrier.members = 32;
      warp->barrier.complete = [warp] { std::memcpy(warp->published, warp->slots, sizeof(warp->slots)); };
    }
    for (int t = 0; t < threads; ++t) {
      Fiber& fiber = *machine.fibers[b * threads + t];
      fiber.block = &block;
      fiber.thread.x = static_cast<unsigned>(t);
      fiber.done = false;
      fiber.generation = nullptr;
      fiber.sanitizer_stack = nullptr;
      fiber.cluster_past = -1;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Machine::start, 0);
      order.push_back(&fiber);
    }
  }
  if (schedule == 1) std::reverse(order.begin(), order.end());
  std::mt19937 random(schedule);
  size_t left = order.size();
  while (left > 0) {
    if (schedule > 1) std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (Fiber* fiber : order) {
      if (fiber->done || (fiber->generation != nullptr && *fiber->generation <= fiber->past)) continue;
      machine.enter(*fiber);
      moved = true;
      if (fiber->done) --left;
    }
    if (!moved) fail("threads wait for others that never come");
  }
}

// An exchange of all lanes of the warp: what each gave.
inline const uint64_t* exchange(const char* what, unsigned mask, uint64_t mine) {
  if (mask != 0xFFFFFFFFu) fail("an exchange of some lanes only");
  Fiber& fiber = current();
  Warp& warp = *fiber.block->warps[fiber.thread.x / 32];
  warp.slots[fiber.thread.x % 32] = mine;
  const int64_t past = warp.barrier.arrive(what);
  Machine::get().wait(warp.barrier.generation, past);
  return warp.published;
}

}  // namespace emulator

#define threadIdx (emulator::current().thread)
#define blockIdx (emulator::current().block->index)
#define blockDim (emulator::current().block->size)

inline void __syncthreads() {
  emulator::Barrier& barrier = emulator::current().block->barrier;
  const int64_t past = barrier.arrive("__syncthreads");
  emulator::Machine::get().wait(barrier.generation, past);
}
inline int __syncthreads_or(int predicate) {
  emulator::Barrier& barrier = emulator::current().block->barrier;
  barrier.any = barrier.any || predicate != 0;
  const int64_t past = barrier.arrive("__syncthreads_or");
  emulator::Machine::get().wait(barrier.generation, past);
  return barrier.any_published;
}

inline int __any_sync(unsigned mask, int predicate) {
  const uint64_t* lanes = emulator::exchange("__any_sync", mask, predicate != 0);
  return std::any_of(lanes, lanes + 32, [](uint64_t x) { return x != 0; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  const uint64_t* lanes = emulator::exchange("__reduce_max_sync", mask, value);
  return static_cast<unsigned>(*std::max_element(lanes, lanes + 32));
}
inline double __shfl_xor_sync(unsigned mask, double value, int distance) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = emulator::exchange("__shfl_xor_sync", mask, bits)[(threadIdx.x % 32) ^ static_cast<unsigned>(distance)];
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

template <class To, class From>
inline To bit_cast_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(uint32_t x) {
  return bit_cast_of<float>(x);
}
inline float __int_as_float(int32_t x) {
  return bit_cast_of<float>(x);
}
inline uint32_t __float_as_uint(float x) {
  return bit_cast_of<uint32_t>(x);
}
inline long long __double_as_longlong(double x) {
  return bit_cast_of<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return bit_cast_of<double>(x);
}

inline void cluster_arrive() {
  emulator::Fiber& fiber = emulator::current();
  if (fiber.cluster_past >= 0) emulator::fail("a thread arrives twice and does not wait");
  fiber.cluster_past = fiber.block->cluster->barrier.arrive("cluster");
}
inline void cluster_wait() {
  emulator::Fiber& fiber = emulator::current();
  if (fiber.cluster_past < 0) emulator::fail("a thread waits and has not arrived");
  emulator::Machine::get().wait(fiber.block->cluster->barrier.generation, fiber.cluster_past);
  fiber.cluster_past = -1;
}
// What another block of the cluster has where this one has `mine` in its shared memory.
template <class T>
T* cluster_address(T* mine, int block) {
  emulator::Block& own = *emulator::current().block;
  const auto offset = reinterpret_cast<char*>(mine) - own.shared;
  char* shared = own.cluster->blocks[block]->shared;
  if (shared == nullptr) emulator::fail("the shared memory of a block that has ended");
  return reinterpret_cast<T*>(shared + offset);
}
