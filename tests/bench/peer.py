"""vLLM on the workloads of h100.py, on the same GPU: its figures are put beside those that a report has.

    python -m tests.bench.h100 --out h100-bench.json
    python -m tests.bench.peer --out h100-bench.json --case 8b-bf16

Needs vLLM (`pip install vllm`) where trtx is. One engine serves all workloads of a case, with room for as many
sequences as the largest batch has; of smaller ones, the loop below hands in a request when another is done, which costs
vLLM a step or two each time. Its prefix cache is off, weights are random, and FP8 is vLLM's own: a scale a weight, a
scale a token. Rows of a report that are of another GPU stay as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.h100 import CASES, NAMES, Bench, config_of, same_work
from trtx.converters.artifact import now

QUANTIZATION = {"none": None, "fp8": "fp8"}
"""What vLLM calls a format."""


class Peer(Bench):
    """One case, served by vLLM."""

    def run(self) -> Iterator[dict[str, Any]]:
        """The row of the start, then those of the workloads."""
        works = self.case.works
        llm, start = self.open(self.case.largest, max(work.isl + work.osl for work in works))
        yield {"case": self.case.name, "load_s": start}
        yield from (self.measure(llm, work, start) for work in works)
        llm.llm_engine.engine_core.shutdown()

    def open(self, batch: int, length: int) -> tuple[Any, float]:
        """An engine of random weights for so many sequences, and the seconds it took to be ready."""
        from vllm import LLM

        model = self.folder / self.case.name
        model.mkdir()
        (model / "config.json").write_text(json.dumps(config_of(self.case.model)))
        began = time.perf_counter()
        llm = LLM(
            str(model),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            quantization=QUANTIZATION[self.case.format],
            enable_prefix_caching=False,
            gpu_memory_utilization=0.9,
            max_model_len=length,
            max_num_seqs=batch,
            generation_config="vllm",
        )
        start = time.perf_counter() - began
        print(f"{self.case.name}: ready in {start:.1f} s", flush=True)
        return llm, start

    def serve(self, llm: Any, batch: int, count: int, isl: int, osl: int) -> float:
        """Seconds that `count` requests take, of which `batch` run at once: the engine keeps to that of the largest."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        last = RequestOutputKind.FINAL_ONLY
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=osl, detokenize=False, output_kind=last)
        waiting = list(self.prompts(count, isl).items())
        engine, running, tokens = llm.llm_engine, 0, 0
        most = batch if batch < self.case.largest else count
        began = time.perf_counter()
        while waiting or running:
            while waiting and running < most:
                name, prompt = waiting.pop()
                engine.add_request(name, tokens_input(prompt), params)
                running += 1
            done = [output for output in engine.step() if output.finished]
            tokens += sum(len(output.outputs[0].token_ids) for output in done)
            running -= len(done)
        seconds = time.perf_counter() - began
        assert tokens == count * osl, (tokens, count * osl)
        return seconds


def put_beside(rows: list[dict[str, Any]], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a report, with vLLM's figures in that of the same work on the same GPU."""
    figures = {name: theirs[name] for name in (*NAMES, "vllm", "date") if name in theirs}
    return [
        row | {"beside": figures} if same_work(row, theirs) and row.get("uuid") == theirs["uuid"] else row
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a report of h100.py, of this GPU")
    parser.add_argument("--case", required=True, choices=[case.name for case in CASES if case.format in QUANTIZATION])
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    import vllm
    from vllm.platforms import current_platform

    report = json.loads(args.out.read_text())
    uuid = current_platform.get_device_uuid().removeprefix("GPU-")  # without touching the GPU, as vLLM wants it
    if all(row.get("uuid") != uuid for row in report["rows"]):
        parser.error(f"{args.out} has no row of this GPU, {uuid}")
    (case,) = (case for case in CASES if case.name == args.case)
    with tempfile.TemporaryDirectory() as folder:
        for row in Peer(case, Path(folder), reps=1).run():
            row |= {"vllm": vllm.__version__, "date": now(), "uuid": uuid}
            report["rows"] = put_beside(report["rows"], row)
            args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
