"""Two reports side by side: ratios new / old, with confidence intervals.

The interval of a latency is a percentile bootstrap over requests (Efron and Tibshirani 1993, An Introduction to the
Bootstrap, chapter 13). When both runs served the same requests, pairs are resampled, which takes the spread of the
lengths out. It covers what varies between requests of one run, not what varies between runs: requests of one run share
batches, clocks and temperatures. Throughput is one value a run, so it has no interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from trtx.converters.errors import InputError
from trtx.runtime.bench.report import Report, RequestRecord, Table

CAVEAT = "Intervals cover what varies between requests of one run, not between runs: repeat both before you conclude."
RESAMPLES = 2000
CONFIDENCE = 0.95

_CHUNK = 1 << 20
"""Numbers resampled at once."""

Statistic = Callable[..., Any]
"""(values, axis) → values without that axis."""

STATISTICS: dict[str, Statistic] = {
    "mean": np.mean,
    "p50": np.median,
    "p90": lambda values, axis: np.percentile(values, 90, axis=axis),
}
LATENCIES = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "end-to-end": "e2e_ms"}
RATES = {
    "requests/s": "requests_per_s",
    "output tokens/s": "output_tokens_per_s",
    "total tokens/s": "total_tokens_per_s",
    "tokens/s per user": "output_tokens_per_s_per_user",
}


@dataclass(frozen=True)
class Ratio:
    """One line of a comparison.

    Attributes:
        unit: of `old` and `new`.
        low, high: confidence interval of new / old; None where there is none.
        verdict: 'better', 'worse' or 'no difference' by the interval; '' without one.
    """

    name: str
    unit: str
    old: float
    new: float
    ratio: float
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All lines, and what besides the engine differs.

    Attributes:
        warnings: differences that make the ratios say something else than they seem to.
    """

    old_engine: str
    new_engine: str
    confidence: float
    ratios: list[Ratio]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def check_same_workload(old: dict[str, Any], new: dict[str, Any], where: str) -> None:
    """Refuse to compare runs that were asked for different things.

    Args:
        old, new: workloads as in a report.
        where: what to call the old one in the error.

    Raises:
        InputError: names every setting that differs.
    """
    if differing := _differences(old, new):
        raise InputError(
            f"{where}: measured another workload ({'; '.join(differing)}).",
            "Run with the same settings, or add --compare-anyway.",
        )


def compare(old: Report, new: Report, seed: int = 0) -> Comparison:
    """Ratios new / old of throughput and latencies.

    Args:
        seed: of the bootstrap.
    """
    rates = [
        _rate(name, getattr(old.metrics.throughput, key), getattr(new.metrics.throughput, key))
        for name, key in RATES.items()
        if old.metrics.throughput and new.metrics.throughput
    ]
    latencies = []
    for name, key in LATENCIES.items():
        samples = _samples(old.requests, new.requests, key)
        if samples is not None:
            latencies += [
                _latency(f"{name} {which}", *samples, statistic, seed) for which, statistic in STATISTICS.items()
            ]
    return Comparison(old.engine.path, new.engine.path, CONFIDENCE, rates + latencies, _warnings(old, new))


def comparison_table(comparison: Comparison) -> Table:
    """A comparison for the reader."""
    interval = f"{100 * comparison.confidence:.0f}% interval"
    rows: list[tuple[str, ...]] = [
        (
            ratio.name,
            f"{ratio.old:,.2f}",
            f"{ratio.new:,.2f}",
            f"{ratio.ratio:.3f}",
            "" if ratio.low is None else f"{ratio.low:.3f}–{ratio.high:.3f}",
            ratio.verdict,
        )
        for ratio in comparison.ratios
    ]
    title = f"{comparison.new_engine} (new) against {comparison.old_engine} (old); latencies in ms"
    return Table(title, ("", "old", "new", "new/old", interval, "latency is"), rows)


def _samples(
    old: list[RequestRecord], new: list[RequestRecord], key: str
) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """Values of both runs, and whether they pair up request by request; None if either has none."""
    before, after = (
        {(r.id, r.input_tokens, r.output_tokens): getattr(r, key) for r in records if getattr(r, key) is not None}
        for records in (old, new)
    )
    if not before or not after:
        return None
    paired = before.keys() == after.keys()
    order = list(before) if paired else list(after)
    return np.array(list(before.values())), np.array([after[name] for name in order]), paired


def bootstrap_ratio(
    old: np.ndarray, new: np.ndarray, statistic: Statistic, paired: bool, seed: int
) -> tuple[float, float]:
    """Confidence interval of statistic(new) / statistic(old).

    Args:
        old, new: samples, [n] and [m].
        paired: old[i] and new[i] are of the same request (n = m).
    """
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // max(len(old), len(new)))
    ratios = []
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        chosen = rng.integers(len(old), size=(count, len(old)))
        other = chosen if paired else rng.integers(len(new), size=(count, len(new)))
        ratios.append(statistic(new[other], axis=1) / statistic(old[chosen], axis=1))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(ratios), [tail, 100 - tail])
    return float(low), float(high)


def _rate(name: str, old: float, new: float) -> Ratio:
    return Ratio(name, "1/s", old, new, new / old, None, None, "")


def _latency(name: str, old: np.ndarray, new: np.ndarray, paired: bool, statistic: Statistic, seed: int) -> Ratio:
    low, high = bootstrap_ratio(old, new, statistic, paired, seed)
    before, after = float(statistic(old, axis=0)), float(statistic(new, axis=0))
    verdict = "better" if high < 1 else "worse" if low > 1 else "no difference"
    return Ratio(name, "ms", before, after, after / before, low, high, verdict)


def _warnings(old: Report, new: Report) -> list[str]:
    found = [f"the workload differs ({text})" for text in _differences(old.workload, new.workload)]
    for name in ("device", "name", "count", "cores", "threads"):
        before, after = getattr(old.machine, name), getattr(new.machine, name)
        if before != after:
            found.append(f"the machine differs ({name}: {before!r} then, {after!r} now)")
    for when, report in (("then", old), ("now", new)):
        if report.metrics.failed or report.metrics.cancelled:
            found.append(f"{report.metrics.failed + report.metrics.cancelled} requests did not complete {when}")
    return found


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {old.get(name)!r} then, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
