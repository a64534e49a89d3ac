"""Scheduler against a shadow of what its pages hold, through random arrivals, cancellations and shortages.

The shadow carries out each step's moves, writes its tokens into slots and reads every block table back, so a stale
page, a move left out or made too late, a page shared with the wrong sequence, or a page published too early shows
up as wrong content.
"""

import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridgen.scheduler.scheduler import NeverFits, Scheduler
from hybridgen.scheduler.step import PageMove, Step, StepSequence

MAX_MODEL_LEN = 48
VOCABULARY = 3  # few tokens: prompts share prefixes by chance
Content = (
    int  # stands for one token's keys and values: they depend on all tokens before it and on the weights
)


@dataclass
class Shadow:
    """A sequence as the engine would know it."""

    tokens: list[int]
    num_prompt: int
    end: int  # generates up to here, unless cancelled
    salt: bytes
    reuse_prefix: bool
    priority: int
    after: int | None
    max_total_tokens: int
    contents: list[Content] = field(default_factory=list)  # of the computed tokens
    block_table: tuple[int, ...] = ()  # of the last step in which it ran
    running: bool = False
    was_running: bool = False
    furthest: int = 0


def content_after(previous: Content, token: int, weights: int) -> Content:
    return hash((previous, token, weights))


class Walk:
    """Drives one scheduler and checks every step."""

    def __init__(
        self,
        seed: int,
        *,
        num_device_pages: int = 0,
        num_host_pages: int,
        page_size: int,
        caching: bool,
        num_sink_pages: int = 1,
        plain: bool = False,
    ) -> None:
        self.rng = random.Random(seed)
        self.plain = plain  # equal priorities, nobody waits for anybody
        self.num_pages, self.page_size, self.caching = num_device_pages + num_host_pages, page_size, caching
        self.num_device_pages, self.num_sink_pages = num_device_pages, num_sink_pages
        self.max_num_seqs = self.rng.randint(1, 8)
        self.max_num_batched_tokens = self.rng.randint(1, 16)
        self.scheduler = Scheduler(
            num_device_pages=num_device_pages,
            num_host_pages=num_host_pages,
            num_sink_pages=num_sink_pages,
            page_size=page_size,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=MAX_MODEL_LEN,
            enable_prefix_caching=caching,
        )
        self.slots: dict[int, tuple[Content, Content]] = {}  # slot -> (content before it, its content)
        self.alive: dict[int, Shadow] = {}
        self.weights = 0
        self.num_keys = 0
        self.num_steps = 0
        self.num_preempted = 0
        self.num_hits = 0
        self.num_host_hits = 0  # of these, with pages on the host
        self.num_resumed = 0  # preempted sequences that came back with everything computed before
        self.num_moves = 0
        self.num_dropped = 0

    def arrive(self) -> None:
        rng = self.rng
        key, self.num_keys = self.num_keys, self.num_keys + 1
        if self.alive and rng.random() < 0.5:  # a prompt that continues or repeats another
            source = rng.choice(list(self.alive.values())).tokens
            tokens = source[: rng.randint(1, len(source))]
            tokens = tokens + [rng.randrange(VOCABULARY) for _ in range(rng.randint(0, 4))]
        else:
            longest = max(1, self.num_pages * self.page_size // 3)
            tokens = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))]
        max_total = len(tokens) + rng.randint(1, 24)
        salt = rng.choice([b"", b"", b"x"])
        shadow = Shadow(
            tokens=list(tokens),
            num_prompt=len(tokens),
            end=rng.choice([max_total, rng.randint(len(tokens) + 1, max_total)]),
            salt=salt,
            reuse_prefix=rng.random() < 0.8,
            priority=0 if self.plain else rng.choice([0, 0, 0, 1, -1]),
            after=rng.choice(list(self.alive))
            if self.alive and not self.plain and rng.random() < 0.3
            else None,
            max_total_tokens=max_total,
        )
        num_needed = -(-max_total // self.page_size)
        fits = max_total <= MAX_MODEL_LEN and num_needed <= self.num_pages
        if 0 < self.num_device_pages < self.num_pages:
            fits = fits and min(num_needed, self.num_sink_pages + 1) <= self.num_device_pages
        try:
            self.scheduler.add(
                key,
                tokens,
                max_total_tokens=max_total,
                priority=shadow.priority,
                salt=salt,
                reuse_prefix=shadow.reuse_prefix,
                after=shadow.after,
            )
        except NeverFits:
            assert not fits
            return
        assert fits
        if (
            shadow.after is not None
            and self.alive[shadow.after].furthest >= self.alive[shadow.after].num_prompt
        ):
            shadow.after = None
        self.alive[key] = shadow

    def cancel(self) -> None:
        key = self.rng.choice(list(self.alive))
        self.scheduler.finish(key, keep_pages=self.rng.random() < 0.9)
        self.forget(key)

    def forget(self, key: int) -> None:
        del self.alive[key]
        for shadow in self.alive.values():
            if shadow.after == key:
                shadow.after = None

    def replace_weights(self) -> None:
        self.weights += 1
        self.scheduler.reset_prefix_cache()

    def pure_contents(self, shadow: Shadow, end: int) -> list[Content]:
        """What the first `end` tokens' contents are when computed from nothing with today's weights."""
        contents: list[Content] = []
        previous = hash(shadow.salt)
        for token in shadow.tokens[:end]:
            previous = content_after(previous, token, self.weights)
            contents.append(previous)
        return contents

    def split(self) -> None:
        key = self.rng.choice(list(self.alive))
        self.scheduler.set_split(key, self.rng.choice([None, 0, 1, 3, 100]))

    def step(self) -> None:
        num_running_before = sum(shadow.running for shadow in self.alive.values())
        step = self.scheduler.schedule()
        self.scheduler.check_integrity()
        assert bool(step.sequences) == bool(self.alive), "an empty step with sequences alive is a hang"
        self.check_preempted(step)
        self.check_budget(step, num_running_before)
        for part in step.sequences:
            self.begin_part(part)
        if self.rng.random() < 0.05:
            self.num_dropped += 1
            return  # nothing of it was carried out
        self.num_steps += 1
        for move in step.moves:
            self.carry_out(move)
        for part in step.sequences:  # the whole batch writes before anybody reads, as in a forward pass
            self.write(part)
        for part in step.sequences:
            self.read_back(part)
        if self.rng.random() < 0.05 and self.alive:
            self.cancel()  # while the forward pass runs
        self.commit(step)
        self.scheduler.check_integrity()
        self.check_eviction_order()

    def carry_out(self, move: PageMove) -> None:
        source, target, size = move.source, move.target, self.page_size
        assert (source < self.num_device_pages) != (target < self.num_device_pages), (
            f"{move} is within a tier"
        )
        self.num_moves += 1
        for offset in range(size):
            self.slots.pop(target * size + offset, None)
            if source * size + offset in self.slots:
                self.slots[target * size + offset] = self.slots[source * size + offset]

    def check_preempted(self, step: Step) -> None:
        assert not set(step.preempted) & {part.key for part in step.sequences}
        self.num_preempted += len(step.preempted)
        assert self.scheduler.num_preemptions_total == self.num_preempted
        for key in step.preempted:
            shadow = self.alive[key]
            assert shadow.running
            shadow.running = False
            orders = [(other.priority, k) for k, other in self.alive.items() if other.running]
            assert all(order < (shadow.priority, key) for order in orders), "a younger one went on"

    def check_budget(self, step: Step, num_running_before: int) -> None:
        assert step.num_tokens == sum(part.end - part.begin for part in step.sequences)
        assert step.num_tokens <= self.max_num_batched_tokens
        assert len({part.key for part in step.sequences}) == len(step.sequences)
        assert self.scheduler.num_running <= self.max_num_seqs
        running = {key: shadow for key, shadow in self.alive.items() if shadow.running}
        if running:
            first = min(running, key=lambda key: (running[key].priority, key))
            assert first in {part.key for part in step.sequences}, "the first in order did not advance"
        pool = self.scheduler.pages
        assert not (step.preempted and pool.num_free_to_write > len(step.sequences)), (
            "preempted with pages to spare"
        )
        if pool.num_free_to_write > 0:
            decodes = {
                key for key, shadow in running.items() if len(shadow.tokens) - len(shadow.contents) == 1
            }
            assert decodes <= {part.key for part in step.sequences}, (
                "a decode was left out with pages to spare"
            )
        assert num_running_before >= len(step.preempted)

    def begin_part(self, part: StepSequence) -> None:
        shadow = self.alive[part.key]
        assert 0 <= part.begin < part.end <= len(shadow.tokens)
        assert part.samples == (part.end == len(shadow.tokens))
        num_pages = -(-part.end // self.page_size)
        # A dropped step's pages are kept for the next one, which may compute fewer tokens.
        assert len(part.block_table) == num_pages or (len(part.block_table) > num_pages and self.num_dropped)
        num_device = sum(page < self.num_device_pages for page in part.block_table)
        assert part.num_device_pages == num_device
        if not shadow.running:  # admitted by this step: what lies before `begin` was kept or found
            assert shadow.after is None, f"{part.key} did not wait for {shadow.after}"
            if not shadow.reuse_prefix:
                assert part.begin <= shadow.furthest, "positions were skipped that it never computed"
            if not shadow.was_running:
                assert self.scheduler.num_cached_tokens(part.key) == part.begin
            if part.begin > len(shadow.contents):
                assert self.caching
                assert part.begin % self.page_size == 0
                shadow.contents = self.pure_contents(shadow, part.begin)
                self.num_hits += 1
                self.num_host_hits += 0 < self.num_device_pages <= max(part.block_table)
            else:
                self.num_resumed += shadow.was_running and part.begin == len(shadow.contents) > 0
                assert part.begin == len(shadow.contents) or part.begin % self.page_size == 0
                del shadow.contents[part.begin :]
                if self.scheduler._sequences[part.key].publishes:
                    # It may have lost pages of older weights and found others in their place.
                    shadow.contents = self.pure_contents(shadow, part.begin)
            shadow.running = shadow.was_running = True
        elif not self.caching:  # with it an equal page on the host may have taken a page's place
            for old, new in zip(shadow.block_table[: self.num_sink_pages], part.block_table, strict=False):
                assert (old < self.num_device_pages) <= (new < self.num_device_pages), "a sink was demoted"
        shadow.block_table = part.block_table
        assert len(shadow.contents) == part.begin

    def slot(self, part: StepSequence, position: int) -> int:
        return part.block_table[position // self.page_size] * self.page_size + position % self.page_size

    def write(self, part: StepSequence) -> None:
        shadow = self.alive[part.key]
        for position in range(part.begin, part.end):
            previous = shadow.contents[-1] if shadow.contents else hash(shadow.salt)
            content = content_after(previous, shadow.tokens[position], self.weights)
            shadow.contents.append(content)
            slot = self.slot(part, position)
            assert not self.num_device_pages or slot < self.num_device_pages * self.page_size, (
                "written to the host"
            )
            self.slots[slot] = (previous, content)

    def read_back(self, part: StepSequence) -> None:
        found = [self.slots[self.slot(part, position)][1] for position in range(part.end)]
        assert found == self.alive[part.key].contents, (
            f"sequence {part.key} reads somebody else's keys and values"
        )

    def commit(self, step: Step) -> None:
        sampled: dict[int, int] = {}
        for part in step.sequences:
            if part.samples:
                # Often a function of the content, so that equal prefixes go on alike.
                content = self.slots[self.slot(part, part.end - 1)][1]
                sampled[part.key] = self.rng.choice([content, self.rng.getrandbits(8)]) % VOCABULARY
        self.scheduler.commit(step, sampled)
        for part in step.sequences:
            shadow = self.alive.get(part.key)
            if shadow is None:
                continue
            shadow.furthest = max(shadow.furthest, part.end)
            if shadow.furthest >= shadow.num_prompt:
                for other in self.alive.values():
                    if other.after == part.key:
                        other.after = None
            if part.samples:
                shadow.tokens.append(sampled[part.key])
                if len(shadow.tokens) == shadow.end:
                    self.scheduler.finish(part.key)
                    self.forget(part.key)

    def check_eviction_order(self) -> None:
        """Published pages are full and distinct, and cached ones are dropped before what they rest on."""
        pool = self.scheduler.pages
        last = {}
        for page in pool._published.values():
            contents = [self.slots[page.id * self.page_size + offset] for offset in range(self.page_size)]
            for (_, content), (previous, _) in pairwise(contents):
                assert content == previous, f"page {page.id} is published half written"
            last[contents[-1][1]] = page
        assert len(last) == len(pool._published), "two published pages have the same content"
        for page in last.values():
            parent = last.get(self.slots[page.id * self.page_size][0])
            if parent is None or page.holders:
                continue
            assert parent.holders or page.last_used < parent.last_used, (
                f"page {parent.id} would go before page {page.id}, which rests on it"
            )

    def drain(self) -> None:
        """Every sequence ends, within the bound that the scheduler's docstring argues for."""
        # While the first in order is not admitted nobody else is, and the running ones end one after the
        # other; then it runs to its end undisturbed. So each of n sequences costs at most the sum of lengths.
        total = sum(shadow.max_total_tokens for shadow in self.alive.values())
        bound = self.num_steps + len(self.alive) * total
        while self.alive:
            self.step()
            assert self.num_steps <= bound, f"{len(self.alive)} sequences starve"
        assert self.scheduler.pages.num_free + self.scheduler.pages.num_cached == self.num_pages
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)


def random_walk(walk: Walk, num_events: int) -> None:
    rng = walk.rng
    for _ in range(num_events):
        draw = rng.random()
        if draw < 0.25 and len(walk.alive) < 12:
            walk.arrive()
        elif draw < 0.27 and walk.alive:
            walk.cancel()
        elif draw < 0.275:
            walk.replace_weights()
        elif draw < 0.29 and walk.alive:
            walk.split()
        else:
            walk.step()
        walk.scheduler.check_integrity()
    walk.drain()


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    seed=st.integers(0, 2**32),
    num_device_pages=st.integers(0, 14),
    num_host_pages=st.integers(0, 14),
    num_sink_pages=st.integers(0, 3),
    page_size=st.integers(1, 5),
    caching=st.booleans(),
    num_events=st.integers(0, 200),
)
def test_every_sequence_reads_its_own_keys_and_values_and_ends(
    seed: int,
    num_device_pages: int,
    num_host_pages: int,
    num_sink_pages: int,
    page_size: int,
    caching: bool,
    num_events: int,
) -> None:
    walk = Walk(
        seed,
        num_device_pages=num_device_pages,
        num_host_pages=max(num_host_pages, num_device_pages == 0),
        num_sink_pages=num_sink_pages,
        page_size=page_size,
        caching=caching,
    )
    random_walk(walk, num_events)


@pytest.mark.parametrize("num_device_pages", [0, 3, 7, 10])
@pytest.mark.parametrize("seed", range(8))
def test_without_priorities_the_steps_are_at_most_the_sum_of_the_lengths(
    seed: int, num_device_pages: int
) -> None:
    walk = Walk(
        seed,
        num_device_pages=num_device_pages,
        num_host_pages=10 - num_device_pages,
        page_size=4,
        caching=seed % 4 > 0,
        plain=True,
    )
    for _ in range(15):
        walk.arrive()
    bound = sum(shadow.max_total_tokens for shadow in walk.alive.values())
    walk.drain()
    assert walk.num_steps <= bound


@pytest.mark.parametrize("num_device_pages", [0, 4, 9])
def test_the_walk_meets_preemption_and_prefix_hits(num_device_pages: int) -> None:
    num_host_pages = 9 - num_device_pages
    walk = Walk(
        3, num_device_pages=num_device_pages, num_host_pages=num_host_pages, page_size=3, caching=True
    )
    random_walk(walk, 3000)
    assert walk.num_preempted > 10
    assert walk.num_hits > 15


def test_the_walk_meets_moves_both_ways_and_resumption_without_recomputing() -> None:
    # Sinks are most of the device here, so that sequences that outgrow them are preempted for want of it alone.
    walk = Walk(5, num_device_pages=6, num_host_pages=80, num_sink_pages=4, page_size=2, caching=True)
    random_walk(walk, 3000)
    assert walk.num_host_hits > 20
    assert walk.num_resumed > 2
    assert walk.scheduler.pages.num_demoted_total > 500
    assert walk.scheduler.pages.num_promoted_total > 2
