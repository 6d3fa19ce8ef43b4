"""Random prompts, and datasets with good and bad lines."""

import json

import numpy as np
import pytest

from trtx.converters.errors import InputError, UnsupportedError
from trtx.runtime.bench.workload import Lengths, RandomPrompts, check_fits, read_dataset, warmup_requests

VOCAB = 1000


def encode(text):
    return [ord(letter) for letter in text]


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "data.jsonl"

    def write(*lines):
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
        return path

    return write


def test_lengths_are_read_from_text():
    assert Lengths.parse("128") == Lengths(128, 128)
    assert Lengths.parse("16:64") == Lengths(16, 64)
    assert Lengths.parse("128", 10.0) == Lengths(128, 128, 10.0)


@pytest.mark.parametrize("text", ["", "0", "8:4", "-3", "1.5", "1:2:3", "a lot"])
def test_other_text_is_no_length(text):
    with pytest.raises(ValueError, match="length"):
        Lengths.parse(text)


def test_a_range_has_no_standard_deviation():
    with pytest.raises(ValueError, match="range"):
        Lengths.parse("16:64", 3.0)


def test_uniform_lengths_include_both_ends():
    drawn = Lengths(3, 6).draw(1000, np.random.default_rng(0))
    assert set(drawn) == {3, 4, 5, 6}


def test_normal_lengths_keep_their_mean_however_wide():
    drawn = Lengths(100, 100, 80.0).draw(20_000, np.random.default_rng(0))
    assert np.mean(drawn) == pytest.approx(100, rel=0.01)
    assert min(drawn) == 1 and max(drawn) == 199
    narrow = Lengths(100, 100, 5.0).draw(20_000, np.random.default_rng(0))
    assert np.std(narrow) == pytest.approx(5, rel=0.02)


def test_random_prompts_are_unique_and_those_of_the_seed():
    prompts = RandomPrompts(Lengths(16, 32), Lengths(4, 8))
    requests = prompts.requests(200, VOCAB, seed=1)
    assert len({request.prompt for request in requests}) == 200
    assert all(0 <= token < VOCAB for request in requests for token in request.prompt)
    assert requests == prompts.requests(200, VOCAB, seed=1)
    assert requests != prompts.requests(200, VOCAB, seed=2)
    assert all(r.params.ignore_eos and r.params.greedy and 4 <= r.params.max_tokens <= 8 for r in requests)


def test_a_shared_prefix_is_shared_and_no_more():
    requests = RandomPrompts(Lengths(32, 32), Lengths(4, 4), shared_prefix=24).requests(50, VOCAB, seed=1)
    assert {len(request.prompt) for request in requests} == {32}
    assert len({request.prompt[:24] for request in requests}) == 1
    assert len({request.prompt[24:] for request in requests}) == 50


def test_a_prefix_as_long_as_the_prompt_is_refused():
    with pytest.raises(InputError, match="shared prefix of 8"):
        RandomPrompts(Lengths(8, 8), Lengths(4, 4), shared_prefix=8).requests(2, VOCAB, seed=1)


def test_warmup_prompts_are_as_long_and_not_the_same():
    requests = RandomPrompts(Lengths(8, 32), Lengths(4, 8), shared_prefix=5).requests(3, VOCAB, seed=1)
    warmup = warmup_requests(requests, 4, 5, VOCAB, seed=1)
    like = [*requests, requests[0]]
    assert [len(r.prompt) for r in warmup] == [len(r.prompt) for r in like]
    assert [r.params for r in warmup] == [r.params for r in like]
    assert {r.prompt[:5] for r in warmup} == {requests[0].prompt[:5]}
    assert not {r.prompt for r in warmup} & {r.prompt for r in requests}


def test_trtllm_bench_lines_are_read(dataset):
    path = dataset(
        {"task_id": 0, "prompt": "ab", "output_tokens": 5},
        b"",
        {"task_id": "x", "input_ids": [5, 6, 7], "output_tokens": 6},
        {"logits": [8], "output_tokens": 7},
        {"prompt": "c", "max_tokens": 8, "category": "letters"},
    )
    requests = read_dataset(path, encode, VOCAB)
    assert [(r.id, r.prompt, r.params.max_tokens) for r in requests] == [
        ("0", (97, 98), 5),
        ("x", (5, 6, 7), 6),
        ("4", (8,), 7),
        ("5", (99,), 8),
    ]


def test_a_limit_takes_the_first_and_may_not_exceed_the_file(dataset):
    path = dataset(*({"prompt": "ab", "max_tokens": 5} for _ in range(3)))
    assert len(read_dataset(path, encode, VOCAB, limit=2)) == 2
    with pytest.raises(InputError, match="3 requests, and 4 are asked for"):
        read_dataset(path, encode, VOCAB, limit=4)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"prompt": "caf\xe9", "max_tokens": 3}', "not UTF-8"),
        (b'{"prompt": "x", ', "not JSON"),
        (b'["x"]', "not an object"),
        (b'{"max_tokens": 3}', "neither prompt nor input_ids"),
        (b'{"prompt": "x", "input_ids": [1], "max_tokens": 3}', "prompt and input_ids"),
        (b'{"prompt": 5, "max_tokens": 3}', "no text"),
        (b'{"prompt": "", "max_tokens": 3}', "empty"),
        (b'{"input_ids": [], "max_tokens": 3}', "empty"),
        (b'{"input_ids": [1000], "max_tokens": 3}', "token ids below 1000"),
        (b'{"input_ids": [-1], "max_tokens": 3}', "token ids"),
        (b'{"input_ids": [true], "max_tokens": 3}', "token ids"),
        (b'{"input_ids": "1 2", "max_tokens": 3}', "token ids"),
        (b'{"prompt": "x"}', "output_tokens is missing"),
        (b'{"prompt": "x", "output_tokens": 0}', "output_tokens is 0"),
        (b'{"prompt": "x", "output_tokens": "5"}', "output_tokens is '5'"),
        (b'{"prompt": "x", "output_tokens": 5, "task_id": 1}', "occurs twice"),
    ],
)
def test_a_bad_line_is_named(dataset, line, cause):
    path = dataset({"task_id": 1, "prompt": "ab", "output_tokens": 5}, b"", line)
    with pytest.raises(InputError, match=cause) as raised:
        read_dataset(path, encode, VOCAB)
    assert raised.value.cause.startswith(f"{path}:3:")
    assert raised.value.remedy


def test_images_and_adapters_are_refused(dataset):
    with pytest.raises(UnsupportedError, match="media_paths"):
        read_dataset(dataset({"prompt": "x", "media_paths": ["cat.png"], "output_tokens": 5}), encode, VOCAB)


def test_a_missing_and_an_empty_file_are_named(dataset, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        read_dataset(tmp_path / "nowhere.jsonl", encode, VOCAB)
    with pytest.raises(InputError, match="no requests"):
        read_dataset(dataset(b"", b" "), encode, VOCAB)


def test_requests_that_do_not_fit_are_refused_before_anything_runs():
    requests = RandomPrompts(Lengths(100, 100), Lengths(28, 28)).requests(2, VOCAB, seed=0)
    check_fits(requests, 128)
    with pytest.raises(InputError, match="100 input \\+ 28 output = 128") as raised:
        check_fits(requests, 127)
    assert "--max-seq-len 128" in raised.value.remedy
