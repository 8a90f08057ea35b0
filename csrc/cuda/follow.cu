// A thread writes the note of one token, or reads that of one line. Tokens are counted block by
// block.

#include "launch.cuh"
#include "moetuner/ops/follow.h"

#include <cuda_runtime.h>

namespace moetuner::cuda {
namespace {

constexpr int kThreads = 128;

__device__ std::int64_t thread_number() {
  return std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
}

template <typename Id>
__global__ void write_notes_kernel(const __grid_constant__ NoteArgs<Id> args) {
  wait_for_predecessor();
  const std::int64_t token = thread_number();
  if (token < args.num_tokens) write_note(args, token);
}

__global__ void read_lines_kernel(const __grid_constant__ LineArgs args) {
  wait_for_predecessor();
  const std::int64_t line = thread_number();
  const bool ends = line < args.num_arrived + args.num_tokens && read_line(args, line);
  const int here = __syncthreads_count(ends);
  const int stayed = __syncthreads_count(ends && line >= args.num_arrived);
  if (threadIdx.x != 0) return;
  if (here > 0) atomicAdd(args.counts, here);
  if (stayed > 0) atomicAdd(args.counts + 1, stayed);
}

}  // namespace

template <typename Id>
void write_notes(const NoteArgs<Id>& args, cudaStream_t stream) {
  if (args.num_tokens == 0) return;
  const Grid grid{.blocks = ceil_div(args.num_tokens, kThreads), .threads = kThreads};
  launch(write_notes_kernel<Id>, grid, stream, args);
}

void read_lines(const LineArgs& args, cudaStream_t stream) {
  if (args.num_lines() == 0) return;
  const Grid grid{.blocks = ceil_div(args.num_lines(), kThreads), .threads = kThreads};
  launch(read_lines_kernel, grid, stream, args);
}

template void write_notes(const NoteArgs<std::int32_t>&, cudaStream_t);
template void write_notes(const NoteArgs<std::int64_t>&, cudaStream_t);

}  // namespace moetuner::cuda
