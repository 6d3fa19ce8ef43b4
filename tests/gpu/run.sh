#!/usr/bin/env bash
# Runs every test that a GPU can run, and keeps the results: tests/gpu/run.sh [RESULTS.json] [pytest options]. Those of the
# kernels and of engines come first, JOBS at a time (default 1; more need pytest-xdist); then, alone, those that measure
# memory.
# PYTHON: the interpreter with torch for CUDA (default: python3). TRTX_COMMIT: the commit, where there is no git.
set -euo pipefail
cd "$(dirname "$0")/../.."
export TRTX_GPU_RESULTS=${1:-tests/gpu/results/latest.json}
export PYTHONPATH="$PWD/.src${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
rm -f "$TRTX_GPU_RESULTS"

run() {
    "${PYTHON:-python3}" -m pytest -m '' -p no:cacheprovider -p tests.gpu.record "$@" || [ $? = 5 ] # 5: none was chosen
}
failed=0
parallel=(); [ "${JOBS:-1}" = 1 ] || parallel=(-n "$JOBS")
run ${parallel[@]+"${parallel[@]}"} tests/gpu tests/kernels --ignore=tests/gpu/test_ledger.py "${@:2}" || failed=1
run tests/gpu/test_ledger.py "${@:2}" || failed=1
exit $failed
