#!/usr/bin/env bash
# Runs every GPU test and keeps the results: tests/gpu/run.sh [RESULTS.json] [pytest options].
# PYTHON: the interpreter with torch for CUDA (default: python3). TRTX_COMMIT: the commit, where there is no git.
set -euo pipefail
cd "$(dirname "$0")/../.."
export TRTX_GPU_RESULTS=${1:-tests/gpu/results/latest.json}
export PYTHONPATH="$PWD/.src${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" -m pytest -m gpu -p no:cacheprovider tests/gpu "${@:2}"
