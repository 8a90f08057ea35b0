#!/usr/bin/env bash
# On a GPU machine with torch, nvcc, cmake, ninja, pybind11 and scikit-build-core: builds the ops,
# runs every op test (a skipped one fails), the memory checker on them, and the op benchmarks.
# Needs no package index. Results and logs land in ${OUT:-build/gpu}.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu}
site=$PWD/build/gpu-site
mkdir -p "$OUT"
failed=0

MOETUNER_CUDA=ON MOETUNER_WERROR=ON python3 -m pip install --quiet --no-index --no-deps \
  --no-build-isolation --upgrade --target "$site" . 2>&1 | tee "$OUT/build.log" || exit 1
export PYTHONPATH=$site FAIL_WITHOUT_CUDA=1

python3 -m pytest tests/ops -p no:cacheprovider 2>&1 | tee "$OUT/tests.log" || failed=1
compute-sanitizer --tool memcheck --error-exitcode 1 python3 -m pytest -q -p no:cacheprovider \
  tests/ops -k "cuda_equals or larger_table or one_expert" 2>&1 | tee "$OUT/memcheck.log" \
  || failed=1
compute-sanitizer --tool racecheck --error-exitcode 1 python3 -m pytest -q -p no:cacheprovider \
  tests/ops -k "larger_table or one_expert" 2>&1 | tee "$OUT/racecheck.log" || failed=1
python3 -m pytest benchmarks -p no:cacheprovider --benchmark-only -q \
  -k count_routing --benchmark-json "$OUT/count_routing.json" > "$OUT/benchmarks.log" 2>&1 \
  || failed=1
tail -40 "$OUT/benchmarks.log"
exit $failed
