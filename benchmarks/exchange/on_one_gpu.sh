#!/usr/bin/env bash
# Runs a command whose NCCL ranks share one GPU, side by side:
#
#     on_one_gpu.sh LIBNCCL torchrun --nproc-per-node 8 benchmarks/exchange/run.py --out FILE
#
# LIBNCCL is libnccl.so.2 of NCCL >= 2.30 (as the wheel nvidia-nccl-cu13 has it); older ones refuse
# two ranks on a GPU. Without MPS, which this starts and ends, the ranks take turns, and times mean
# nothing. Copies then go through the card's own memory: no link is measured.
set -uo pipefail
library=$(realpath "$1")
shift
folder=$(mktemp -d)
export CUDA_MPS_PIPE_DIRECTORY=$folder/pipe CUDA_MPS_LOG_DIRECTORY=$folder/log
mkdir "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
nvidia-cuda-mps-control -d
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} LD_PRELOAD=$library NCCL_MULTI_RANK_GPU_ENABLE=1 \
  NCCL_NVLS_ENABLE=0 NCCL_MAX_CTAS=2 "$@"
status=$?
echo quit | nvidia-cuda-mps-control
rm -rf "$folder"
exit $status
