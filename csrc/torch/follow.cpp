#include "moetuner/ops/follow.h"

#include "routing_args.h"

#include <torch/library.h>

#include <algorithm>
#include <tuple>

#ifdef MOETUNER_WITH_CUDA
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

// Notes of tokens that follow their experts, written before they travel and read where they arrive.

namespace moetuner {
namespace {

using T = at::Tensor;
using Lines = std::tuple<T, T, T, T, T>;

constexpr const char* kNotesOp = "follow_notes";
constexpr const char* kLinesOp = "follow_lines";
constexpr std::int64_t kNoteAlignment = 4;  // numbers, 16 bytes: rows of peers travel by these

std::int64_t note_width(std::int64_t num_destinations) {
  return (kNoteHead + num_destinations + kNoteAlignment - 1) / kNoteAlignment * kNoteAlignment;
}

void check_rank(const char* op, std::int64_t num_ranks, std::int64_t rank) {
  TORCH_CHECK_VALUE(rank >= 0 && rank < num_ranks,
                    op,
                    ": rank must be one of the ",
                    num_ranks,
                    " of the group, got ",
                    rank);
}

void check_notes(const char* name, const T& notes, std::int64_t width) {
  TORCH_CHECK_VALUE(notes.dim() == 2 && notes.size(1) == width,
                    kLinesOp,
                    ": ",
                    name,
                    " must be [rows, ",
                    width,
                    "], got ",
                    notes.sizes());
  TORCH_CHECK_TYPE(notes.scalar_type() == at::kFloat,
                   kLinesOp,
                   ": ",
                   name,
                   " must be float32, got ",
                   notes.scalar_type());
  check_contiguous(kLinesOp, name, notes);
}

void check_table(const char* name, const T& table, at::ScalarType type, const T& topk_ids) {
  TORCH_CHECK_TYPE(table.scalar_type() == type,
                   kNotesOp,
                   ": ",
                   name,
                   " must be ",
                   type,
                   ", got ",
                   table.dtype());
  check_contiguous(kNotesOp, name, table);
  check_device(kNotesOp, name, table, "topk_ids", topk_ids);
}

class OnCpu {
 public:
  explicit OnCpu(const T&) {}

  template <typename Id>
  void run(const NoteArgs<Id>& args) const {
    cpu::write_notes(args);
  }
  void run(const LineArgs& args) const { cpu::read_lines(args); }
};

#ifdef MOETUNER_WITH_CUDA
class OnCuda {
 public:
  explicit OnCuda(const T& here) : guard_(here.device()) {}

  template <typename Id>
  void run(const NoteArgs<Id>& args) const {
    cuda::write_notes(args, c10::cuda::getCurrentCUDAStream());
  }
  void run(const LineArgs& args) const {
    cuda::read_lines(args, c10::cuda::getCurrentCUDAStream());
  }

 private:
  c10::DeviceGuard guard_;
};
#endif

/// Both ops on one kind of device.
template <typename Device>
struct Ops {
  static T notes(const T& topk_ids,
                 const T& keys,
                 const T& candidates,
                 const T& num_candidates,
                 std::int64_t slots_per_rank,
                 std::int64_t num_ranks,
                 std::int64_t rank) {
    const Device device(topk_ids);
    check_ids(kNotesOp, "topk_ids", topk_ids);
    check_rank(kNotesOp, num_ranks, rank);
    check_table("keys", keys, at::kLong, topk_ids);
    check_table("candidates", candidates, at::kInt, topk_ids);
    check_table("num_candidates", num_candidates, at::kInt, topk_ids);
    const std::int64_t num_tokens = topk_ids.size(0);
    TORCH_CHECK_VALUE(keys.dim() == 2 && keys.size(0) == num_tokens && keys.size(1) == 2,
                      kNotesOp,
                      ": keys must be [",
                      num_tokens,
                      ", 2], got ",
                      keys.sizes());
    TORCH_CHECK_VALUE(
        candidates.dim() == 2 && num_candidates.numel() == candidates.size(0) &&
            candidates.size(1) > 0 && slots_per_rank > 0,
        kNotesOp,
        ": candidates must be [experts, replicas] beside num_candidates and a positive "
        "slots_per_rank, got ",
        candidates.sizes());
    const std::int64_t num_destinations = std::min(topk_ids.size(1), num_ranks);
    const std::int64_t width = note_width(num_destinations);
    const T notes = at::empty({num_tokens, width}, topk_ids.options().dtype(at::kFloat));
    with_id_type(topk_ids, [&]<typename Id>() {
      device.run(NoteArgs<Id>{.topk_ids = topk_ids.const_data_ptr<Id>(),
                              .keys = keys.const_data_ptr<std::int64_t>(),
                              .candidates = candidates.const_data_ptr<std::int32_t>(),
                              .num_candidates = num_candidates.const_data_ptr<std::int32_t>(),
                              .notes = notes.mutable_data_ptr<float>(),
                              .num_tokens = num_tokens,
                              .top_k = topk_ids.size(1),
                              .num_experts = candidates.size(0),
                              .max_candidates = candidates.size(1),
                              .slots_per_rank = slots_per_rank,
                              .num_ranks = num_ranks,
                              .rank = rank,
                              .num_destinations = num_destinations,
                              .width = width});
    });
    return notes;
  }

  static Lines lines(const T& arrived,
                     const T& mine,
                     std::int64_t num_destinations,
                     std::int64_t num_ranks,
                     std::int64_t rank) {
    const Device device(arrived);
    check_rank(kLinesOp, num_ranks, rank);
    TORCH_CHECK_VALUE(num_destinations > 0 && num_destinations <= num_ranks,
                      kLinesOp,
                      ": num_destinations must be 1 to ",
                      num_ranks,
                      ", got ",
                      num_destinations);
    check_notes("arrived", arrived, note_width(num_destinations));
    check_notes("mine", mine, note_width(num_destinations));
    check_device(kLinesOp, "mine", mine, "arrived", arrived);
    const auto int32 = arrived.options().dtype(at::kInt);
    const std::int64_t num_lines = arrived.size(0) + mine.size(0);
    Lines found{at::empty({arrived.size(0), 1}, int32),
                at::empty({num_lines, num_destinations}, int32),
                at::empty({num_lines, 2}, int32.dtype(at::kLong)),
                at::empty({num_lines}, int32.dtype(at::kLong)),
                at::zeros({2}, int32)};
    auto& [out, into, keys, order, counts] = found;
    device.run(LineArgs{.arrived = arrived.const_data_ptr<float>(),
                        .mine = mine.const_data_ptr<float>(),
                        .out = out.mutable_data_ptr<std::int32_t>(),
                        .into = into.mutable_data_ptr<std::int32_t>(),
                        .keys = keys.mutable_data_ptr<std::int64_t>(),
                        .order = order.mutable_data_ptr<std::int64_t>(),
                        .counts = counts.mutable_data_ptr<std::int32_t>(),
                        .num_arrived = arrived.size(0),
                        .num_tokens = mine.size(0),
                        .num_destinations = num_destinations,
                        .num_ranks = num_ranks,
                        .rank = rank,
                        .width = arrived.size(1)});
    return found;
  }

  static void implement(torch::Library& m) {
    m.impl("follow_notes", &notes);
    m.impl("follow_lines", &lines);
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(moetuner, m) {
  m.def(
      "follow_notes(Tensor topk_ids, Tensor keys, Tensor candidates, Tensor num_candidates, "
      "int slots_per_rank, int num_ranks, int rank) -> Tensor");
  m.def(
      "follow_lines(Tensor arrived, Tensor mine, int num_destinations, int num_ranks, int rank) "
      "-> (Tensor out, Tensor into, Tensor keys, Tensor order, Tensor counts)");
}

TORCH_LIBRARY_IMPL(moetuner, CPU, m) { Ops<OnCpu>::implement(m); }

#ifdef MOETUNER_WITH_CUDA
TORCH_LIBRARY_IMPL(moetuner, CUDA, m) { Ops<OnCuda>::implement(m); }
#endif

}  // namespace moetuner
