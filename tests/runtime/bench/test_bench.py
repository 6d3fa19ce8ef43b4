"""`trtx bench` on a tiny engine with random weights, through the command line."""

import json

import pytest
from typer.testing import CliRunner

from trtx.cli.app import app
from trtx.converters.errors import ExitCode
from trtx.runtime.bench.report import Report

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
SMALL = ("--isl", "8", "--osl", "4", "--num-requests", "6")


@pytest.fixture(autouse=True, scope="module")
def small_ceiling():
    """The machine's bandwidth is not what is tested: measure it on little memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trtx.runtime.bench.roofline._READ_BYTES", 1 << 20)
        patch.setattr("trtx.runtime.bench.roofline._MATMUL", 64)
        yield


def trtx(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    limits = ("--max-batch-size", 4, "--max-seq-len", 64, "--kv-block-size", 8)
    result = trtx("build", f"random:{folder / 'config.json'}", folder / "engine", "--gpu", "cpu", *limits)
    assert result.exit_code == 0, result.output
    return folder / "engine"


def test_the_report_counts_what_was_asked_for(engine):
    result = trtx("bench", engine, *SMALL, "--concurrency", 2, "--json", "--save-requests")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    metrics = report["metrics"]
    assert (metrics["completed"], metrics["input_tokens"], metrics["output_tokens"]) == (6, 48, 24)
    assert metrics["itl_ms"]["count"] == 6 * 3
    assert metrics["reused_tokens"] == 0
    assert metrics["decode"]["ceiling_source"] == "measured on this machine"
    assert report["engine"]["random_weights"] is True
    assert all(len(request["token_times_ms"]) == 4 for request in report["requests"])


def test_the_table_says_that_weights_are_random(engine):
    result = trtx("bench", engine, *SMALL, "--request-rate", 200)
    assert result.exit_code == 0, result.output
    assert "random weights" in result.stdout and "(Poisson)" in result.stdout and "TPOT" in result.stdout


def test_files_are_written_and_compared(engine, tmp_path):
    old, plot = tmp_path / "old.json", tmp_path / "plot.html"
    assert trtx("bench", engine, *SMALL, "--output", old, "--plot", plot).exit_code == 0
    assert Report.read(old).metrics.completed == 6
    assert "<svg" in plot.read_text(encoding="utf-8")
    result = trtx("bench", engine, *SMALL, "--compare", old, "--json")
    assert result.exit_code == 0, result.output
    ratios = {ratio["name"]: ratio for ratio in json.loads(result.stdout)["comparison"]["ratios"]}
    assert ratios["TTFT mean"]["low"] <= ratios["TTFT mean"]["ratio"] <= ratios["TTFT mean"]["high"]
    other = ("bench", engine, "--isl", 8, "--osl", 4, "--num-requests", 5, "--compare", old)
    assert trtx(*other).exit_code == ExitCode.INPUT
    assert trtx(*other, "--compare-anyway").exit_code == 0


def test_a_profile_says_what_steps_of_each_phase_do(engine, tmp_path):
    """Four requests decode together, all prefilled in one step; nothing is left behind of them."""
    path = tmp_path / "profile.html"
    asked = ("--isl", 8, "--osl", 20, "--num-requests", 4, "--profile", path)
    result = trtx("bench", engine, *asked, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["metrics"]["prefill"]["tokens"] == 4 * 8 and report["metrics"]["decode"]["tokens"] == 4 * 19
    assert report["profile"]["of"] == "operators"
    prefill, decode = report["profile"]["phases"]
    assert (prefill["phase"], prefill["steps"], prefill["tokens"]) == ("prefill", 1, 32)
    assert (decode["phase"], decode["steps"], decode["tokens"]) == ("decode", 16, 4)
    for phase in (prefill, decode):
        assert sum(row["percent"] for row in phase["rows"]) == pytest.approx(100)
        assert sum(row["ms"] for row in phase["rows"]) == pytest.approx(phase["ms"])
        rows = {row["kernel"]: row for row in phase["rows"]}
        assert rows["mm"]["calls"] == 2 * 4 + 1, "qkv, o, gate and up, down in two layers, and the head"
        assert all(row["bytes"] is None and row["bandwidth_percent"] is None for row in phase["rows"])
    page = path.read_text(encoding="utf-8")
    assert "<svg" in page and "profile of decode" in page
    assert "% of the bandwidth" not in page, "nothing is known of bytes"


def test_a_profile_of_long_prompts_has_mixed_steps(tmp_path):
    """Prompts are prefilled in two steps; the second one also decodes."""
    folder = tmp_path / "config.json"
    folder.write_text(json.dumps(CONFIG))
    limits = ("--max-batch-size", 4, "--max-seq-len", 64, "--kv-block-size", 8, "--max-num-tokens", 32)
    assert trtx("build", f"random:{folder}", tmp_path / "engine", "--gpu", "cpu", *limits).exit_code == 0
    asked = ("--isl", 24, "--osl", 8, "--num-requests", 2, "--profile", tmp_path / "profile.png", "--json")
    report = json.loads(trtx("bench", tmp_path / "engine", *asked).stdout)
    assert report["metrics"]["mixed"]["steps"] == 1
    assert [phase["phase"] for phase in report["profile"]["phases"]] == ["prefill", "mixed", "decode"]


def test_a_dataset_is_served(engine, tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [{"task_id": i, "input_ids": [i, 2, 3], "output_tokens": 2 + i} for i in range(3)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    result = trtx("bench", engine, "--dataset", path, "--json")
    assert result.exit_code == 0, result.output
    requests = json.loads(result.stdout)["requests"]
    assert {r["id"]: (r["input_tokens"], r["output_tokens"]) for r in requests} == {
        "0": (3, 2),
        "1": (3, 3),
        "2": (3, 4),
    }


def test_a_shared_prefix_is_reused_unless_reuse_is_off(engine):
    shared = ("--isl", 24, "--osl", 2, "--num-requests", 6, "--shared-prefix", 16, "--json")
    assert json.loads(trtx("bench", engine, *shared).stdout)["metrics"]["reused_tokens"] == 6 * 16
    off = trtx("bench", engine, *shared, "--no-prefix-reuse")
    assert json.loads(off.stdout)["metrics"]["reused_tokens"] == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--isl", "64", "--osl", "1"), ExitCode.INPUT),
        (("--isl", "many"), ExitCode.USAGE),
        (("--isl", "4:8", "--isl-stdev", "2"), ExitCode.USAGE),
        (("--request-rate", "0"), ExitCode.USAGE),
        (("--dataset", "nowhere.jsonl"), ExitCode.INPUT),
        (("--dataset", "nowhere.jsonl", "--isl", "8"), ExitCode.USAGE),
        (("--plot", "plot.bmp"), ExitCode.OUTPUT),
        (("--profile", "profile.bmp"), ExitCode.OUTPUT),
        (("--output", "/dev/null/report.json"), ExitCode.OUTPUT),
        (("--output", "."), ExitCode.OUTPUT),
        (("--compare", "nowhere.json"), ExitCode.INPUT),
    ],
)
def test_what_can_not_be_measured_is_refused(engine, arguments, code):
    result = trtx("bench", engine, *arguments)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
