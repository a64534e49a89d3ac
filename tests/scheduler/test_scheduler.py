"""Scheduler: what a step holds, who is admitted, who is preempted, and what is reused."""

from typing import Any

import pytest

from hybridgen.scheduler.scheduler import NeverFits, Scheduler
from hybridgen.scheduler.step import Step


def make(**changes: Any) -> Scheduler:
    sizes: dict[str, Any] = {
        "num_host_pages": 16,
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


def run(scheduler: Scheduler, *, token: int = 7) -> Step:
    """One step, every sampling sequence drawing `token`."""
    step = scheduler.schedule()
    scheduler.commit(step, {part.key: token for part in step.sequences if part.samples})
    scheduler.check_integrity()
    return step


def test_nothing_to_do_gives_an_empty_step() -> None:
    assert make().schedule() == Step(sequences=(), preempted=(), num_tokens=0)


def test_a_prompt_is_computed_whole_and_then_one_token_a_step() -> None:
    scheduler = make()
    scheduler.add(0, prompt(5), max_total_tokens=10)
    first, second = run(scheduler), run(scheduler)
    assert (first.num_tokens, spans(first)) == (5, {0: (0, 5)})
    assert first.sequences[0].samples
    assert first.sequences[0].block_table == (0, 1)
    assert (second.num_tokens, spans(second)) == (1, {0: (5, 6)})


def test_a_long_prompt_is_computed_in_chunks_and_samples_only_at_its_end() -> None:
    scheduler = make(max_num_batched_tokens=4)
    scheduler.add(0, prompt(10), max_total_tokens=12)
    steps = [run(scheduler) for _ in range(4)]
    assert [spans(step)[0] for step in steps] == [(0, 4), (4, 8), (8, 10), (10, 11)]
    assert [step.sequences[0].samples for step in steps] == [False, False, True, True]


def test_pages_are_taken_as_the_chunks_need_them() -> None:
    scheduler = make(max_num_batched_tokens=4)
    scheduler.add(0, prompt(16), max_total_tokens=16)
    assert [len(run(scheduler).sequences[0].block_table) for _ in range(4)] == [1, 2, 3, 4]


def test_a_block_table_grows_only_at_page_boundaries() -> None:
    scheduler = make()
    scheduler.add(0, prompt(3), max_total_tokens=10)
    tables = [run(scheduler).sequences[0].block_table for _ in range(4)]
    assert [len(table) for table in tables] == [1, 1, 2, 2]
    assert tables[2][:1] == tables[0]


def test_decodes_get_their_tokens_before_an_older_prompt_takes_the_rest() -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(0, prompt(4), max_total_tokens=30)
    scheduler.add(1, prompt(30, start=100), max_total_tokens=32)
    scheduler.add(2, prompt(4, start=200), max_total_tokens=30, priority=1)
    assert spans(run(scheduler)) == {0: (0, 4), 1: (0, 4)}
    for begin in (4, 11, 18):
        assert spans(run(scheduler))[1] == (begin, begin + 7)
    assert spans(run(scheduler)) == {0: (7, 8), 1: (25, 30), 2: (0, 2)}
    assert spans(run(scheduler)) == {0: (8, 9), 1: (30, 31), 2: (2, 4)}


def test_a_younger_decode_does_not_wait_for_an_older_prompt() -> None:
    scheduler = make(max_num_batched_tokens=8)
    scheduler.add(1, prompt(4), max_total_tokens=30, priority=5)
    run(scheduler)
    scheduler.add(0, prompt(30, start=100), max_total_tokens=32)
    run(scheduler)
    step = run(scheduler)
    assert spans(step) == {0: (7, 14), 1: (5, 6)}
    assert [part.key for part in step.sequences] == [0, 1]


def test_a_prompt_advances_even_when_all_other_places_decode() -> None:
    scheduler = make(max_num_batched_tokens=3, max_num_seqs=8)
    for key in range(4):
        scheduler.add(key, prompt(1, start=key), max_total_tokens=16)
    run(scheduler)
    scheduler.finish(2)
    scheduler.add(4, prompt(6, start=50), max_total_tokens=16, priority=-1)
    # Three run at most, however many may: a fourth could be left without a token for ever.
    assert spans(run(scheduler)) == {0: (1, 2), 1: (1, 2), 4: (0, 1)}
    assert spans(run(scheduler)) == {4: (1, 2), 0: (2, 3), 1: (2, 3)}
    assert scheduler.num_waiting == 1


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3])
def test_no_more_than_max_num_seqs_run(max_num_seqs: int) -> None:
    scheduler = make(max_num_seqs=max_num_seqs)
    for key in range(3):
        scheduler.add(key, prompt(2, start=key), max_total_tokens=4)
    assert list(spans(run(scheduler))) == list(range(max_num_seqs))
    assert (scheduler.num_running, scheduler.num_waiting) == (max_num_seqs, 3 - max_num_seqs)


def test_lower_priority_numbers_are_admitted_first_and_arrival_breaks_ties() -> None:
    scheduler = make(max_num_seqs=1)
    for key, priority in ((0, 1), (1, 0), (2, 0), (3, -1)):
        scheduler.add(key, prompt(2), max_total_tokens=4, priority=priority)
    served = []
    for _ in range(4):
        key = run(scheduler).sequences[0].key
        served.append(key)
        scheduler.finish(key)
    assert served == [3, 1, 2, 0]


class TestRefusal:
    def test_a_sequence_longer_than_the_model_is_refused_with_both_numbers(self) -> None:
        with pytest.raises(NeverFits, match=r"may reach 65 tokens, the limit is 64 \(max_model_len\)"):
            make().add(0, prompt(5), max_total_tokens=65)

    @pytest.mark.parametrize("max_total_tokens", [8, 9])
    def test_a_sequence_that_needs_more_pages_than_there_are_is_refused(self, max_total_tokens: int) -> None:
        scheduler = make(num_host_pages=2)
        if max_total_tokens == 8:
            scheduler.add(0, prompt(5), max_total_tokens=8)
            return
        with pytest.raises(
            NeverFits, match=r"9 tokens, that is 3 pages of 4 tokens; the KV cache has 2 pages \(8"
        ):
            scheduler.add(0, prompt(5), max_total_tokens=9)
        assert scheduler.num_waiting == 0

    def test_an_empty_prompt_and_a_prompt_over_its_own_limit_are_errors(self) -> None:
        with pytest.raises(ValueError, match="0 prompt tokens"):
            make().add(0, [], max_total_tokens=5)
        with pytest.raises(ValueError, match="6 prompt tokens, max_total_tokens 5"):
            make().add(0, prompt(6), max_total_tokens=5)

    def test_a_key_cannot_be_used_twice(self) -> None:
        scheduler = make()
        scheduler.add(0, prompt(5), max_total_tokens=6)
        with pytest.raises(ValueError, match="sequence 0 exists already"):
            scheduler.add(0, prompt(5), max_total_tokens=6)

    def test_a_size_of_zero_is_refused(self) -> None:
        with pytest.raises(ValueError, match="max_num_seqs is 0"):
            make(max_num_seqs=0)


class TestPrefixReuse:
    def serve(self, scheduler: Scheduler, key: int, tokens: list[int], **options: Any) -> Step:
        """Compute a prompt and end; returns its first step."""
        scheduler.add(key, tokens, max_total_tokens=len(tokens) + 4, **options)
        first = run(scheduler)
        scheduler.finish(key)
        scheduler.check_integrity()
        return first

    @pytest.mark.parametrize(
        ("length", "cached"), [(1, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8), (10, 8)], ids=str
    )
    def test_a_hit_is_whole_pages_and_never_the_last_token(self, length: int, cached: int) -> None:
        scheduler = make()
        self.serve(scheduler, 0, prompt(length))
        scheduler.add(1, prompt(length), max_total_tokens=length + 1)
        assert scheduler.num_cached_tokens(1) == 0
        assert spans(run(scheduler)) == {1: (cached, length)}
        assert scheduler.num_cached_tokens(1) == cached
        assert scheduler.num_prefix_hits_total == cached
        assert scheduler.num_prefix_queries_total == 2 * length

    def test_generated_tokens_are_reused_as_the_next_prompt(self) -> None:
        scheduler = make()
        scheduler.add(0, prompt(3), max_total_tokens=16)
        for token in (50, 51, 52):
            run(scheduler, token=token)
        scheduler.finish(0)
        # Six known tokens of which five are computed: one full page.
        assert spans(self.serve(scheduler, 1, [*prompt(3), 50, 51, 52, 53])) == {1: (4, 7)}

    def test_a_page_is_hit_while_its_first_owner_still_runs(self) -> None:
        scheduler = make()
        scheduler.add(0, prompt(9), max_total_tokens=16)
        owner = run(scheduler).sequences[0].block_table
        scheduler.add(1, prompt(9), max_total_tokens=16)
        second = {part.key: part for part in run(scheduler).sequences}[1]
        assert second.begin == 8
        assert second.block_table[:2] == owner[:2]
        assert second.block_table[2] != owner[2]
        scheduler.finish(0)
        scheduler.check_integrity()

    def test_a_chunk_is_reusable_before_its_prompt_is_complete(self) -> None:
        scheduler = make(max_num_batched_tokens=9)
        scheduler.add(0, prompt(16), max_total_tokens=20)
        scheduler.add(1, prompt(16), max_total_tokens=20)
        assert spans(run(scheduler)) == {0: (0, 9)}
        assert spans(run(scheduler)) == {0: (9, 16), 1: (8, 10)}

    def test_nothing_is_published_before_it_is_computed(self) -> None:
        scheduler = make()
        scheduler.add(0, prompt(9), max_total_tokens=16)
        step = scheduler.schedule()
        scheduler.finish(0)
        scheduler.commit(step, {0: 1})
        assert (scheduler.pages.num_free, scheduler.pages.num_cached) == (16, 0)

    def test_two_sequences_that_compute_the_same_page_end_up_sharing_it(self) -> None:
        scheduler = make()
        for key in (0, 1):
            scheduler.add(key, prompt(9), max_total_tokens=16)
        tables = [part.block_table for part in run(scheduler).sequences]
        assert not set(tables[0]) & set(tables[1])
        shared = [part.block_table for part in run(scheduler).sequences]
        assert shared[0] == tables[0]
        assert shared[1] == (*tables[0][:2], tables[1][2])
        assert scheduler.pages.num_free == 16 - 4

    def test_salts_keep_equal_prompts_apart(self) -> None:
        scheduler = make()
        self.serve(scheduler, 0, prompt(9), salt=b"x")
        assert spans(self.serve(scheduler, 1, prompt(9), salt=b"y")) == {1: (0, 9)}
        assert spans(self.serve(scheduler, 2, prompt(9), salt=b"x")) == {2: (8, 9)}

    def test_without_reuse_everything_is_computed_and_still_published(self) -> None:
        scheduler = make()
        self.serve(scheduler, 0, prompt(9))
        assert spans(self.serve(scheduler, 1, prompt(13), reuse_prefix=False)) == {1: (0, 13)}
        assert scheduler.num_prefix_queries_total == 9
        assert spans(self.serve(scheduler, 2, prompt(14))) == {2: (12, 14)}

    def test_with_caching_off_nothing_is_kept(self) -> None:
        scheduler = make(enable_prefix_caching=False)
        self.serve(scheduler, 0, prompt(9))
        assert (scheduler.pages.num_free, scheduler.pages.num_cached) == (16, 0)
        assert spans(self.serve(scheduler, 1, prompt(9))) == {1: (0, 9)}
        assert scheduler.num_prefix_queries_total == 0

    def test_the_tail_of_the_oldest_prompt_is_evicted_first(self) -> None:
        scheduler = make(num_host_pages=5)
        self.serve(scheduler, 0, prompt(8))
        self.serve(scheduler, 1, prompt(8, start=100))
        assert (scheduler.pages.num_free, scheduler.pages.num_cached) == (1, 4)
        scheduler.add(2, prompt(5, start=200), max_total_tokens=8)
        run(scheduler)
        scheduler.finish(2)
        assert spans(self.serve(scheduler, 3, prompt(9, start=100))) == {3: (8, 9)}
        assert spans(self.serve(scheduler, 4, prompt(9))) == {4: (4, 9)}

    def test_a_suspect_sequence_leaves_nothing_in_the_cache(self) -> None:
        scheduler = make()
        scheduler.add(0, prompt(9), max_total_tokens=16)
        run(scheduler)
        scheduler.finish(0, keep_pages=False)
        scheduler.check_integrity()
        assert (scheduler.pages.num_free, scheduler.pages.num_cached) == (16, 0)

    def test_those_who_share_a_suspect_page_keep_it_but_publish_no_more(self) -> None:
        scheduler = make()
        for key in (0, 1):
            scheduler.add(key, prompt(6), max_total_tokens=16)
            run(scheduler)
        scheduler.add(2, prompt(6, start=50), max_total_tokens=16)
        run(scheduler)
        scheduler.finish(0, keep_pages=False)
        for _ in range(4):
            run(scheduler)
        scheduler.finish(1)
        assert scheduler.pages.num_cached == 0
        scheduler.finish(2)
        assert scheduler.pages.num_cached == 2

    def test_after_a_reset_old_pages_are_not_found_and_running_sequences_publish_no_more(self) -> None:
        scheduler = make()
        self.serve(scheduler, 0, prompt(8))
        scheduler.add(1, prompt(3, start=100), max_total_tokens=16)
        run(scheduler)
        scheduler.reset_prefix_cache()
        assert scheduler.pages.num_cached == 0
        for _ in range(6):
            run(scheduler)
        scheduler.finish(1)
        assert (scheduler.pages.num_free, scheduler.pages.num_cached) == (16, 0)
        assert spans(self.serve(scheduler, 2, prompt(9))) == {2: (0, 9)}
        assert spans(self.serve(scheduler, 3, prompt(9))) == {3: (8, 9)}

    def test_a_sequence_that_starts_over_after_a_reset_publishes_again(self) -> None:
        scheduler = make(num_host_pages=6)
        for key in range(3):
            scheduler.add(key, prompt(4, start=10 * key), max_total_tokens=12)
        run(scheduler)
        scheduler.reset_prefix_cache()
        while not run(scheduler).preempted:
            pass
        scheduler.finish(0)
        scheduler.finish(1)
        assert scheduler.pages.num_cached == 0
        assert spans(run(scheduler)) == {2: (0, 9)}
        scheduler.finish(2)
        assert scheduler.pages.num_cached == 2


class TestAfter:
    def test_a_follower_waits_for_the_prompt_and_then_shares_it(self) -> None:
        scheduler = make(max_num_batched_tokens=8)
        scheduler.add(0, prompt(13), max_total_tokens=20)
        scheduler.add(1, prompt(13), max_total_tokens=20, after=0)
        assert spans(run(scheduler)) == {0: (0, 8)}
        assert scheduler.num_waiting == 1
        assert spans(run(scheduler)) == {0: (8, 13)}
        assert spans(run(scheduler)) == {0: (13, 14), 1: (12, 13)}

    def test_a_follower_does_not_hold_back_those_behind_it(self) -> None:
        scheduler = make(max_num_batched_tokens=8)
        scheduler.add(0, prompt(9), max_total_tokens=20)
        scheduler.add(1, prompt(9), max_total_tokens=20, after=0)
        scheduler.add(2, prompt(3, start=50), max_total_tokens=20)
        run(scheduler)
        assert spans(run(scheduler)) == {0: (8, 9), 2: (0, 3)}

    @pytest.mark.parametrize("gone", ["never there", "finished", "cancelled while waiting"])
    def test_a_follower_of_nobody_does_not_wait(self, gone: str) -> None:
        scheduler = make(max_num_seqs=1)
        if gone != "never there":
            scheduler.add(0, prompt(9), max_total_tokens=20)
        if gone == "finished":
            run(scheduler)
            scheduler.finish(0)
        scheduler.add(1, prompt(3), max_total_tokens=20, after=0)
        if gone == "cancelled while waiting":
            scheduler.finish(0)
        assert list(spans(run(scheduler))) == [1]

    def test_a_follower_of_a_computed_prompt_does_not_wait(self) -> None:
        scheduler = make()
        scheduler.add(0, prompt(9), max_total_tokens=20)
        run(scheduler)
        scheduler.add(1, prompt(9), max_total_tokens=20, after=0)
        assert 1 in spans(run(scheduler))

    def test_a_follower_can_be_cancelled_while_it_is_held_back(self) -> None:
        scheduler = make()
        scheduler.add(0, prompt(9), max_total_tokens=20)
        scheduler.add(1, prompt(9), max_total_tokens=20, after=0)
        scheduler.finish(1)
        scheduler.check_integrity()
        assert scheduler.num_waiting == 1
        run(scheduler)
        assert list(spans(run(scheduler))) == [0]


class TestShortage:
    def test_the_youngest_sequence_is_preempted_when_pages_run_out(self) -> None:
        scheduler = make(num_host_pages=6, page_size=4)
        for key in range(3):
            scheduler.add(key, prompt(4, start=10 * key), max_total_tokens=12)
        assert list(spans(run(scheduler))) == [0, 1, 2]  # one page each, and one soon
        for _ in range(4):
            assert list(spans(run(scheduler))) == [0, 1, 2]  # two pages each: the pool is full
        step = run(scheduler)
        assert step.preempted == (2,)
        assert spans(step) == {0: (8, 9), 1: (8, 9)}
        assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
        assert scheduler.num_preemptions_total == 1

    def test_the_lowest_priority_is_preempted_before_the_youngest(self) -> None:
        scheduler = make(num_host_pages=6)
        for key, priority in ((0, 1), (1, 0), (2, 0)):
            scheduler.add(key, prompt(4, start=10 * key), max_total_tokens=12, priority=priority)
        for _ in range(5):
            run(scheduler)
        assert run(scheduler).preempted == (0,)

    def test_a_preempted_sequence_comes_back_before_later_arrivals_with_what_it_generated(self) -> None:
        scheduler = make(num_host_pages=6)
        for key in range(3):
            scheduler.add(key, prompt(4, start=10 * key), max_total_tokens=12)
        scheduler.add(3, prompt(4, start=90), max_total_tokens=12)
        while not run(scheduler).preempted:
            pass
        scheduler.finish(0)
        # Four tokens of prompt and five generated. The others' third pages took both of its own.
        assert spans(run(scheduler)) == {1: (9, 10), 2: (0, 9)}
        assert scheduler.num_waiting == 1

    def test_a_preempted_sequence_resumes_from_its_own_pages_if_they_are_still_cached(self) -> None:
        scheduler = make(num_host_pages=6)
        for key in range(3):
            scheduler.add(key, prompt(4 - key % 2, start=10 * key), max_total_tokens=12, reuse_prefix=False)
        while not run(scheduler).preempted:
            pass
        scheduler.finish(0)
        # Only 0 took a page by now: the tail of 2. Its head is found, though it reuses nobody else's pages.
        assert spans(run(scheduler)) == {1: (8, 9), 2: (4, 9)}
        assert scheduler.num_cached_tokens(2) == 0
        assert scheduler.num_prefix_queries_total == 0

    def test_cached_pages_are_evicted_before_anybody_is_preempted(self) -> None:
        scheduler = make(num_host_pages=4)
        scheduler.add(0, prompt(8), max_total_tokens=8)
        run(scheduler)
        scheduler.finish(0)
        assert scheduler.pages.num_cached == 2
        scheduler.add(1, prompt(8, start=50), max_total_tokens=16)
        for _ in range(8):
            assert run(scheduler).preempted == ()
        assert scheduler.pages.num_cached == 0

    def test_a_prompt_is_not_admitted_into_pages_that_running_sequences_soon_need(self) -> None:
        scheduler = make(num_host_pages=4)
        scheduler.add(0, prompt(8), max_total_tokens=12)
        scheduler.add(1, prompt(4, start=50), max_total_tokens=8)
        assert list(spans(run(scheduler))) == [0]
        assert scheduler.num_waiting == 1

    def test_a_sequence_that_cannot_grow_any_more_is_owed_nothing(self) -> None:
        scheduler = make(num_host_pages=4)
        scheduler.add(0, prompt(7), max_total_tokens=8)
        scheduler.add(1, prompt(7, start=50), max_total_tokens=8)
        assert list(spans(run(scheduler))) == [0, 1]

    def test_one_that_does_not_fit_is_not_overtaken(self) -> None:
        scheduler = make(num_host_pages=4)
        scheduler.add(0, prompt(8), max_total_tokens=8)
        scheduler.add(1, prompt(12, start=50), max_total_tokens=12)
        scheduler.add(2, prompt(2, start=80), max_total_tokens=4)
        assert list(spans(run(scheduler))) == [0]
        scheduler.finish(0)
        assert list(spans(run(scheduler))) == [1, 2]

    def test_the_last_in_order_waits_with_its_pages_instead_of_giving_them_up(self) -> None:
        scheduler = make(num_host_pages=4)
        scheduler.add(0, prompt(3), max_total_tokens=16)
        scheduler.add(1, prompt(4, start=50), max_total_tokens=16)
        for _ in range(5):
            assert list(spans(run(scheduler))) == [0, 1]
        step = run(scheduler)
        assert spans(step) == {0: (7, 8)}
        assert step.preempted == ()
        scheduler.finish(0)
        assert spans(run(scheduler)) == {1: (8, 9)}

    def test_the_last_in_order_computes_the_part_of_its_chunk_that_has_pages(self) -> None:
        scheduler = make(num_host_pages=8, max_num_batched_tokens=3)
        scheduler.add(0, prompt(1), max_total_tokens=20)
        scheduler.add(1, prompt(23, start=50), max_total_tokens=24)
        history = [spans(run(scheduler)) for _ in range(10)]
        # 0 begins with one page, is owed a second and takes a third: 1 is left with five, 20 tokens.
        assert history[-1] == {0: (9, 10), 1: (18, 20)}
        assert spans(run(scheduler)) == {0: (10, 11)}

    def test_an_older_prompt_takes_the_pages_of_a_younger_decode(self) -> None:
        scheduler = make(num_host_pages=6, max_num_batched_tokens=2)
        scheduler.add(1, prompt(1), max_total_tokens=16, priority=1)
        run(scheduler)
        scheduler.add(0, prompt(16, start=50), max_total_tokens=16)
        history = [run(scheduler) for _ in range(14)]
        assert [(spans(step), step.preempted) for step in history if step.preempted] == [
            ({0: (12, 13)}, (1,))
        ]

    def test_a_dropped_step_leaves_nothing_to_undo(self) -> None:
        scheduler = make()
        scheduler.add(0, prompt(5), max_total_tokens=8)
        dropped = scheduler.schedule()
        scheduler.check_integrity()
        assert scheduler.schedule() == dropped

    def test_a_sequence_that_outgrows_its_limit_is_noticed(self) -> None:
        scheduler = make()
        scheduler.add(0, prompt(4), max_total_tokens=4)
        run(scheduler)
        with pytest.raises(AssertionError, match="sequence 0 has 5 tokens and was added for 1 pages"):
            scheduler.schedule()


class TestFinish:
    @pytest.mark.parametrize("state", ["waiting", "running", "preempted"])
    def test_a_sequence_can_be_cancelled_in_every_state(self, state: str) -> None:
        scheduler = make(num_host_pages=4)
        for key in (0, 1):
            scheduler.add(key, prompt(4, start=10 * key), max_total_tokens=16)
        if state != "waiting":
            run(scheduler)
        while state == "preempted" and 1 not in run(scheduler).preempted:
            pass
        scheduler.finish(1)
        scheduler.check_integrity()
        assert list(spans(run(scheduler))) == [0]
        scheduler.finish(0)
        scheduler.check_integrity()
        assert scheduler.pages.num_free + scheduler.pages.num_cached == 4

    def test_an_unknown_sequence_is_a_key_error(self) -> None:
        scheduler = make()
        with pytest.raises(KeyError):
            scheduler.finish(3)
        with pytest.raises(KeyError):
            scheduler.num_cached_tokens(3)

    def test_a_sequence_cancelled_during_the_forward_pass_is_ignored_by_commit(self) -> None:
        scheduler = make()
        for key in (0, 1):
            scheduler.add(key, prompt(5, start=10 * key), max_total_tokens=8)
        step = scheduler.schedule()
        scheduler.finish(0)
        scheduler.commit(step, {0: 1, 1: 1})
        scheduler.check_integrity()
        assert spans(run(scheduler)) == {1: (5, 6)}
