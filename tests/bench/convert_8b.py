"""How fast `trtx convert` is beside `cp`, and how much memory it takes, on an 8B-shaped checkpoint.

    python tests/bench/convert_8b.py [--gigabytes 16] [--folder /tmp/convert-bench] [--dtype auto]

Makes a random safetensors checkpoint in the shape of Llama-3.1-8B (fewer layers for fewer gigabytes), copies it with
`cp -r` and `sync`, and converts it (which syncs too), each after dropping its pages from the page cache. Samples
the anonymous memory (RssAnon) of the conversion. The folder is deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 128256, 32, 8, 128
LAYER = {
    "input_layernorm": (HIDDEN,),
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "post_attention_layernorm": (HIDDEN,),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
OUTER = {"model.embed_tokens": (VOCAB, HIDDEN), "lm_head": (VOCAB, HIDDEN), "model.norm": (HIDDEN,)}
LAYERS_A_FILE = 10


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """Write the checkpoint in shards of about 4 GB; returns its bytes."""
    layer_bytes, outer_bytes = (2 * sum(torch.Size(s).numel() for s in part.values()) for part in (LAYER, OUTER))
    layers = max(1, round((gigabytes * 1e9 - outer_bytes) / layer_bytes))
    folder.mkdir(parents=True)
    files: list[dict[str, tuple[int, ...]]] = [{f"{name}.weight": shape for name, shape in OUTER.items()}]
    for layer in range(layers):
        if layer % LAYERS_A_FILE == 0:
            files.append({})
        files[-1].update({f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER.items()})
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map.update(dict.fromkeys(tensors, file))
        save_file({name: _random(shape) for name, shape in tensors.items()}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCAB,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return layers * layer_bytes + outer_bytes


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    """Random finite bf16 bits: a file system that compresses or deduplicates gains nothing."""
    return torch.randint(-(1 << 14), 1 << 14, shape, dtype=torch.int16).view(torch.bfloat16)


def drop_from_cache(folder: Path) -> None:
    """Forget the folder's pages, so that every run reads from the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_copy(source: Path, target: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    return time.perf_counter() - started


def time_convert(source: Path, target: Path, dtype: str) -> tuple[float, int]:
    """Seconds (start of Python included) and the highest RssAnon seen, in bytes."""
    command = "from trtx.cli.app import main; main()"
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", command, "convert", str(source), str(target), "--dtype", dtype],
        stdout=subprocess.DEVNULL,
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous_memory(process.pid))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit("trtx convert failed")
    return time.perf_counter() - started, peak


def _anonymous_memory(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=16)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/convert-bench"))
    parser.add_argument("--dtype", default="auto", help="of the converted checkpoint")
    arguments = parser.parse_args()
    source, copy, out = (arguments.folder / name for name in ("source", "copy", "out"))
    try:
        size = make_checkpoint(source, arguments.gigabytes)
        drop_from_cache(source)
        copied = time_copy(source, copy)
        shutil.rmtree(copy)
        drop_from_cache(source)
        converted, peak = time_convert(source, out, arguments.dtype)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    print(f"{size / 1e9:.1f} GB checkpoint, --dtype {arguments.dtype}")
    print(f"{'':14}{'seconds':>8}{'GB/s':>8}{'of cp':>8}{'RssAnon peak':>15}")
    print(f"{'cp + sync':14}{copied:8.1f}{size / copied / 1e9:8.2f}{1:8.0%}")
    print(f"{'trtx convert':14}{converted:8.1f}{size / converted / 1e9:8.2f}{copied / converted:8.0%}", end="")
    print(f"{peak / 1e9:12.2f} GB")


if __name__ == "__main__":
    main()
