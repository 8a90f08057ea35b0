#!/usr/bin/env bash
# On a GPU machine with torch, nvcc, cmake, ninja, pybind11 and scikit-build-core: builds the ops, runs
# every test of what runs there (a skipped one fails) and, beside them, the sanitizers on a selection,
# then the op benchmarks. With MOETUNER_NCCL=.../libnccl.so.2 of NCCL >= 2.30, ranks share a GPU in the
# tests of the exchange, and 8 of them run its benchmark on one. Needs no package index. Results and
# logs land in ${OUT:-build/gpu}.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
site=$PWD/build/gpu-site
mkdir -p "$OUT"
failed=0

MOETUNER_CUDA=ON MOETUNER_WERROR=ON python3 -m pip install --quiet --no-index --no-deps \
  --no-build-isolation --upgrade --target "$site" . > "$OUT/build.log" 2>&1 \
  || { tail -30 "$OUT/build.log"; exit 1; }
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} FAIL_WITHOUT_CUDA=1

# Few and many choices, all row alignments, gradients, counters; one line per case, so that it ends.
# initcheck (CUDA 13.0) calls rows that the bulk copy engine wrote uninitialised when they are copied
# to the host, though their bytes equal the CPU's (test_cuda_equals_the_cpu). It gets the cases that
# use registers, or whose rows nobody reads.
every="(cuda_equals_float64 and (129 or 777)) or (gradients and cuda and dtype1 and shape1)"
every+=" or larger_table or (in_the_same_pass and cuda and 5000)"
bulk="(cuda_equals_the_cpu and (129 or 777 or 2500)) or (any_address and 3000)"
declare -A cases=(
  [memcheck]="$every or $bulk"
  [racecheck]="$every or $bulk"
  [initcheck]="$every or (any_address and 3000 and not 8-3000)"
)
tools=()
for tool in "${!cases[@]}"; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${SANITIZER_SECONDS:-600}" \
    compute-sanitizer --tool "$tool" --error-exitcode 1 \
    python3 -m pytest -q -p no:cacheprovider tests/ops -k "${cases[$tool]}" \
    > "$OUT/$tool.log" 2>&1 &
  tools+=($!)
done
python3 -m pytest tests/{ops,nn,integrations} -q -p no:cacheprovider > "$OUT/tests.log" 2>&1 || failed=1
tail -5 "$OUT/tests.log"
on_one_gpu=()
[ -n "${MOETUNER_NCCL:-}" ] && on_one_gpu=(benchmarks/exchange/on_one_gpu.sh "$MOETUNER_NCCL")
"${on_one_gpu[@]}" python3 -m pytest tests/distributed -q -p no:cacheprovider -k cuda \
  --ignore tests/distributed/test_matrix.py > "$OUT/distributed.log" 2>&1 || failed=1
"${on_one_gpu[@]}" python3 -m pytest tests/distributed/test_matrix.py -q -p no:cacheprovider -k cuda \
  -n 6 --matrix "$OUT/matrix.md" > "$OUT/matrix.log" 2>&1 || failed=1
tail -5 "$OUT/distributed.log"
tail -5 "$OUT/matrix.log"
for tool in "${tools[@]}"; do wait "$tool" || failed=1; done
tail -qn 2 "$OUT"/{memcheck,racecheck,initcheck}.log

timeout -s INT "${BENCHMARK_SECONDS:-1800}" python3 -m pytest benchmarks/bench_{permute,unpermute,count_routing}.py -q -p no:cacheprovider \
  --benchmark-only --benchmark-json "$OUT/ops.json" > "$OUT/benchmarks.log" 2>&1 || failed=1
tail -3 "$OUT/benchmarks.log"
if [ -n "${MOETUNER_NCCL:-}" ]; then
  "${on_one_gpu[@]}" torchrun --nproc-per-node 8 benchmarks/exchange/run.py \
    --plans "${MOETUNER_PLANS:-.}" --out "$OUT/exchange.json" > "$OUT/exchange.log" 2>&1 || failed=1
  tail -3 "$OUT/exchange.log"
fi
exit $failed
