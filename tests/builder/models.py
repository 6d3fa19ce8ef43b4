"""Models that the builder's tests share."""

from trtx.builder.gpus import Target, table
from trtx.builder.sizing import Sizing
from trtx.converters.checkpoint import CheckpointConfig
from trtx.converters.families import find_family

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

TINY = {
    **LLAMA_8B,
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def spec_of(config, **changes):
    content = {**config, **changes}
    return find_family(content, "config.json").spec(content, "config.json")


def llama_8b(**changes):
    return CheckpointConfig(spec_of(LLAMA_8B, **changes), "bf16")


def sizing(model=None, gpu="h100-sxm", **changes):
    row = table().get(gpu)
    target = Target("cuda" if row else "cpu", gpu, row, row.memory_bytes if row else 32 << 30)
    fields = {
        "compute_dtype": "bf16",
        "kv_dtype": "bf16",
        "max_batch_size": 64,
        "max_num_tokens": 2048,
        "max_seq_len": 8192,
        "kv_block_size": 32,
    }
    return Sizing(model or llama_8b(), target, **{**fields, **changes})
