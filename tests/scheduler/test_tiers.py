"""Scheduler over device and host pages: what is demoted, what stays, what comes back."""

from typing import Any

import pytest

from hybridgen.scheduler.scheduler import NeverFits, Scheduler
from hybridgen.scheduler.step import PageMove, Step

DEVICE = 4  # pages 0..3; host pages from 4


def make(**changes: Any) -> Scheduler:
    sizes: dict[str, Any] = {
        "num_device_pages": DEVICE,
        "num_host_pages": 12,
        "page_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
    }
    return Scheduler(**(sizes | changes))


def prompt(length: int, *, start: int = 0) -> list[int]:
    return list(range(start, start + length))


def spans(step: Step) -> dict[int, tuple[int, int]]:
    return {part.key: (part.begin, part.end) for part in step.sequences}


def table(step: Step, key: int = 0) -> tuple[int, ...]:
    return next(part.block_table for part in step.sequences if part.key == key)


def run(scheduler: Scheduler) -> Step:
    step = scheduler.schedule()
    scheduler.commit(step, {part.key: 7 for part in step.sequences if part.samples})
    scheduler.check_integrity()
    return step


class TestDemotion:
    def test_a_prompt_of_several_times_the_device_is_computed_in_chunks_that_fit(self) -> None:
        scheduler = make()
        scheduler.add(0, prompt(48), max_total_tokens=64)
        steps = [run(scheduler) for _ in range(5)]
        # The first page is the sink and stays; the other three take turns.
        assert [spans(step)[0] for step in steps] == [(0, 16), (16, 28), (28, 40), (40, 48), (48, 49)]
        assert table(steps[-1])[0] == 0
        assert [part.num_device_pages for step in steps for part in step.sequences] == [4, 4, 4, 4, 4]

    def test_the_oldest_pages_after_the_sinks_are_demoted_first(self) -> None:
        scheduler = make(num_sink_pages=2, max_num_batched_tokens=4)
        scheduler.add(0, prompt(24), max_total_tokens=24)
        steps = [run(scheduler) for _ in range(6)]
        assert [step.moves for step in steps] == [(), (), (), (), (PageMove(2, 4),), (PageMove(3, 5),)]
        assert table(steps[-1]) == (0, 1, 4, 5, 2, 3)

    def test_the_sequence_with_the_most_device_pages_gives_one(self) -> None:
        scheduler = make(num_device_pages=5)
        scheduler.add(0, prompt(12), max_total_tokens=20)
        scheduler.add(1, prompt(7, start=50), max_total_tokens=20)
        run(scheduler)
        first, second = run(scheduler), run(scheduler)
        assert first.moves == (PageMove(1, 5),)
        assert second.moves == (PageMove(2, 6),)
        assert table(second, 0) == (0, 5, 6, 1)
        assert table(second, 1) == (3, 4, 2)

    def test_pages_that_others_hold_too_are_moved_for_all_of_them(self) -> None:
        scheduler = make(num_device_pages=5)
        scheduler.add(0, prompt(9), max_total_tokens=30)
        run(scheduler)
        scheduler.add(1, prompt(11), max_total_tokens=30)
        step = run(scheduler)
        assert table(step, 0)[:2] == table(step, 1)[:2] == (0, 1)
        while not (step := run(scheduler)).moves:
            pass
        assert step.moves == (PageMove(1, 5),)
        assert table(step, 0)[:2] == table(step, 1)[:2] == (0, 5)

    def test_a_step_that_was_dropped_has_its_moves_in_the_next(self) -> None:
        scheduler = make(max_num_batched_tokens=12)
        scheduler.add(0, prompt(24), max_total_tokens=24)
        run(scheduler)
        dropped = scheduler.schedule()
        assert dropped.moves
        scheduler.check_integrity()
        assert scheduler.schedule() == dropped

    def test_a_step_that_is_not_the_latest_is_noticed(self) -> None:
        scheduler = make(num_sink_pages=0, num_device_pages=2)
        scheduler.add(0, prompt(8), max_total_tokens=24)
        run(scheduler)
        step = scheduler.schedule()
        scheduler.add(1, prompt(3, start=50), max_total_tokens=4, priority=-1)
        assert len(scheduler.schedule().moves) > len(step.moves)
        with pytest.raises(AssertionError, match="not the latest step"):
            scheduler.commit(step, {0: 1})


class TestSharing:
    def test_decodes_keep_a_device_page_each_beside_a_long_prompt(self) -> None:
        scheduler = make(num_device_pages=6)
        scheduler.add(1, prompt(3, start=50), max_total_tokens=30, priority=1)
        run(scheduler)
        scheduler.add(0, prompt(40), max_total_tokens=60)
        history = [run(scheduler) for _ in range(8)]
        assert not any(step.preempted for step in history)
        assert all(1 in spans(step) for step in history)

    def test_a_sequence_waits_while_its_sinks_and_its_page_to_write_have_no_room(self) -> None:
        scheduler = make()
        for key in range(3):
            scheduler.add(key, prompt(6, start=10 * key), max_total_tokens=40)
        assert list(spans(run(scheduler))) == [0, 1]
        assert scheduler.num_waiting == 1
        scheduler.finish(0)
        assert list(spans(run(scheduler))) == [1, 2]


class TestPrefixReuse:
    def serve(self, scheduler: Scheduler, key: int, tokens: list[int]) -> None:
        scheduler.add(key, tokens, max_total_tokens=len(tokens) + 1)
        while scheduler.num_cached_tokens(key) + 4 < len(tokens) and run(scheduler).sequences[0].end < len(
            tokens
        ):
            pass
        scheduler.finish(key)

    def test_a_hit_on_the_host_is_attended_where_it_lies(self) -> None:
        scheduler = make()
        self.serve(scheduler, 0, prompt(40))
        self.serve(scheduler, 1, prompt(16, start=100))  # pushes the rest of 0 to the host
        scheduler.add(2, prompt(41), max_total_tokens=48)
        step = run(scheduler)
        assert spans(step) == {2: (40, 41)}
        assert scheduler.num_cached_tokens(2) == 40
        assert min(table(step, 2)[:10]) >= DEVICE
        assert step.sequences[0].num_device_pages == 1
        assert all(move.source < DEVICE for move in step.moves), "a hit was copied back"
        for _ in range(6):
            assert min(table(run(scheduler), 2)[:10]) >= DEVICE
        assert scheduler.pages.num_promoted_total == 0

    def test_cached_pages_go_to_the_host_before_pages_of_running_sequences(self) -> None:
        scheduler = make()
        self.serve(scheduler, 0, prompt(8))
        scheduler.add(1, prompt(12, start=50), max_total_tokens=16)
        step = run(scheduler)
        assert len(step.moves) == 1
        scheduler.add(2, prompt(9), max_total_tokens=12)
        run(scheduler)
        assert scheduler.num_cached_tokens(2) == 8


class TestPreemption:
    def preempt(self) -> Scheduler:
        """Three sequences whose sinks fill the device until the last has to stop, with room on the host."""
        scheduler = make(num_device_pages=9, num_sink_pages=3, num_host_pages=30)
        for key in range(3):
            scheduler.add(key, prompt(3, start=10 * key), max_total_tokens=40)
        for _ in range(5 * 4):
            if 2 in run(scheduler).preempted:
                return scheduler
        raise AssertionError("nobody was preempted")

    def test_a_preempted_sequence_keeps_its_pages_and_resumes_without_computing_them_again(self) -> None:
        scheduler = self.preempt()
        assert (scheduler.num_running, scheduler.num_parked) == (2, 1)
        computed = scheduler._sequences[2].computed
        assert scheduler._sequences[2].table.ids != ()
        while 2 not in spans(step := run(scheduler)):
            pass
        assert spans(step)[2] == (computed, computed + 1)
        assert scheduler.num_parked == 0

    def test_it_gets_back_the_page_that_it_writes_to_and_as_many_as_it_had(self) -> None:
        scheduler = self.preempt()
        had = scheduler._sequences[2].num_device_before
        assert had >= 3
        while scheduler._sequences[2].table.num_device_pages == had:
            run(scheduler)
        scheduler.finish(0)
        scheduler.finish(1)
        step = run(scheduler)
        assert step.sequences[0].num_device_pages >= had
        assert any(move.source >= 9 for move in step.moves)

    def test_pages_on_the_host_are_counted_as_held(self) -> None:
        scheduler = self.preempt()
        pages = scheduler.pages
        held = {page.id for key in range(3) for page in scheduler._sequences[key].table.pages}
        assert pages.num_pages - pages.num_free - pages.num_cached == len(held)
        assert pages.num_parked_pages == len(scheduler._sequences[2].table.pages)

    def test_only_when_the_host_is_full_does_the_last_one_lose_its_tail(self) -> None:
        scheduler = make(num_device_pages=2, num_host_pages=4, num_sink_pages=0, enable_prefix_caching=False)
        for key in (0, 1):
            scheduler.add(key, prompt(4, start=50 * key), max_total_tokens=20)
        while not run(scheduler).preempted:
            pass
        lost = [len(scheduler._sequences[1].table.pages)]
        while 0 in scheduler._sequences and len(scheduler._sequences[0].tokens) < 20:
            run(scheduler)
            lost.append(len(scheduler._sequences[1].table.pages))
        assert lost == sorted(lost, reverse=True)
        assert lost[-1] == 1, "0 needs five of the six pages"
        scheduler.finish(0)
        assert spans(run(scheduler))[1][0] == 4

    def test_a_sink_that_a_running_sequence_shares_with_a_preempted_one_stays(self) -> None:
        scheduler = make(num_device_pages=8, num_sink_pages=3)
        for key in range(3):
            scheduler.add(key, [*prompt(4), 50 + key], max_total_tokens=40, after=0 if key else None)
        while 2 not in run(scheduler).preempted:
            pass
        for _ in range(12):
            assert table(run(scheduler), 0)[0] < 8

    def test_a_preempted_sequence_can_be_cancelled(self) -> None:
        scheduler = self.preempt()
        scheduler.finish(2)
        scheduler.check_integrity()
        assert scheduler.num_parked == 0

    def test_what_rests_on_older_weights_is_not_published_after_resumption(self) -> None:
        scheduler = self.preempt()
        scheduler.reset_prefix_cache()
        scheduler.finish(0)
        scheduler.finish(1)
        for _ in range(8):
            run(scheduler)
        scheduler.finish(2)
        assert scheduler.pages.num_cached == 0

    def test_pages_of_newer_weights_do_not_follow_its_own_of_older_ones(self) -> None:
        scheduler = make(num_device_pages=0, num_host_pages=6, max_num_batched_tokens=8)
        scheduler.add(0, prompt(3), max_total_tokens=20)
        scheduler.add(1, prompt(12, start=50), max_total_tokens=24)
        while 1 not in run(scheduler).preempted:
            pass
        while len(scheduler._sequences[1].table.pages) > 1:
            run(scheduler)
        scheduler.reset_prefix_cache()
        scheduler.finish(0)
        scheduler.add(2, prompt(13, start=50), max_total_tokens=16, priority=-1)
        run(scheduler)
        run(scheduler)
        scheduler.finish(2)
        assert scheduler.pages.num_cached == 3
        assert spans(run(scheduler))[1][0] == 4, "its one page, and then none of 2's"


class TestRefusal:
    def test_what_exceeds_both_tiers_together_is_refused(self) -> None:
        make().add(0, prompt(5), max_total_tokens=64)
        with pytest.raises(NeverFits, match=r"that is 16 pages of 4 tokens; the KV cache has 15 pages"):
            make(num_host_pages=11).add(0, prompt(5), max_total_tokens=64)

    def test_a_device_too_small_for_the_sinks_and_one_page_is_refused_with_the_numbers(self) -> None:
        scheduler = make(num_sink_pages=4)
        scheduler.add(0, prompt(5), max_total_tokens=16)
        with pytest.raises(NeverFits, match=r"5 device pages at a time \(4 that stay and one .*there are 4"):
            scheduler.add(1, prompt(5), max_total_tokens=17)


class TestSplit:
    def test_a_lower_split_sends_the_oldest_pages_to_the_host(self) -> None:
        scheduler = make(num_device_pages=8)
        scheduler.add(0, prompt(24), max_total_tokens=40)
        run(scheduler)
        scheduler.set_split(0, 3)
        step = run(scheduler)
        assert [move.source for move in step.moves] == [1, 2, 3, 4]
        assert step.sequences[0].num_device_pages == 3

    def test_a_higher_split_brings_the_most_recent_pages_back(self) -> None:
        scheduler = make(num_device_pages=8)
        scheduler.add(0, prompt(24), max_total_tokens=40)
        run(scheduler)
        scheduler.set_split(0, 2)
        run(scheduler)
        scheduler.set_split(0, 4)
        step = run(scheduler)
        assert len(step.moves) == 2
        assert [page < 8 for page in table(step)] == [True, False, False, False, True, True, True]

    def test_a_split_of_nothing_keeps_sinks_and_the_page_written_to(self) -> None:
        scheduler = make(num_device_pages=8)
        scheduler.add(0, prompt(24), max_total_tokens=40)
        run(scheduler)
        scheduler.set_split(0, 0)
        step = run(scheduler)
        assert [page < 8 for page in table(step)] == [True, False, False, False, False, False, True]

    def test_the_hottest_host_pages_come_back_first_and_then_the_most_recent(self) -> None:
        scheduler = make(num_device_pages=8)
        scheduler.add(0, prompt(24), max_total_tokens=40)
        run(scheduler)
        scheduler.set_split(0, 2)
        step = run(scheduler)
        on_host = [page for page in table(step) if page >= 8]
        scheduler.set_heat({on_host[0]: 0.1, on_host[2]: 0.7, 99: 1.0})
        scheduler.set_split(0, 4)
        step = run(scheduler)
        assert sorted(move.source for move in step.moves) == sorted([on_host[0], on_host[2]])


class TestLimit:
    def test_no_more_sequences_are_admitted_than_the_limit_and_those_that_run_go_on(self) -> None:
        scheduler = make(num_device_pages=0)
        for key in range(4):
            scheduler.add(key, prompt(4, start=10 * key), max_total_tokens=8)
        scheduler.limit_running(2)
        assert set(spans(run(scheduler))) == {0, 1}
        scheduler.limit_running(1)
        assert set(spans(run(scheduler))) == {0, 1}
        scheduler.finish(0)
        scheduler.finish(1)
        assert set(spans(run(scheduler))) == {2}
        scheduler.limit_running(100)
        assert set(spans(run(scheduler))) == {2, 3}

    def test_a_limit_of_nothing_lets_one_run(self) -> None:
        scheduler = make(num_device_pages=0)
        scheduler.add(0, prompt(4), max_total_tokens=8)
        scheduler.limit_running(0)
        assert set(spans(run(scheduler))) == {0}
