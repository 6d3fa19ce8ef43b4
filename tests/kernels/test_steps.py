"""Steps of the cuda backend: an executor over them, padding, and what is sent to the device."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.builder.models import TINY, spec_of
from tests.converters import tiny
from tests.converters.tiny import VARIANTS, checkpoint_of
from tests.kernels.checks import poisoned as poisoned
from tests.runtime.models import assert_greedy
from trtx.builder.engine import Limits
from trtx.converters.checkpoint import Checkpoint
from trtx.runtime.batch import PENDING, SequenceSlice
from trtx.runtime.cuda.kv_cache import CudaKVCache
from trtx.runtime.cuda.launch import Launch
from trtx.runtime.cuda.ops import CudaOps
from trtx.runtime.cuda.step import DECODE_FIELDS, BlockTables, Shape, resolve
from trtx.runtime.cuda.steps import CHUNKS, Steps, Ticket, _fits, batch_sizes
from trtx.runtime.executor import Executor
from trtx.runtime.kv_layout import KVLayout
from trtx.runtime.request import Request
from trtx.runtime.runner import Runner
from trtx.runtime.sampler import Row, Sampled
from trtx.runtime.sampling import SamplingParams
from trtx.runtime.weights import WeightStore, load

CPU = torch.device("cpu")


class StepsRunner(Runner):
    """`CudaRunner` on any device, without an engine and without graphs.

    Attributes:
        several: how many steps each launch was.
        kinds: of the shapes that were launched.
    """

    overlaps = True

    def __init__(self, checkpoint: Checkpoint, limits: Limits, launch: Launch, device: torch.device) -> None:
        spec = checkpoint.spec
        self.notes = []
        self.several: list[int] = []
        self.kinds: set[str] = set()
        self.layout = KVLayout.of(spec, limits.kv_block_size, 4)
        ops = CudaOps(spec, torch.float32, device, limits.max_seq_len, launch, laid_out=False)
        sizes = limits.max_batch_size, limits.max_num_tokens, limits.max_seq_len
        with torch.inference_mode():
            cache = CudaKVCache(self.layout, limits.kv_blocks, torch.float32, device)
            self.steps = Steps(load(WeightStore.of_checkpoint(checkpoint), ops), ops, cache, *sizes)

    @torch.inference_mode()
    def launch(self, batch: Sequence[SequenceSlice], rows: Sequence[Row], steps: int = 1) -> Ticket:
        self.several.append(steps)
        self.kinds.add(self.steps._shape(batch)[0])
        return self.steps.launch(batch, rows, steps)

    def collect(self, ticket: Ticket) -> list[list[Sampled]]:
        return self.steps.collect(ticket)


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama of two layers."""
    variant = VARIANTS["llama"]
    return tiny.randomize(tiny.of(replace(variant, settings={**variant.settings, "num_hidden_layers": 2})), 0, 1.5)


@pytest.fixture(scope="module")
def checkpoint(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(checkpoint_of(model, tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("burst", [1, 4])
def test_tokens_are_transformers(model, checkpoint, launch, device, burst):
    """Prompts in chunks beside decodes, padded prefills, too few blocks, steps that overlap, or several at once."""
    limits = Limits(
        max_batch_size=3, max_num_tokens=16, max_seq_len=32, kv_block_size=8, kv_blocks=1 + 4, kv_dtype="fp32"
    )
    runner = StepsRunner(checkpoint, limits, launch, device)
    executor = Executor(runner, limits, checkpoint.spec.vocab_size)
    executor.burst = burst
    rng = random.Random(0)
    prompts = {str(n): tuple(rng.randrange(80) for _ in range(length)) for n, length in enumerate((17, 4, 5))}
    output: dict[str, list[int]] = {name: [] for name in prompts}
    params = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
    for name, prompt in prompts.items():
        executor.add(Request(name, prompt, params))
    while executor.has_work:
        for event in executor.step():
            assert event.token is not None
            output[event.request].append(event.token)
    for name, prompt in prompts.items():
        assert len(output[name]) == 7
        assert_greedy(model, prompt, output[name])
    assert executor.blocks.pool.used == 0
    assert executor.stats.preemptions, "the pool never ran dry: the test is too easy"
    assert (max(runner.several) > 1) == (burst > 1) and runner.kinds == {"decodes", "chunks", "mixed"}


def test_batch_sizes_are_dense_where_they_are_small_and_never_far_apart():
    for most in (1, 3, 4, 5, 64, 100, 256):
        sizes = batch_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most and sizes[: min(most, 4)] == [1, 2, 3, 4][:most]
        assert all(later - sooner <= max(4, sooner / 4) for sooner, later in pairwise(sizes))


def test_a_step_is_padded_to_the_smallest_shape_that_takes_it(checkpoint, launch, device):
    limits = Limits(max_batch_size=8, max_num_tokens=64, max_seq_len=64, kv_block_size=8, kv_blocks=99, kv_dtype="fp32")
    steps = StepsRunner(checkpoint, limits, launch, device).steps

    def shape(*pieces: tuple[int, int]) -> tuple[str, Shape]:
        """Of sequences with so many tokens, and so many that want logits."""
        return steps._shape([SequenceSlice([1] * tokens, 0, ([1],), logits) for tokens, logits in pieces])

    assert shape((1, 1), (1, 1)) == ("decodes", Shape.of_decodes(2))
    assert shape(*[(1, 1)] * 5) == ("decodes", Shape.of_decodes(8))
    kind, found = shape((9, 1))
    assert kind == "chunks" and (found.tokens, found.sequences, found.rows, found.decodes) == (16, 1, 1, 0)
    kind, found = shape((9, 1), (8, 0))
    assert kind == "chunks" and (found.tokens, found.sequences, found.rows) == (32, 8, 8)
    assert shape((1, 1), (8, 1))[0] == "mixed", "a decode beside a prefill has a shape of its own"
    assert shape((1, 0))[0] == "mixed", "nothing wants logits of it"
    for lengths in ([16], [15, 1 + 15], [5] * 8, [2] * 8, [64]):
        exact = steps._makers["mixed"].shape_of([SequenceSlice([1] * n, 0, ([1],), 1) for n in lengths])
        kind, found = shape(*[(n, 1) for n in lengths])
        assert kind == "chunks" and found.tokens in CHUNKS
        assert found.tiles >= exact.tiles and found.sequences >= exact.sequences and found.rows >= exact.rows


def test_what_fits():
    chunk = Shape(32, 4, 4, 8, 0)
    assert _fits(Shape(32, 4, 4, 7, 0), chunk) and _fits(Shape(9, 1, 0, 2, 0), chunk)
    assert not _fits(Shape(33, 4, 4, 8, 0), chunk), "too many tokens"
    assert not _fits(Shape(20, 5, 5, 8, 0), chunk), "too many sequences"
    assert not _fits(Shape(20, 3, 3, 5, 1), chunk), "decodes are launched otherwise"
    assert not _fits(Shape(20, 1, 20, 5, 0), chunk), "too many rows"
    assert not _fits(Shape.of_decodes(3), chunk) and not _fits(chunk, Shape.of_decodes(64))
    assert _fits(Shape.of_decodes(3), Shape.of_decodes(4))


# Numbers that stand on the device.

VOCABULARY = 97


def hashed(tokens: Sequence[int]) -> int:
    """What follows tokens: a number that each of them decides, with its place."""
    state = 0
    for place, token in enumerate(tokens):
        state = (state * 31 + token * 7 + place) % VOCABULARY
    return state


class HashingRunner(Runner):
    """Steps of a model that gives `hashed` of what its KV cache holds: tokens, found through the block tables.

    Attributes:
        sent: how many steps of single tokens were sent to the device, of so many `decodes`.
    """

    overlaps = True

    def __init__(self, limits: Limits, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
        spec = spec_of({**TINY, "vocab_size": VOCABULARY})
        self.notes, self.layout = [], KVLayout.of(spec, limits.kv_block_size, 4)
        self.sent = self.decodes = 0
        self.launcher, self._cached = launch, {}
        ops = SimpleNamespace(device=CPU, dtype=torch.float32, launch=launch)
        decoder, cache = SimpleNamespace(spec=spec), SimpleNamespace(layout=self.layout)
        sizes = limits.max_batch_size, limits.max_num_tokens, limits.max_seq_len
        self.steps = Steps(decoder, ops, cache, *sizes)
        maker, inputs = self.steps._makers["decodes"], self.steps._inputs["decodes"]
        send, fill_decodes = inputs.fill, maker.fill_decodes

        def counted(values: Any) -> None:
            self.sent += 1
            send(values)

        def checked(batch: Sequence[SequenceSlice], count: int) -> None:
            self.decodes += 1
            fill_decodes(batch, count)
            standing = np.stack([inputs.field(name, count).numpy() for name in DECODE_FIELDS])
            assert np.array_equal(standing, maker._standing)

        monkeypatch.setattr(inputs, "fill", counted)
        monkeypatch.setattr(maker, "fill_decodes", checked)
        monkeypatch.setattr(self.steps, "compute", self.compute)
        monkeypatch.setattr(self.steps, "choose", self.choose)

    def compute(self, kind: str, shape: Shape) -> torch.Tensor:
        steps, size = self.steps, self.layout.block_size
        step = steps._makers[kind].step(shape, steps._ids)
        resolve(self.launcher, steps._inputs[kind], shape.tokens, steps._chosen[0], steps._ids)
        table, lengths = step.attention.tables[0], step.attention.lengths
        positions, owners = step.positions.tolist(), step.attention.sequence.tolist()
        for token, position, owner in zip(step.token_ids.tolist(), positions, owners, strict=True):
            if owner >= 0:
                self._cached[int(table[owner, position // size]), position % size] = token
        wanted = range(shape.tokens) if step.rows is None else step.rows.tolist()
        logits = torch.zeros(len(wanted), VOCABULARY)
        for row, place in enumerate(wanted):
            owner, end = owners[place], positions[place] + 1
            if owner >= 0:
                assert int(lengths[owner]) >= end
                logits[row, hashed([self._cached[int(table[owner, p // size]), p % size] for p in range(end)])] = 1
        steps._chosen[0, : len(wanted)] = logits.argmax(1)
        steps._chosen[1] = 1
        return logits

    def choose(self, logits: torch.Tensor, rows: Sequence[Row]) -> None:
        """The token after the likeliest, where a row is drawn."""
        for place, row in enumerate(rows):
            if not row.params.greedy:
                self.steps._chosen[0, place] = (int(logits[place].argmax()) + 1) % VOCABULARY

    def launch(self, batch: Sequence[SequenceSlice], rows: Sequence[Row], steps: int = 1) -> Ticket:
        return self.steps.launch(batch, rows, steps)

    def collect(self, ticket: Ticket) -> list[list[Sampled]]:
        return self.steps.collect(ticket)


def continued(prompt: Sequence[int], params: SamplingParams) -> list[int]:
    tokens = list(prompt)
    for _ in range(params.max_tokens or 0):
        tokens.append((hashed(tokens) + (not params.greedy)) % VOCABULARY)
        if tokens[-1] in params.stop_token_ids:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_of_steps(seed, launch, device, monkeypatch):
    """Requests come, stop inside bursts, are cancelled and preempted; drawn rows beside greedy ones."""
    if device.type != "cpu":
        pytest.skip("the model is of the CPU")
    rng = random.Random(seed)
    batch = rng.choice([1, 2, 3, 5, 6])
    limits = Limits(
        max_batch_size=batch, max_num_tokens=max(batch, rng.choice([6, 16, 24])), max_seq_len=48, kv_block_size=8,
        kv_blocks=1 + rng.choice([6, 8, 20]), kv_dtype="fp32",
    )  # fmt: skip
    runner = HashingRunner(limits, launch, monkeypatch)
    executor = Executor(runner, limits, VOCABULARY, prefix_reuse=rng.random() < 0.5)
    executor.burst = (1, 4, 8)[seed % 3]
    wanted: dict[str, list[int]] = {}
    output: dict[str, list[int]] = {}
    cancelled = set()
    while len(wanted) < 10 or executor.has_work:
        if len(wanted) < 10 and rng.random() < 0.25:
            stops = tuple(rng.randrange(VOCABULARY) for _ in range(rng.choice([0, 6])))
            params = SamplingParams(
                temperature=rng.choice([0, 0, 1]), max_tokens=rng.randint(1, 20), stop_token_ids=stops
            )
            prompt, name = tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 20))), str(len(wanted))
            executor.add(Request(name, prompt, params))
            wanted[name], output[name] = continued(prompt, params), []
        if wanted and rng.random() < 0.04:
            name = rng.choice(sorted(wanted))
            cancelled.add(name)
            executor.cancel(name)
        for event in executor.step() if executor.has_work else []:
            if event.token is not None:
                output[event.request].append(event.token)
    for name, tokens in wanted.items():
        assert output[name] == tokens[: len(output[name])]
        assert len(output[name]) == len(tokens) or name in cancelled
    assert 0 < runner.sent < runner.decodes


# What is sent.


def tables_of(*rows: list[list[int]]) -> list[SequenceSlice]:
    return [SequenceSlice([1], 0, tuple(row), 1) for row in rows]


def assert_sent(tables: BlockTables, rows: Sequence[list[list[int]]]) -> None:
    for group, device in enumerate(tables.device):
        for number, row in enumerate(rows):
            assert device[number, : len(row[group])].tolist() == row[group]


def test_block_tables_follow_their_sequences():
    """A table that grows, another sequence in its row, and one that was preempted and comes back with other blocks."""
    tables = BlockTables(3, 2, 6, CPU)
    first, second = [[1, 2], [3, 4]], [[5], [6]]
    for change in [lambda: None, lambda: None, lambda: [table.append(9 + n) for n, table in enumerate(first)]]:
        change()
        tables.fill(tables_of(first, second))
        assert_sent(tables, [first, second])
    tables.fill(tables_of(second))
    assert_sent(tables, [second])
    third = [[7, 8, 9], [10, 11, 12]]
    tables.fill(tables_of(third, first, second))
    assert_sent(tables, [third, first, second])
    again = [[12, 13, 14], [15, 16, 17]]  # as long as it was
    tables.fill(tables_of(again, first, second))
    assert_sent(tables, [again, first, second])


def test_block_tables_are_sent_only_when_they_change(monkeypatch):
    tables = BlockTables(3, 1, 6, CPU)
    sent = []
    monkeypatch.setattr(tables._mailboxes[0], "send", sent.append)
    row = [[1, 2]]
    for _ in range(3):
        tables.fill(tables_of(row))
    assert sent == [1]
    row[0].append(3)
    tables.fill(tables_of(row))
    assert sent == [1, 1]


def test_blocks_that_left_the_window_may_stay_as_they_were():
    """Nobody reads them; what is behind them has to arrive."""
    tables = BlockTables(1, 1, 6, CPU)
    row = [[1, 2, 3]]
    tables.fill(tables_of(row))
    row[0][0] = 0
    row[0] += [4]
    tables.fill(tables_of(row))
    assert tables.device[0][0, 1:4].tolist() == [2, 3, 4]


def test_random_histories_of_block_tables():
    """Sequences come, grow, leave and come back in any order, as a scheduler lets them."""
    rng = random.Random(0)
    tables, running, number = BlockTables(4, 2, 8, CPU), [], iter(range(1, 10_000))
    for _ in range(300):
        if running and rng.random() < 0.2:
            running.remove(rng.choice(running))
        if len(running) < 4 and rng.random() < 0.4:
            length = rng.randrange(1, 6)
            running.insert(rng.randrange(len(running) + 1), [[next(number) for _ in range(length)] for _ in range(2)])
        for row in running:
            if len(row[0]) < 8 and rng.random() < 0.3:
                for table in row:
                    table.append(next(number))
        tables.fill(tables_of(*running))
        assert_sent(tables, running)


@torch.inference_mode()
def test_numbers_of_decodes_and_of_the_steps_after(checkpoint, launch, device, monkeypatch):
    """Padded to three; the second step takes the tokens that the first has chosen, one position further."""
    limits = Limits(max_batch_size=4, max_num_tokens=8, max_seq_len=64, kv_block_size=8, kv_blocks=99, kv_dtype="fp32")
    steps = StepsRunner(checkpoint, limits, launch, device).steps
    maker, inputs = steps._makers["decodes"], steps._inputs["decodes"]
    sends = []
    send = inputs.fill
    monkeypatch.setattr(inputs, "fill", lambda values: [sends.append(len(values)), send(values)])

    def standing() -> list[list[int]]:
        return [inputs.field(name, 3).tolist() for name in DECODE_FIELDS]

    maker.fill_decodes([SequenceSlice([42], 7, ([1],), 1), SequenceSlice([PENDING], 9, ([2, 3],), 1, source=5)], 3)
    assert standing() == [[42, PENDING, 0], [0, 5, 0], [7, 9, 0], [8, 10, 0], [0, 1, -1]]
    steps._chosen[:, :2] = torch.tensor([[11, 12], [1, 0]])
    host = steps.publish("decodes", 2)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert host.tolist() == [[11, 12], [1, 0]]
    after = [[PENDING, PENDING, 0], [0, 1, 0], [8, 10, 0], [9, 11, 0], [0, 1, -1]]
    assert standing() == after and len(sends) == 1
    same = [SequenceSlice([PENDING], place, ([1],), 1, source=row) for row, place in enumerate((8, 10))]
    maker.fill_decodes(same, 3)
    assert standing() == after and len(sends) == 1, "what stands there is not sent"
    for other in (same[:1], same[::-1], [same[0], replace(same[1], tokens=[13])], [same[0], replace(same[1], start=9)]):
        maker.fill_decodes(other, 3)
        maker.fill_decodes(same, 3)
        assert standing() == after
    assert len(sends) == 1 + 2 * 4


@torch.inference_mode()
def test_numbers_of_a_padded_prefill(checkpoint, launch):
    limits = Limits(max_batch_size=4, max_num_tokens=16, max_seq_len=64, kv_block_size=8, kv_blocks=99, kv_dtype="fp32")
    steps = StepsRunner(checkpoint, limits, launch, CPU).steps
    batch = [SequenceSlice([11, 12, 13], 4, ([1],), 0), SequenceSlice([14, 15], 0, ([2],), 1)]
    kind, shape = steps._shape(batch)
    assert (kind, shape.tokens, shape.sequences) == ("chunks", 16, 4)
    steps._makers[kind].fill(batch, shape)
    inputs = steps._inputs[kind]
    expected = {
        "ids": [11, 12, 13, 14, 15] + [0] * 11,
        "positions": [4, 5, 6, 0, 1] + [0] * 11,
        "lengths": [7, 2, 0, 0],
        "sequence": [0, 0, 0, 1, 1] + [-1] * 11,
        "rows": [4, 0, 0, 0],
    }
    for name, values in expected.items():
        assert inputs.field(name, len(values)).tolist() == values, name
    starts = inputs.field("starts", 5).tolist()
    assert starts[:3] == [0, 3, 5]
    tiles = np.array(inputs.field("tiles", 2 * shape.tiles)).reshape(-1, 2)
    assert {int(sequence) for sequence, _ in tiles} == {0, 1, -1}
