"""What would fit when an engine does not: settings that were tried against the ledger, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from rich.filesize import decimal

from trtx.builder.backend import Backend
from trtx.builder.engine import ParallelMapping
from trtx.builder.ledger import Ledger, account
from trtx.builder.shard import obstacle
from trtx.builder.sizing import Sizing
from trtx.converters.errors import DoesNotFitError

_LEAST_TOKENS = 64
_MOST_GPUS = 16
_MOST_MEMORY = 0.95


@dataclass(frozen=True)
class Suggestion:
    """A change of settings with which the engine fits.

    Attributes:
        options: as on the command line.
        note: what else to know; may be empty.
    """

    options: str
    sizing: Sizing
    note: str = ""

    def __str__(self) -> str:
        return f"{self.options} ({self.note})" if self.note else self.options


def does_not_fit(sizing: Sizing, backend: Backend) -> DoesNotFitError:
    """The error of an engine that does not fit: by how much, the ledger, and settings that would."""
    ledger = account(sizing, backend)
    found = [str(suggestion) for suggestion in suggestions(sizing, backend)]
    remedy = "Use one of:\n" + "\n".join(f"  {text}" for text in found) if found else "Use a smaller model."
    return DoesNotFitError(f"{_complaint(sizing, ledger)}\n{_table(sizing, ledger)}", remedy)


def suggestions(sizing: Sizing, backend: Backend) -> list[Suggestion]:
    """Changes with which it fits: each alone where that suffices, else the smallest batch and steps together."""

    def fits(changed: Sizing) -> bool:
        return not account(changed, backend).missing

    same_length = (_fewer_tokens, _smaller_batch, _fp8_cache, _bigger_cache, _half_precision, _more_memory)
    found = [suggestion for change in same_length for suggestion in change(sizing, fits)]
    found = found or list(_smallest(sizing, fits))
    found += _shorter(sizing, fits)
    found = found or list(_smallest_and_shorter(sizing, fits))
    return [*found, *_more_gpus(sizing, backend, fits)]


Fits = Callable[[Sizing], bool]


def _shorter(sizing: Sizing, fits: Fits) -> Iterator[Suggestion]:
    """The longest max_seq_len that fits, in whole blocks."""
    block = sizing.kv_block_size
    largest = _largest(
        (sizing.max_seq_len - 1) // block, lambda count: fits(replace(sizing, max_seq_len=count * block))
    )
    if largest:
        changed = replace(sizing, max_seq_len=largest * block)
        yield Suggestion(f"--max-seq-len {changed.max_seq_len}", changed)


def _fewer_tokens(sizing: Sizing, fits: Fits) -> Iterator[Suggestion]:
    least = max(_LEAST_TOKENS, sizing.max_batch_size)
    for tokens in _halves(sizing.max_num_tokens, least):
        changed = replace(sizing, max_num_tokens=tokens)
        if fits(changed):
            yield Suggestion(f"--max-num-tokens {tokens}", changed)
            return


def _smaller_batch(sizing: Sizing, fits: Fits) -> Iterator[Suggestion]:
    for batch in _halves(sizing.max_batch_size, 1):
        changed = replace(sizing, max_batch_size=batch)
        if fits(changed):
            yield Suggestion(f"--max-batch-size {batch}", changed)
            return


def _fp8_cache(sizing: Sizing, fits: Fits) -> Iterator[Suggestion]:
    changed = replace(sizing, kv_dtype="fp8")
    if sizing.kv_dtype != "fp8" and fits(changed):
        scales = sizing.model.quantization.kv_cache == "fp8"
        yield Suggestion("--kv-cache-dtype fp8", changed, "" if scales else "without calibrated scales")


def _bigger_cache(sizing: Sizing, fits: Fits) -> Iterator[Suggestion]:
    changed = replace(sizing, kv_cache_memory=None)
    if sizing.kv_cache_memory is not None and fits(changed):
        yield Suggestion("no --kv-cache-memory", changed)


def _half_precision(sizing: Sizing, fits: Fits) -> Iterator[Suggestion]:
    kv = "bf16" if sizing.kv_dtype == "fp32" else sizing.kv_dtype
    changed = replace(sizing, compute_dtype="bf16", kv_dtype=kv)
    if sizing.compute_dtype == "fp32" and fits(changed):
        yield Suggestion("--dtype bf16", changed)


def _more_memory(sizing: Sizing, fits: Fits) -> Iterator[Suggestion]:
    changed = replace(sizing, memory_fraction=_MOST_MEMORY)
    if sizing.memory_fraction < _MOST_MEMORY and fits(changed):
        yield Suggestion(f"--memory-fraction {_MOST_MEMORY}", changed)


def _smallest(sizing: Sizing, fits: Fits) -> Iterator[Suggestion]:
    """Batch 1 and small steps."""
    small, options = _shrunk(sizing)
    if fits(small):
        yield Suggestion(options, small)


def _smallest_and_shorter(sizing: Sizing, fits: Fits) -> Iterator[Suggestion]:
    """Batch 1 and small steps, with the longest sequences that then fit."""
    small, options = _shrunk(sizing)
    for suggestion in _shorter(small, fits):
        yield Suggestion(f"{options} {suggestion.options}", suggestion.sizing)


def _shrunk(sizing: Sizing) -> tuple[Sizing, str]:
    tokens = min(sizing.max_num_tokens, _LEAST_TOKENS)
    return replace(sizing, max_batch_size=1, max_num_tokens=tokens), f"--max-batch-size 1 --max-num-tokens {tokens}"


def _more_gpus(sizing: Sizing, backend: Backend, fits: Fits) -> Iterator[Suggestion]:
    """The fewest GPUs that the model can be split over and fits on."""
    if sizing.target.gpu is None:
        return
    count = 2 * sizing.mapping.ranks
    while count <= _MOST_GPUS:
        for mapping in mappings(count):
            changed = replace(sizing, mapping=mapping)
            if not (backend.obstacle(mapping) or obstacle(sizing.model, mapping)) and fits(changed):
                options = f"--gpus {count} --tp {mapping.tp} --pp {mapping.pp}"
                done = "built, not run" if backend.compiles else "planned, not built"
                yield Suggestion(options, changed, f"more than one GPU can be {done} yet")
                return
        count *= 2


def mappings(gpus: int) -> list[ParallelMapping]:
    """Every tp × pp of `gpus` ranks, the most tensor-parallel first."""
    return [ParallelMapping(tp, gpus // tp) for tp in range(gpus, 0, -1) if gpus % tp == 0]


def _halves(value: int, least: int) -> Iterator[int]:
    while value > least:
        value = max(value // 2, least)
        yield value


def _largest(most: int, holds: Callable[[int], bool]) -> int:
    """The largest count from 1 to `most` for which a condition holds that is lost as the count grows; 0: none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _complaint(sizing: Sizing, ledger: Ledger) -> str:
    target, ranks = sizing.target.name, sizing.mapping.ranks
    where = "the KV cache" if sizing.kv_cache_memory is not None else f"{ranks} × {target}" if ranks > 1 else target
    return f"{decimal(ledger.missing)} too little memory on {where} for one sequence of {sizing.max_seq_len} tokens."


def _table(sizing: Sizing, ledger: Ledger) -> str:
    rows = {**ledger.rows, "device memory": sizing.target.memory}
    return "\n".join(f"  {name:<14}{decimal(size):>12}" for name, size in rows.items())
