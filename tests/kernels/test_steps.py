"""Steps of the cuda backend: an executor over them, padding, what is sent to the device, when graphs are captured."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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
from trtx.runtime.cuda import steps as module
from trtx.runtime.cuda.attention import AttentionStep
from trtx.runtime.cuda.kv_cache import CudaKVCache
from trtx.runtime.cuda.launch import Launch
from trtx.runtime.cuda.ops import CudaOps
from trtx.runtime.cuda.shapes import CHUNKS, MIXED, PROMPTS, Shapes, batch_sizes, fits
from trtx.runtime.cuda.step import DECODE_FIELDS, BlockTables, Shape, resolve
from trtx.runtime.cuda.steps import Steps, Ticket
from trtx.runtime.executor import Executor
from trtx.runtime.kv_layout import KVLayout
from trtx.runtime.request import Request
from trtx.runtime.runner import Runner
from trtx.runtime.sampler import Row, Sampled
from trtx.runtime.sampling import SamplingParams
from trtx.runtime.weights import WeightStore, load

CPU = torch.device("cpu")


class Recorded:
    """`Graphs` that computes again what it was given.

    Attributes:
        captured: how often each shape was.
        replayed: likewise.
    """

    def __init__(self) -> None:
        self.captured: Counter[Shape] = Counter()
        self.replayed: Counter[Shape] = Counter()

    def capture(self, compute: partial[torch.Tensor]) -> Callable[[], torch.Tensor]:
        shape = compute.args[-1]
        self.captured[shape] += 1

        def replay() -> torch.Tensor:
            self.replayed[shape] += 1
            return compute()

        return replay

    def check(self, steps: Steps) -> None:
        """Mixed steps alone were captured, once each."""
        assert self.captured.keys() <= set(steps.shapes.mixed) and set(self.captured.values()) <= {1}


class StepsRunner(Runner):
    """`CudaRunner` on any device, without an engine; no step is a graph unless they are captured.

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
        self.kinds.add(padded(self.steps, batch)[0])
        return self.steps.launch(batch, rows, steps)

    def collect(self, ticket: Ticket) -> list[list[Sampled]]:
        return self.steps.collect(ticket)


def padded(steps: Steps, batch: Sequence[SequenceSlice]) -> tuple[str, Shape]:
    """What a step is run as."""
    return steps.shapes.padded(steps._makers["mixed"].shape_of(batch))


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


def test_tokens_of_requests_that_come_at_any_time(model, checkpoint, launch, device):
    """Mixed steps are captured when their shape first comes, and then replayed."""
    limits = Limits(
        max_batch_size=4, max_num_tokens=32, max_seq_len=32, kv_block_size=8, kv_blocks=1 + 8, kv_dtype="fp32"
    )
    runner, graphs = StepsRunner(checkpoint, limits, launch, device), Recorded()
    runner.steps._graphs = graphs  # nothing is captured before
    executor = Executor(runner, limits, checkpoint.spec.vocab_size)
    rng = random.Random(0)
    waiting = [
        Request(
            str(number),
            tuple(rng.randrange(80) for _ in range(rng.randrange(1, 20))),
            SamplingParams(
                temperature=0, max_tokens=rng.randrange(1, 9), ignore_eos=True, logprobs=rng.choice([None, 2])
            ),
        )
        for number in range(6)
    ]
    asked = {request.id: request for request in waiting}
    output: dict[str, list[int]] = {name: [] for name in asked}
    likely: dict[str, list[list[int]]] = {name: [] for name in asked}
    while executor.has_work or waiting:
        while waiting and rng.random() < 0.5:
            executor.add(waiting.pop())
        for event in executor.step():
            output[event.request].append(event.token)
            likely[event.request].append([one.token for one in event.top_logprobs])
    for name, request in asked.items():
        assert len(output[name]) == request.params.max_tokens
        assert_greedy(model, request.prompt, output[name])
        if request.params.logprobs:
            assert all(token in found for token, found in zip(output[name], likely[name], strict=True))
    assert executor.blocks.pool.used == 0
    graphs.check(runner.steps)
    assert graphs.replayed


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
        return padded(steps, [SequenceSlice([1] * tokens, 0, ([1],), logits) for tokens, logits in pieces])

    assert shape((1, 1), (1, 1)) == ("decodes", Shape.of_decodes(2))
    assert shape(*[(1, 1)] * 5) == ("decodes", Shape.of_decodes(8))
    kind, found = shape((9, 1))
    assert kind == "chunks" and (found.tokens, found.sequences, found.rows, found.decodes) == (16, 1, 1, 0)
    kind, found = shape((9, 1), (8, 0))
    assert kind == "chunks" and (found.tokens, found.sequences, found.rows) == (32, 8, 8)
    assert shape((1, 1), (8, 1)) == ("mixed", Shape(16, 16, 8, 16 // steps._makers["mixed"].tile + 8, 8))
    assert shape((1, 0)) == ("decodes", Shape.of_decodes(1)), "its logits are computed for nobody"
    for lengths in ([16], [15, 1 + 15], [5] * 8, [2] * 8, [64]):
        exact = steps._makers["mixed"].shape_of([SequenceSlice([1] * n, 0, ([1],), 1) for n in lengths])
        kind, found = shape(*[(n, 1) for n in lengths])
        assert kind == "chunks" and found.tokens in CHUNKS
        assert found.tiles >= exact.tiles and found.sequences >= exact.sequences and found.rows >= exact.rows


def test_what_fits():
    chunk = Shape(32, 4, 4, 8, 0)
    assert fits(Shape(32, 4, 4, 7, 0), chunk) and fits(Shape(9, 1, 0, 2, 0), chunk)
    assert not fits(Shape(33, 4, 4, 8, 0), chunk), "too many tokens"
    assert not fits(Shape(20, 5, 5, 8, 0), chunk), "too many sequences"
    assert not fits(Shape(20, 3, 5, 5, 0), chunk), "too many rows"
    assert not fits(Shape(20, 3, 3, 5, 1), chunk), "decodes are launched otherwise"
    assert not fits(Shape.of_decodes(3), chunk) and not fits(chunk, Shape.of_decodes(64))
    assert fits(Shape.of_decodes(3), Shape.of_decodes(4))
    mixed = Shape(64, 16 + 8, 16 + 8, 10, 16)
    assert fits(Shape(64, 3 + 8, 3 + 8, 10, 3), mixed) and fits(Shape(40, 16 + 1, 16, 3, 16), mixed)
    assert not fits(Shape(60, 3 + 9, 3 + 9, 10, 3), mixed), "too many prompts, however few decodes"
    assert not fits(Shape(60, 17 + 1, 18, 3, 17), mixed), "too many decodes"


@pytest.mark.parametrize(
    ("batch", "tokens"), [(2, 16), (3, 40), (8, 8), (64, 64), (64, 8192), (256, 512), (1000, 8192)]
)
def test_mixed_steps_are_padded_a_little_or_not_at_all(batch, tokens):
    """Whatever is launched has room for the step; up to 2048 tokens and 8 prompts it is a shape, and not a far one."""
    tile = 32
    shapes = Shapes.of(batch, tokens, tile)
    assert all(shape.decodes <= shape.tokens <= tokens and shape.rows <= shape.tokens for shape in shapes.mixed)
    rng, seen = random.Random(0), 0
    for _ in range(3000):
        prompts, decodes = rng.randrange(1, 1 << rng.randrange(1, 5)), rng.randrange(1, 1 << rng.randrange(1, 10))
        counts = [rng.randrange(2, 1 << rng.randrange(2, 12)) for _ in range(prompts)]
        count = decodes + sum(counts)
        if prompts + decodes > batch or count > tokens:
            continue
        seen += 1
        tiles = sum(-(-it // tile) for it in counts)
        exact = Shape(count, decodes + prompts, decodes + rng.randrange(prompts + 1), tiles, decodes)
        kind, found = shapes.padded(exact)
        assert kind == "mixed" and fits(exact, found) and found.tiles >= tiles
        if prompts > PROMPTS or count > MIXED[-1]:
            assert found == exact
        elif decodes <= 256:
            assert found in shapes.mixed and found.tokens <= max(1.5 * count, 256)
    assert seen > 50


def test_a_shape_that_is_far_is_not_taken():
    shapes = Shapes.of(1024, 8192, 32)
    assert shapes.padded(Shape(560, 551, 551, 1, 550)) == ("mixed", Shape(560, 551, 551, 1, 550))
    _, found = shapes.padded(Shape(900, 551, 551, 11, 550))
    assert (found.tokens, found.decodes) == (1024, 1024)


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
        graphs: of mixed steps.
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
        self.graphs = self.steps._graphs = Recorded()
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
        assert self.attending(step.attention) == {place: owner for place, owner in enumerate(owners) if owner >= 0}
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

    def attending(self, step: AttentionStep) -> dict[int, int]:
        """The tokens that attention's two kernels take care of, with their sequences."""
        found = {number: number for number in range(step.decodes) if step.lengths[number]}
        starts, tile = step.starts.tolist(), self.steps._makers["mixed"].tile
        for number, first in step.tiles.tolist():
            if number >= 0:
                places = range(starts[number] + first, min(starts[number] + first + tile, starts[number + 1]))
                assert number >= step.decodes and not found.keys() & set(places)
                found.update(dict.fromkeys(places, number))
        return found

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


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_histories_of_steps(seed, busy, launch, device, monkeypatch):
    """Requests come, stop inside bursts, are cancelled and preempted; drawn rows beside greedy ones. Mixed steps are
    graphs, of which there may be many, or one."""
    if device.type != "cpu":
        pytest.skip("the model is of the CPU")
    rng = random.Random(seed)
    batch = 12 if busy else rng.choice([1, 2, 3, 5, 6])
    limits = Limits(
        max_batch_size=batch, max_num_tokens=max(batch, rng.choice([6, 16, 24]), 48 * busy), max_seq_len=48,
        kv_block_size=8, kv_blocks=1 + rng.choice([6, 8, 20]) * (1 + 2 * busy), kv_dtype="fp32",
    )  # fmt: skip
    most = (40, 1)[seed % 2]
    monkeypatch.setattr(module, "MOST_MIXED", most)
    runner = HashingRunner(limits, launch, monkeypatch)
    executor = Executor(runner, limits, VOCABULARY, prefix_reuse=rng.random() < 0.5)
    executor.burst = (1, 4, 8)[seed % 3]
    wanted: dict[str, list[int]] = {}
    output: dict[str, list[int]] = {}
    cancelled = set()
    count, rate = (40, 0.7) if busy else (10, 0.25)
    while len(wanted) < count or executor.has_work:
        if len(wanted) < count and rng.random() < rate:
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
    runner.graphs.check(runner.steps)
    assert len(runner.graphs.captured) <= most and (runner.graphs.replayed or batch == 1 or most == 1)


def test_graphs_are_captured_from_the_largest_to_the_smallest(launch, device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("the model is of the CPU")
    limits = Limits(max_batch_size=6, max_num_tokens=40, max_seq_len=48, kv_block_size=8, kv_blocks=9, kv_dtype="fp32")
    runner = HashingRunner(limits, launch, monkeypatch)
    steps, captured = runner.steps, runner.graphs.captured
    steps.capture(runner.graphs)
    assert set(captured) == {*steps.shapes.decodes, *steps.shapes.chunks}
    sizes = [shape.tokens for shape in captured]
    assert sizes == sorted(sizes, reverse=True) and set(captured.values()) == {1} and not runner.graphs.replayed
    assert len(captured) + len(steps.shapes.mixed) == steps.shapes.graphs


# What is sent.


def tables_of(*rows: list[list[int]]) -> list[SequenceSlice]:
    return [SequenceSlice([1], 0, tuple(row), 1) for row in rows]


def fill(tables: BlockTables, batch: Sequence[SequenceSlice]) -> None:
    """Without gaps."""
    tables.fill(batch, range(len(batch)))


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
        fill(tables, tables_of(first, second))
        assert_sent(tables, [first, second])
    fill(tables, tables_of(second))
    assert_sent(tables, [second])
    third = [[7, 8, 9], [10, 11, 12]]
    fill(tables, tables_of(third, first, second))
    assert_sent(tables, [third, first, second])
    again = [[12, 13, 14], [15, 16, 17]]  # as long as it was
    fill(tables, tables_of(again, first, second))
    assert_sent(tables, [again, first, second])


def test_block_tables_are_sent_only_when_they_change(monkeypatch):
    tables = BlockTables(3, 1, 6, CPU)
    sent = []
    monkeypatch.setattr(tables._mailboxes[0], "send", sent.append)
    row = [[1, 2]]
    for _ in range(3):
        fill(tables, tables_of(row))
    assert sent == [1]
    row[0].append(3)
    fill(tables, tables_of(row))
    assert sent == [1, 1]


def test_blocks_that_left_the_window_may_stay_as_they_were():
    """Nobody reads them; what is behind them has to arrive."""
    tables = BlockTables(1, 1, 6, CPU)
    row = [[1, 2, 3]]
    fill(tables, tables_of(row))
    row[0][0] = 0
    row[0] += [4]
    fill(tables, tables_of(row))
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
        fill(tables, tables_of(*running))
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
    kind, shape = padded(steps, batch)
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


@torch.inference_mode()
def test_numbers_of_a_padded_mixed_step(checkpoint, launch):
    """Sequences of prompts follow all decodes, tokens those that there are; rows are in the order of the batch.

    Tiles that see more keys come later.
    """
    limits = Limits(max_batch_size=4, max_num_tokens=16, max_seq_len=64, kv_block_size=8, kv_blocks=99, kv_dtype="fp32")
    steps = StepsRunner(checkpoint, limits, launch, CPU).steps
    batch = [
        SequenceSlice([PENDING], 9, ([1, 2],), 1, source=3),
        SequenceSlice([21], 4, ([3],), 1),
        SequenceSlice([11, 12, 13], 4, ([4],), 0),
        SequenceSlice([14, 15], 0, ([5],), 1),
    ]
    kind, shape = steps._send(batch)
    assert (kind, shape.tokens, shape.sequences, shape.rows, shape.decodes) == ("mixed", 16, 8, 4, 4)
    inputs = steps._inputs[kind]
    expected = {
        "ids": [PENDING, 21, 11, 12, 13, 14, 15] + [0] * 9,
        "sources": [3, 0] + [0] * 14,
        "positions": [9, 4, 4, 5, 6, 0, 1] + [0] * 9,
        "lengths": [10, 5, 0, 0, 7, 2, 0, 0],
        "sequence": [0, 1, 4, 4, 4, 5, 5] + [-1] * 9,
        "rows": [0, 1, 6, 0],
    }
    for name, values in expected.items():
        assert inputs.field(name, len(values)).tolist() == values, name
    assert inputs.field("starts", 9).tolist()[4:7] == [2, 5, 7]
    tiles = np.array(inputs.field("tiles", 2 * shape.tiles)).reshape(-1, 2).tolist()
    assert tiles[:2] == [[5, 0], [4, 0]] and all(sequence == -1 for sequence, _ in tiles[2:])
    (table,) = steps.tables.device
    assert [table[row, 0].item() for row in (0, 1, 4, 5)] == [1, 3, 4, 5] and table[0, 1] == 2


@torch.inference_mode()
def test_steps_leave_the_tokens_of_their_rows_to_the_next(model, checkpoint, launch, device):
    """A mixed step's rows are the decodes' and then the prompts'; a next step names them as its sources."""
    limits = Limits(max_batch_size=4, max_num_tokens=16, max_seq_len=64, kv_block_size=8, kv_blocks=99, kv_dtype="fp32")
    runner = StepsRunner(checkpoint, limits, launch, device)
    greedy = [Row(SamplingParams(temperature=0), [1], 1, 0, 0)] * 3
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    output: list[list[int]] = [[] for _ in prompts]
    ends = [0, 0, 0]
    order: list[int] = []
    for indices in ([0], [0, 1, 2], [2, 0, 1]):  # a prompt, a mixed step, decodes in another order
        batch = []
        for index in indices:
            tokens = [PENDING] if output[index] else prompts[index]
            source = order.index(index) if output[index] else None
            batch.append(SequenceSlice(tokens, ends[index], ([index + 1],), 1, source))
            ends[index] += len(tokens)
        (sampled,) = runner.collect(runner.launch(batch, greedy[: len(batch)]))
        order = indices
        for index, one in zip(indices, sampled, strict=True):
            output[index].append(one.token)
    for prompt, tokens in zip(prompts, output, strict=True):
        assert_greedy(model, prompt, tokens)
    assert runner.kinds == {"decodes", "chunks", "mixed"}
