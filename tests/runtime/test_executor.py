"""The executor and scheduler over a runner that checks what it is asked."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from tests.runtime.fakes import VOCAB, FakeRunner, make_executor, reference
from trtx.converters.errors import RequestError
from trtx.runtime.batch import PENDING
from trtx.runtime.executor import Executor
from trtx.runtime.request import FinishReason, Request, TokenEvent
from trtx.runtime.sampling import SamplingParams


def request(name: str, prompt: list[int], **params) -> Request:
    return Request(name, tuple(prompt), SamplingParams(**{"temperature": 0, **params}))


def drain(executor: Executor) -> dict[tuple[str, int], list[TokenEvent]]:
    events = defaultdict(list)
    while executor.has_work:
        for event in executor.step():
            events[event.request, event.index].append(event)
        executor.blocks.pool.check_integrity()
    return events


def tokens(events: list[TokenEvent]) -> list[int]:
    return [event.token for event in events if event.token is not None]


@pytest.mark.parametrize(
    ("windows", "chunked"),
    [((None, None), False), ((None, 20), False), ((20, 20), False), ((None, 20), True)],
    ids=["full", "mixed", "windowed", "chunked"],
)
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
@pytest.mark.parametrize("burst", [0, 1, 5], ids=["plain", "overlapped", "bursts"])
@pytest.mark.parametrize("seed", range(4))
def test_mixed_requests_get_what_they_would_get_alone(windows, chunked, reuse, burst, seed):
    """Random arrivals, shared prefixes, cancellations, n > 1, a pool that runs dry: same tokens, no block left."""
    rng = random.Random(seed)
    blocks = 16 if windows == (20, 20) else 41
    tokens_a_step = rng.choice([8, 16, 64])
    executor = make_executor(windows, reuse, chunked, burst > 0, kv_blocks=blocks, max_num_tokens=tokens_a_step)
    executor.burst = burst
    groups = [group.window for group in executor.runner.layout.groups]
    common = [rng.randrange(VOCAB) for _ in range(40)]
    wanted, events, cancelled = {}, defaultdict(list), set()
    for number in range(60):
        prompt = common[: rng.randrange(41)] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))]
        penalty = rng.choice([0, 0, 0, 0.5])  # the fake does not mind; its steps can't overlap
        several = rng.choice([1, 1, 1, 3])
        one = request(str(number), prompt, max_tokens=rng.randrange(1, 45), n=several, presence_penalty=penalty)
        executor.add(one)
        wanted[one.id] = one
        for _ in range(rng.randrange(4)):
            for event in executor.step():
                events[event.request, event.index].append(event)
            executor.blocks.pool.check_integrity()
        if rng.random() < 0.1:
            victim = rng.choice(list(wanted))
            executor.cancel(victim)
            cancelled.add(victim)
    for key, rest in drain(executor).items():
        events[key] += rest
    assert executor.blocks.pool.used == 0, "blocks leaked"
    # A windowed sequence stops growing, so what admission saw to be enough stays enough.
    assert executor.stats.preemptions or None not in windows, "the pool never ran dry: the test is too easy"
    assert bool(executor.stats.reused_tokens) or not reuse
    for one in wanted.values():
        for index in range(one.params.n):
            seen = events[one.id, index]
            assert [event.finish is not None for event in seen] == [False] * (len(seen) - 1) + [True]
            alone = reference(one.prompt, one.params.max_tokens, groups, index, chunked)
            if seen[-1].finish is FinishReason.CANCELLED:
                assert one.id in cancelled
                alone = alone[: len(tokens(seen))]
            assert tokens(seen) == alone, one.id


def test_chunked_prefill_does_not_stall_decodes():
    executor = make_executor(max_num_tokens=16)
    executor.add(request("short", [1, 2, 3], max_tokens=20))
    executor.step()
    executor.add(request("long", list(range(90)), max_tokens=4))
    for _ in range(6):
        assert "short" in {event.request for event in executor.step()}
        assert executor.last_step.decode_tokens == 1 and executor.last_step.prefill_tokens == 15
    drain(executor)


def test_a_full_batch_makes_the_others_wait():
    executor = make_executor(max_batch_size=2)
    for number in range(5):
        executor.add(request(str(number), [number + 1], max_tokens=3))
    assert {event.request for event in executor.step()} == {"0", "1"}
    drain(executor)
    assert executor.stats.peak_running == 2


def test_failing_request_leaves_others_alone():
    executor = make_executor()
    executor.runner.poison.add((5, 5))
    executor.add(request("bad", [5, 5], max_tokens=4, n=2))
    executor.add(request("good", [1, 2], max_tokens=4))
    events = drain(executor)
    for index in range(2):
        (event,) = events["bad", index]
        assert event.finish is FinishReason.ERROR and "not finite" in event.error.cause
    assert tokens(events["good", 0]) == reference([1, 2], 4, [None])
    assert executor.blocks.pool.used == 0


@pytest.mark.parametrize("when", [0, 1, 3])
def test_cancelling_the_first_continuation_leaves_its_siblings(when):
    executor = make_executor()
    executor.add(request("r", [1, 2, 3], max_tokens=5, n=3))
    early = [event for _ in range(when) for event in executor.step()]
    executor.cancel("r", 0)
    events = drain(executor)
    assert events["r", 0][-1].finish is FinishReason.CANCELLED
    for index in (1, 2):
        seen = [e.token for e in early if e.index == index] + tokens(events["r", index])
        assert seen == reference([1, 2, 3], 5, [None], index)


def test_continuations_share_the_prompt_without_prefix_reuse():
    executor = make_executor(reuse=False)
    executor.add(request("r", list(range(33)), max_tokens=4, n=4))
    drain(executor)
    assert executor.stats.reused_tokens == 3 * 32


def test_end_tokens_and_limits():
    prompt = [1, 2, 3]
    alone = reference(prompt, 8, [None])
    executor = make_executor()
    executor.eos_ids = frozenset({alone[2]})
    for name, params in {
        "eos": {},
        "ignored": {"ignore_eos": True},
        "stop-id": {"ignore_eos": True, "stop_token_ids": (alone[1],)},
    }.items():
        executor.add(request(name, prompt, max_tokens=8, **params))
    events = drain(executor)
    assert tokens(events["eos", 0]) == alone[:3] and events["eos", 0][-1].finish is FinishReason.STOP
    assert tokens(events["ignored", 0]) == alone and events["ignored", 0][-1].finish is FinishReason.LENGTH
    assert tokens(events["stop-id", 0]) == alone[:2] and events["stop-id", 0][-1].finish is FinishReason.STOP


def test_end_tokens_outside_the_vocabulary_are_left_out():
    limits = make_executor().limits
    executor = Executor(FakeRunner(limits), limits, VOCAB, eos_ids={3, -1, VOCAB})
    assert executor.eos_ids == {3}, "the sampler indexes logits with them"


@pytest.mark.parametrize("overlaps", [False, True], ids=["plain", "overlapped"])
def test_end_of_an_earlier_request_is_not_taken_for_that_of_a_new_one_of_its_id(overlaps):
    executor = make_executor(overlaps=overlaps)
    executor.add(request("r", [1, 2], max_tokens=50))
    executor.step()
    executor.cancel("r")
    executor.add(request("r", [3, 4], max_tokens=5))
    events = drain(executor)["r", 0]
    assert tokens(events) == reference([3, 4], 5, [None])
    assert [event.finish for event in events] == [None] * 4 + [FinishReason.LENGTH]


def test_output_ends_at_the_engine_s_length():
    executor = make_executor(max_seq_len=16)
    executor.add(request("r", [1] * 10, max_tokens=None))
    events = drain(executor)
    assert len(events["r", 0]) == 6 and events["r", 0][-1].finish is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("prompt", "part"),
    [([], "empty"), ([1] * 128, "sequences of 128"), ([VOCAB], "outside the vocabulary"), ([-1], "outside")],
)
def test_bad_requests_are_refused(prompt, part):
    executor = make_executor()
    with pytest.raises(RequestError, match=part):
        executor.add(request("r", prompt))
    assert not executor.has_work


@pytest.mark.parametrize("burst", [1, 5])
def test_end_that_is_read_late_gives_no_token_more(burst):
    """The steps after it were launched already; its blocks are free as soon as it is known, and others go on."""
    prompt, other = [1, 2, 3], [4, 5]
    alone = reference(prompt, 9, [None])
    end = alone[2]
    assert end not in alone[:2]
    executor = make_executor(overlaps=True)
    executor.burst, executor.eos_ids = burst, frozenset({end})
    executor.add(request("ends", prompt, max_tokens=40))
    events = []
    while not any(event.finish for event in events):
        events += executor.step()
    assert tokens(events) == alone[:3] and events[-1].finish is FinishReason.STOP
    assert executor.blocks.pool.used == 0 and executor.runner.tickets, "a step is still in flight"
    executor.add(request("other", other, max_tokens=20, ignore_eos=True))
    rest = drain(executor)
    assert rest.keys() == {("other", 0)} and tokens(rest["other", 0]) == reference(other, 20, [None])
    assert executor.stats.steps > 3 + 20, "nothing was computed in vain: the test is too easy"
    assert executor.blocks.pool.used == 0 and not executor.runner.tickets


def test_penalties_are_given_every_token(monkeypatch):
    """Steps overlap only while no sequence that runs needs to know its last token."""
    executor = make_executor(overlaps=True)
    executor.burst = 5
    launch, overlapped = executor.runner.launch, []

    def checked(batch, rows, *steps):
        assert not any(row.params.penalizes and PENDING in row.tokens for row in rows)
        overlapped.append(any(PENDING in piece.tokens for piece in batch))
        return launch(batch, rows, *steps)

    monkeypatch.setattr(executor.runner, "launch", checked)
    events = defaultdict(list)

    def step(count):
        for event in [event for _ in range(count) for event in executor.step()]:
            events[event.request].append(event)

    executor.add(request("plain", [1, 2, 3], max_tokens=60))
    step(3)
    before = len(overlapped)
    penalties = {"presence": {"presence_penalty": 0.5}, "repetition": {"repetition_penalty": 1.5}}
    for name, params in penalties.items():
        executor.add(request(name, [4, 5], max_tokens=6, **params))
    while not all(events[name] and events[name][-1].finish for name in penalties):
        step(1)
    during = len(overlapped)
    for (name, _), seen in drain(executor).items():
        events[name] += seen
    assert any(overlapped[:before]) and any(overlapped[during:]), "steps never overlap: the test is too easy"
    assert tokens(events["plain"]) == reference([1, 2, 3], 60, [None])
    for name in penalties:
        assert tokens(events[name]) == reference([4, 5], 6, [None])


@pytest.mark.parametrize("burst", [1, 5])
def test_cancelling_while_a_step_is_in_flight(burst):
    """Its blocks are free at once, for a request whose steps come behind; the tokens in flight are dropped."""
    executor = make_executor(overlaps=True, reuse=False)
    executor.burst = burst
    executor.add(request("victim", list(range(20)), max_tokens=60))
    executor.add(request("other", [1, 2], max_tokens=60))
    early = [event for _ in range(3) for event in executor.step()]
    assert executor.runner.tickets, "no step is in flight: the test is too easy"
    held = executor.blocks.pool.used
    executor.cancel("victim")
    assert executor.blocks.pool.used < held
    executor.add(request("next", list(range(30, 60)), max_tokens=7))
    events = drain(executor)
    (event,) = events["victim", 0]
    assert event.finish is FinishReason.CANCELLED and event.token is None
    seen = [event for event in early if event.request == "other"] + events["other", 0]
    assert tokens(seen) == reference([1, 2], 60, [None])
    assert tokens(events["next", 0]) == reference(list(range(30, 60)), 7, [None])
    assert executor.blocks.pool.used == 0 and not executor.runner.tickets


def test_ids_must_differ():
    executor = make_executor()
    executor.add(request("r", [1]))
    with pytest.raises(RequestError, match="in use"):
        executor.add(request("r", [2]))
    executor.cancel("r")
    assert [event.finish for event in executor.step()] == [FinishReason.CANCELLED]
    executor.add(request("r", [2]))


@pytest.mark.parametrize(
    "params",
    [{"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"n": 0}, {"max_tokens": 0}, {"stop": ("",)}, {"logprobs": 21},
     {"min_tokens": 9, "max_tokens": 8}, {"repetition_penalty": 0}, {"temperature": float("nan")}],
    ids=str,
)  # fmt: skip
def test_parameters_out_of_range(params):
    with pytest.raises(RequestError, match=next(iter(params))):
        SamplingParams(**params)
