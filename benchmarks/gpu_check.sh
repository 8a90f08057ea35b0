#!/usr/bin/env bash
# On a GPU machine with torch, nvcc, cmake, ninja, pybind11 and scikit-build-core: builds the ops, runs
# every op test (a skipped one fails) and, beside them, the sanitizers on a selection, then the op
# benchmarks. Needs no package index. Results and logs land in ${OUT:-build/gpu}.
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
sanitized="(cuda_equals and (129 or 777 or 2500)) or (any_address and 3000) or larger_table"
sanitized+=" or (gradients and cuda and dtype1 and shape1) or (in_the_same_pass and cuda and 5000)"
tools=()
for tool in memcheck racecheck initcheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "${SANITIZER_SECONDS:-600}" \
    compute-sanitizer --tool "$tool" --error-exitcode 1 \
    python3 -m pytest -q -p no:cacheprovider tests/ops -k "$sanitized" \
    > "$OUT/$tool.log" 2>&1 &
  tools+=($!)
done
python3 -m pytest tests/ops -q -p no:cacheprovider > "$OUT/tests.log" 2>&1 || failed=1
tail -5 "$OUT/tests.log"
for tool in "${tools[@]}"; do wait "$tool" || failed=1; done
tail -qn 2 "$OUT"/{memcheck,racecheck,initcheck}.log

python3 -m pytest benchmarks/bench_{permute,unpermute,count_routing}.py -q -p no:cacheprovider \
  --benchmark-only --benchmark-json "$OUT/ops.json" > "$OUT/benchmarks.log" 2>&1 || failed=1
tail -3 "$OUT/benchmarks.log"
exit $failed
