// Runs the CUDA device code of beam search on a CPU over the cases in a file.
//
//     beam_search_emulated step | advance INPUT OUTPUT
//
// INPUT: for each case the numbers of struct Header (Rule), then logits, forbidden, scores and valid (the tensors of
// BeamAdvance in their order), each as many bytes as the kernels may read. OUTPUT: for each case what was written, one
// tensor after another. Every buffer is an allocation of
// its own, so that AddressSanitizer sees a step over its ends, and is full of numbers that would win until it is
// written.
#include "../emulator.h"
// The device code finds what it calls in the emulator.
#include <fstream>

#include "../../csrc/beam_search/cuda_kernels.h"

namespace {

using namespace mmkernels;

struct Header {
  int64_t items, beams, vocabulary, candidates, normalize, mask_first, dtype, row_stride, forbidden_stride,
      has_forbidden, has_valid;
  // The device, and the order in which threads run.
  int64_t multiprocessors, clusters, warps, part_bytes, least_part, staged_bytes, group_bytes, schedule;
};

struct Buffer {
  char* data;

  explicit Buffer(size_t bytes) : data(static_cast<char*>(std::malloc(bytes))) { std::memset(data, 0x7F, bytes); }
  Buffer(std::istream& from, size_t bytes) : Buffer(bytes) { from.read(data, static_cast<std::streamsize>(bytes)); }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data); }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};

struct Launch {
  const BeamPlan& plan;
  unsigned schedule;

  template <class Body>
  void run(int64_t blocks, int cluster, int threads, size_t shared, const Body& body) const {
    for (int64_t first = 0; first < blocks; first += cluster)
      emulator::run_cluster(first, cluster, threads, shared, schedule, body);
  }
  template <class Body>
  static void with_types(const BeamStep& step, const Body& body) {
    const auto masked = [&](auto element) {
      if (step.forbidden != nullptr)
        body(element, std::true_type());
      else
        body(element, std::false_type());
    };
    if (step.dtype == Dtype::kBFloat16)
      masked(beam::BFloat16());
    else if (step.dtype == Dtype::kFloat16)
      masked(beam::Float16());
    else
      masked(0.f);
  }
  void scan(const BeamArguments& a, int64_t blocks) const {
    with_types(a.step, [&](auto element, auto masked) {
      run(blocks, plan.cluster ? plan.parts : 1, 32 * plan.warps, plan.shared,
          [&](char* shared) { beam::scan<decltype(element), masked()>(a, shared); });
    });
  }
  void sum(const BeamArguments& a, int64_t blocks) const {
    with_types(a.step, [&](auto element, auto masked) {
      run(blocks, 1, 32 * plan.warps, 0, [&](char*) { beam::sum<decltype(element), masked()>(a); });
    });
  }
  void merge(const BeamArguments& a, int64_t items) const {
    run(items, 1, 32 * plan.warps, 0, [&](char*) { beam::merge(a); });
  }
};

// The scratch as buffers of their own.
struct Apart {
  const Launch& launch;
  BeamPlan plan;
  int64_t parts;
  Buffer sums{sizeof(double) * parts * plan.warps}, statistics, maxima{sizeof(float) * parts},
      kept_logits{sizeof(float) * parts * plan.keep}, kept_tokens{sizeof(int32_t) * parts * plan.keep};

  Apart(const Launch& launch, const BeamPlan& plan, int64_t rows)
      : launch(launch), plan(plan), parts(rows * plan.parts), statistics(sizeof(float) * 2 * rows) {}

  BeamArguments move(BeamArguments a) const {
    a.sums = sums.as<double>();
    a.statistics = statistics.as<float>();
    a.maxima = maxima.as<float>();
    a.kept_logits = kept_logits.as<float>();
    a.kept_tokens = kept_tokens.as<int32_t>();
    return a;
  }
  void scan(const BeamArguments& a, int64_t blocks) const { launch.scan(move(a), blocks); }
  void sum(const BeamArguments& a, int64_t blocks) const { launch.sum(move(a), blocks); }
  void merge(const BeamArguments& a, int64_t items) const { launch.merge(move(a), items); }
};

void run(const Header& h, std::istream& in, std::ostream& out) {
  const int64_t rows = h.items * h.beams, places = h.items * h.candidates;
  BeamStep step{};
  step.dtype = static_cast<Dtype>(h.dtype);
  const Buffer logits(in, ((rows - 1) * h.row_stride + h.vocabulary) * bytes_of(step.dtype));
  const Buffer forbidden(in, h.has_forbidden ? (rows - 1) * h.forbidden_stride + h.vocabulary : 0);
  const Buffer scores(in, rows * sizeof(float)), valid(in, h.has_valid ? rows : 0);
  const Buffer out_scores(places * sizeof(float)), out_beams(places * sizeof(int64_t)),
      out_tokens(places * sizeof(int64_t)), out_valid(places), poisoned(h.items);
  step.logits = logits.data;
  step.row_stride = h.row_stride;
  step.forbidden = h.has_forbidden ? forbidden.as<bool>() : nullptr;
  step.forbidden_stride = h.forbidden_stride;
  step.scores = scores.as<float>();
  step.valid = h.has_valid ? valid.as<bool>() : nullptr;
  step.items = h.items;
  step.beams = h.beams;
  step.vocabulary = h.vocabulary;
  step.candidates = h.candidates;
  step.normalize = h.normalize;
  step.mask_first = h.mask_first;
  step.out_scores = out_scores.as<float>();
  step.out_beams = out_beams.as<int64_t>();
  step.out_tokens = out_tokens.as<int64_t>();
  step.out_valid = out_valid.as<bool>();
  step.out_poisoned = poisoned.as<bool>();
  const BeamDevice device{static_cast<int>(h.multiprocessors),
                          h.clusters != 0,
                          static_cast<int>(h.warps),
                          h.part_bytes,
                          h.least_part,
                          h.staged_bytes,
                          h.group_bytes};
  const BeamPlan plan = plan_beam_step(step, device);
  const Launch launch{plan, static_cast<unsigned>(h.schedule)};
  const Apart apart(launch, plan, rows);
  const Buffer scratch(plan.scratch);
  launch_beam_step(step, plan, scratch.data, apart);
  out.write(out_scores.data, places * sizeof(float));
  out.write(out_beams.data, places * sizeof(int64_t));
  out.write(out_tokens.data, places * sizeof(int64_t));
  out.write(out_valid.data, places);
  out.write(poisoned.data, h.items);
}

struct Rule {
  int64_t items, beams, candidates, num_eos, step, max_length, stop, bound_length, target, num_return, cuts, first_come;
};

void run(const Rule& h, std::istream& in, std::ostream& out) {
  constexpr size_t kFloat = sizeof(float), kInt = sizeof(int64_t), kFlag = 1;
  const int64_t found = h.items * h.candidates, kept = h.items * h.beams;
  const Buffer scores(in, found * kFloat), beams(in, found * kInt), tokens(in, found * kInt), valid(in, found * kFlag),
      poisoned(in, h.items * kFlag);
  struct Changed {
    Buffer buffer;
    size_t bytes;
    Changed(std::istream& in, size_t bytes) : buffer(in, bytes), bytes(bytes) {}
    explicit Changed(size_t bytes) : buffer(bytes), bytes(bytes) {}
  };
  const Changed best_scores(in, kept * kFloat), best_log_probs(in, kept * kFloat), best_times(in, kept * kInt),
      best_beams(in, kept * kInt), best_tokens(in, kept * kInt), best_valid(in, kept * kFlag),
      counts(in, h.items * kInt), faults(in, h.items * kInt), done(in, h.items * kFlag), missed(in, h.items * kFloat),
      top_ended(in, h.items * kFlag);
  const Buffer eos(in, h.num_eos * kInt), penalties(in, (h.max_length + 1) * kFloat);
  const Changed next_scores(kept * kFloat), next_parents(kept * kInt), next_tokens(kept * kInt),
      next_valid(kept * kFlag);
  BeamAdvance a{};
  a.items = h.items;
  a.beams = h.beams;
  a.candidates = h.candidates;
  a.scores = scores.as<float>();
  a.found_beams = beams.as<int64_t>();
  a.tokens = tokens.as<int64_t>();
  a.valid = valid.as<bool>();
  a.poisoned = poisoned.as<bool>();
  a.best_scores = best_scores.buffer.as<float>();
  a.best_log_probs = best_log_probs.buffer.as<float>();
  a.best_times = best_times.buffer.as<int64_t>();
  a.best_beams = best_beams.buffer.as<int64_t>();
  a.best_tokens = best_tokens.buffer.as<int64_t>();
  a.best_valid = best_valid.buffer.as<bool>();
  a.counts = counts.buffer.as<int64_t>();
  a.faults = faults.buffer.as<int64_t>();
  a.done = done.buffer.as<bool>();
  a.missed = missed.buffer.as<float>();
  a.top_ended = top_ended.buffer.as<bool>();
  a.eos = eos.as<int64_t>();
  a.num_eos = h.num_eos;
  a.penalties = penalties.as<float>();
  a.step = h.step;
  a.max_length = h.max_length;
  a.stop = h.stop;
  a.bound_length = h.bound_length;
  a.target = h.target;
  a.num_return = h.num_return;
  a.cuts = h.cuts != 0;
  a.first_come = h.first_come != 0;
  a.next_scores = next_scores.buffer.as<float>();
  a.next_parents = next_parents.buffer.as<int64_t>();
  a.next_tokens = next_tokens.buffer.as<int64_t>();
  a.next_valid = next_valid.buffer.as<bool>();
  for (int64_t block = 0; block < divide_up(h.items, 32); ++block)
    emulator::run_cluster(block, 1, 32, 0, 0, [&](char*) { beam::advance(a); });
  for (const Changed* x :
       {&next_scores, &next_parents, &next_tokens, &next_valid, &best_scores, &best_log_probs, &best_times, &best_beams,
        &best_tokens, &best_valid, &counts, &faults, &done, &missed, &top_ended})
    out.write(x->buffer.data, static_cast<std::streamsize>(x->bytes));
}

template <class Case>
void run_all(std::istream& in, std::ostream& out) {
  Case header;
  while (in.read(reinterpret_cast<char*>(&header), sizeof(header))) run(header, in, out);
}

}  // namespace

int main(int, char** arguments) {
  std::ifstream in(arguments[2], std::ios::binary);
  std::ofstream out(arguments[3], std::ios::binary);
  if (std::strcmp(arguments[1], "step") == 0)
    run_all<Header>(in, out);
  else
    run_all<Rule>(in, out);
  return 0;
}
