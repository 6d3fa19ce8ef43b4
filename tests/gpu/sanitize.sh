#!/usr/bin/env bash
# Looks for bad memory accesses of the kernels: tests/gpu/sanitize.sh [pytest options]. Fails on any, and if a test does.
#
# compute-sanitizer watches tests of the kernels, of which it slows each down 20 to 50 times, so it sees a choice, in
# groups side by side: every kernel at least once, in bf16 where it has dtypes. Linears: every way to multiply of formats
# that between them use all kernels, shared tiles, gates. Attention: decodes, split ones, windows, prefill, an fp8 cache,
# latents, rotation. Experts: few tokens and many, sorted in one kernel and in two. Sampling: greedy, drawn with all cuts,
# penalized. Then whole steps of a Llama, and the kernels in CUDA C++. torch allocates each tensor apart, so that what
# lies behind one is not another's.
#
# PYTHON: the interpreter with torch for CUDA (default: python3). TRTX_COMMIT: the commit, where there is no git. Triton
# compiles what its cache lacks: that takes longer than the tests, and is over sooner where `pytest -m '' tests/kernels`
# ran before.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD/.src${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false PYTORCH_NO_CUDA_MEMORY_CACHING=1

sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")
[ -x "$sanitizer" ] || { echo "$sanitizer: no such program; it comes with the CUDA toolkit" >&2; exit 127; }

formats='[fp8- or [fp8_pc_pt- or [int8_wo- or [int8_sq- or [int4_awq- or [nvfp4_wo-'
elementwise='test_elementwise.py and bfloat16 and (test_add_norm[5 or test_embed[48 or test_activation[silu)'
sampling='test_sampling.py and ((test_greedy[5003 and bfloat16) or test_draws or test_penalties)'
native='(test_gemv4.py and (test_products[64- or test_gated[silu)) or (test_few.py and (bfloat16-48- or test_gated[silu))'
decodes='(test_lengths and (8-2-128-32 or 3-3-80-8)) or test_rotation[128-128-first or test_window[32 or test_soft_cap'
groups=(
    "test_linear.py and test_formats[ and ($formats)"
    'test_linear.py and (test_shared_tiles or test_few or test_gated[silu)'
    'test_attention.py and (bfloat16 or test_of_many or (TestDecode and test_window) or test_e4m3_cache)'
    'test_experts.py and (test_route[2 or (test_experts[ and silu and bfloat16) or test_many or test_pairs)'
    "test_decode.py and ($decodes or test_codes)"
    'test_prefill.py and ((test_lengths and bfloat16 and 8-2-128-32) or test_rotation[128-128-first or test_codes)'
    'test_gated.py and ((test_sizes[256-448 and bfloat16) or test_codes_in[fp8 or test_codes_out)'
    "test_cuda_ops.py and [llama] or ($elementwise) or ($sampling) or ($native)"
)

# An error of the driver's API is no bad access: torch asks for functions that a driver may not have.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for index in "${!groups[@]}"; do
    "$sanitizer" --tool memcheck --report-api-errors no --error-exitcode 86 "${PYTHON:-python3}" -m pytest -m '' \
        -p no:cacheprovider -k "${groups[index]}" tests/kernels tests/gpu/test_{gemv4,few,decode,prefill,gated}.py "$@" \
        >"$folder/$index" 2>&1 &
    running[index]=$!
done
failed=0
echo "commit ${TRTX_COMMIT:-$(git rev-parse HEAD)}, $(nvidia-smi --query-gpu=name --format=csv,noheader), $(date -u +%FT%TZ)"
for index in "${!groups[@]}"; do
    wait "${running[index]}" || failed=1
    printf '\n%s\n' "${groups[index]}"
    cat "$folder/$index"
done
exit $failed
