#!/usr/bin/env bash
# Builds an engine for the H100 on a machine without a GPU, for tests/gpu/test_cuda.py to run there: tests/gpu/ship.sh
# FOLDER (default .cache/shipped). Random weights: the folder holds their seed, and the kernels.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-.cache/shipped}
mkdir -p "$folder"
cat >"$folder/config.json" <<'END'
{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "hidden_act": "silu",
 "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 30,
 "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0,
 "rms_norm_eps": 1e-05, "tie_word_embeddings": true}
END
exec "${TRTX:-.venv/bin/trtx}" build "random:$folder/config.json" "$folder/engine" --backend cuda --gpu h100-sxm \
    --max-batch-size 8 --max-seq-len 256 --force
