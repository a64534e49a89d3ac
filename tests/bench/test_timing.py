import pytest

from bench.timing import fastest, last_level_cache_bytes, take_turns, times_as_fast


def test_competitors_take_turns_within_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.timing.REST_S", 0.0)
    called: list[str] = []

    def turn(name: str, took: float) -> float:
        called.append(name)
        return took

    times = take_turns(
        {"a": lambda seconds: turn("a", seconds), "b": lambda seconds: turn("b", 2 * seconds)},
        seconds=0.5,
        rounds=2,
    )
    assert called == ["a", "b", "a", "b"]
    assert times == {"a": [0.5, 0.5], "b": [1.0, 1.0]}


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    # A neighbour slowed both down in the second round and one of them in the third.
    assert times_as_fast({"ours": [1.0, 10.0, 1.0], "theirs": [2.0, 20.0, 9.0]}, "ours", "theirs") == 2.0


def test_the_fastest_call_is_kept_and_at_least_two_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(
        [0.0, 0.0, 5.0, 5.0, 8.0, 9.0]
    )  # limit; begin and end of two calls; the loop looks once more
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert fastest(lambda: None, 1.0) == 3.0


def test_the_cache_is_larger_than_nothing() -> None:
    assert last_level_cache_bytes() >= 1 << 18
