"""Timing competitors against each other on a machine that is never quiet: turns, rounds, ratios within a round."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

REST_S = 0.25  # before each turn: OpenMP's threads spin for a while after their last piece of work

Turn = Callable[[float], float]  # seconds to spend -> seconds of the fastest pass


def fastest(fn: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest call within about `seconds`; at least two are made."""
    best, calls, end_s = float("inf"), 0, time.perf_counter() + seconds
    while calls < 2 or time.perf_counter() < end_s:
        begin_s = time.perf_counter()
        fn()
        best = min(best, time.perf_counter() - begin_s)
        calls += 1
    return best


def take_turns(turns: Mapping[str, Turn], *, seconds: float, rounds: int) -> dict[str, list[float]]:
    """The fastest pass of every turn, by name, one entry a round."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            time.sleep(REST_S)
            times[name].append(turn(seconds))
    return times


def times_as_fast(times: Mapping[str, Sequence[float]], ours: str, theirs: str) -> float:
    """How many times as fast `ours` is: the median over rounds."""
    ratios = [their / our for our, their in zip(times[ours], times[theirs], strict=True)]
    return round(statistics.median(ratios), 3)


def last_level_cache_bytes() -> int:
    """Of all caches of the highest level together; 32 MiB where the system does not say."""
    caches: dict[str, tuple[int, int]] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            level = int((index / "level").read_text())
            size = (index / "size").read_text().strip()
            shared = (index / "shared_cpu_list").read_text().strip()
        except (OSError, ValueError):
            continue
        unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1:], 1)
        caches[f"{level} {shared}"] = (level, int(size.rstrip("KM")) * unit)
    highest = max((level for level, _ in caches.values()), default=0)
    return sum(size for level, size in caches.values() if level == highest) or 32 << 20
