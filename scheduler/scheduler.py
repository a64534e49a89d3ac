"""Queues to Step: which tokens of which sequences the next forward pass computes. No tensors, no clock.

There is no prefill phase and no decode phase. A sequence has known tokens (its prompt, then what was
sampled) and computed tokens (those whose keys and values lie in its pages) and tries to catch up. A decode
is a sequence one token behind; a prompt, a prompt whose head was found in the prefix cache, and a sequence
that lost its pages are the same case, further behind.

How a step's tokens are shared out, and why nothing starves:

- Sequences are ordered by priority (lower first), then by arrival. Running ones come before waiting ones, and those
  that wait with pages, because they were preempted, come after every running one.
- Every decode gets its token. What is left of the budget goes to the sequences further behind, oldest
  first. A sequence is admitted only while tokens are left, so no more run than there are tokens in the
  budget, and the oldest of those further behind always gets one too.
- A page to write to is found, in this order, by
    1. demoting or dropping a cached one (least recently used first);
    2. demoting a page of a preempted sequence, then the oldest of the running sequence with the most device pages,
       except sinks (its first pages) and what is written in this step;
    3. where the host has no room for that, taking the last page of the last preempted sequence, which will compute
       those tokens again;
    4. preempting the last running sequence: it waits with its pages, which are then open to 2 and 3.
  Only the first page that a sequence needs in a step preempts others; for a longer chunk it takes what there is.
- A sequence that is itself the last takes the pages there are, or waits a step with what it has. So the first running
  sequence can have every page it needs (`add` made sure that they exist), is never preempted, and ends.
- Waiting sequences are admitted strictly in order: the first that does not fit holds back the others. It
  fits at the latest when nothing runs. Hence every sequence ends, as long as its betters stop arriving.
"""

from array import array
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from hybridgen.scheduler.pages import BlockTable, Page, PagePool
from hybridgen.scheduler.prefix import HashChain
from hybridgen.scheduler.step import Step, StepSequence


class NeverFits(Exception):
    """The sequence could not be completed even alone; it was not added. Refuse it and show the message."""


@dataclass(slots=True, eq=False)
class _Sequence:
    key: int
    order: tuple[int, int]  # (priority, arrival), unique
    tokens: "array[int]"  # known tokens
    num_prompt: int
    max_total_pages: int
    chain: HashChain
    reuse_prefix: bool
    state: Literal["held back", "waiting", "running"] = "waiting"
    leader: int = -1  # while held back: the key whose prompt is to be computed first
    computed: int = 0  # the first `computed` tokens have keys and values in `table`
    furthest: int = 0  # the largest `computed` there has been; giving up pages does not lower it
    table: BlockTable = field(default_factory=BlockTable)  # empty unless running or preempted
    num_published: int = 0  # leading pages that the prefix cache knows
    publishes: bool = True
    num_cached_tokens: int = 0
    admitted_before: bool = False
    split: int | None = None  # device pages to keep; None: as many as there is room for
    num_device_before: int = 0  # device pages that it had when it was preempted; 0 once it runs again


_order = attrgetter("order")


class Scheduler:
    """Sequences and the pages they hold on two tiers.

    Use: `step = schedule()`, run it, `commit(step, sampled)`, then `finish` what has ended. To run a step is to carry
    out its moves, then its forward pass. A step that is dropped instead, nothing of it being carried out, leaves
    nothing to undo: `schedule` gives out pages but advances no counts, and its moves come again with the next step.

    Invariants (`check_integrity`):
        only running and preempted sequences hold pages, and these cover their computed tokens;
        `_waiting`, `_parked` and `_running` are sorted by order; `_parked` are those of `_waiting` that hold pages,
        and come after all of `_running`;
        with prefix caching, every page that a running sequence has filled was published under its digest.

    Args:
        num_device_pages, num_host_pages: either may be 0. Without device pages tokens are written to host pages.
        num_sink_pages: the first pages of a running sequence that stay on the device.
    """

    def __init__(
        self,
        *,
        num_device_pages: int = 0,
        num_host_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        num_sink_pages: int = 1,
        enable_prefix_caching: bool = True,
    ) -> None:
        for name, value in (
            ("page_size", page_size),
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("max_model_len", max_model_len),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if num_sink_pages < 0:
            raise ValueError(f"num_sink_pages is {num_sink_pages}; it must be at least 0")
        self._pool = PagePool(num_device_pages=num_device_pages, num_host_pages=num_host_pages)
        self._page_size = page_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._num_sinks = num_sink_pages
        self._enable_prefix_caching = enable_prefix_caching
        self._sequences: dict[int, _Sequence] = {}
        self._running: list[_Sequence] = []
        self._waiting: list[_Sequence] = []
        self._parked: list[_Sequence] = []  # preempted, waiting with pages
        self._held_back: dict[int, list[_Sequence]] = {}  # by the key they wait for
        self._max_running = max_num_seqs
        self._heat: Mapping[int, float] = {}
        self._num_arrivals = 0
        self.num_preemptions_total = 0
        self.num_prefix_queries_total = 0  # tokens looked up, once for each sequence
        self.num_prefix_hits_total = 0  # tokens of these found

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - len(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_parked(self) -> int:
        """Preempted sequences that wait with pages."""
        return len(self._parked)

    @property
    def pages(self) -> PagePool:
        """To read counts from."""
        return self._pool

    def num_cached_tokens(self, key: int) -> int:
        """Prompt tokens found in the prefix cache when the sequence was first admitted; 0 before that."""
        return self._sequences[key].num_cached_tokens

    def add(
        self,
        key: int,
        tokens: Sequence[int],
        *,
        max_total_tokens: int,
        priority: int = 0,
        salt: bytes = b"",
        reuse_prefix: bool = True,
        after: int | None = None,
    ) -> None:
        """Queue a sequence.

        Args:
            key: unique for the life of the scheduler.
            tokens: the prompt, at least one token.
            max_total_tokens: prompt and generated tokens together will not exceed this.
            priority: lower is served earlier.
            salt: sequences share cached pages only if their salts are equal.
            reuse_prefix: False computes every token itself, for callers that need something of each position.
            after: not admitted before this sequence's prompt is computed, or the sequence is gone.

        Raises NeverFits, routinely.
        """
        if key in self._sequences:
            raise ValueError(f"sequence {key} exists already")
        if not 1 <= len(tokens) <= max_total_tokens:
            raise ValueError(f"{len(tokens)} prompt tokens, max_total_tokens {max_total_tokens}")
        if max_total_tokens > self._max_model_len:
            raise NeverFits(
                f"prompt and completion may reach {max_total_tokens} tokens, the limit is"
                f" {self._max_model_len} (max_model_len)"
            )
        max_total_pages = self._num_pages_for(max_total_tokens)
        self._check_fits(max_total_tokens, max_total_pages)
        seq = _Sequence(
            key=key,
            order=(priority, self._num_arrivals),
            tokens=array("I", tokens),
            num_prompt=len(tokens),
            max_total_pages=max_total_pages,
            chain=HashChain(salt, self._page_size),
            reuse_prefix=reuse_prefix,
        )
        self._num_arrivals += 1
        self._sequences[key] = seq
        leader = self._sequences.get(after) if after is not None else None
        if leader is not None and leader.furthest < leader.num_prompt:
            seq.state, seq.leader = "held back", leader.key
            self._held_back.setdefault(leader.key, []).append(seq)
        else:
            insort(self._waiting, seq, key=_order)

    def _check_fits(self, num_tokens: int, num_pages: int) -> None:
        pool = self._pool
        if num_pages > pool.num_pages:
            raise NeverFits(
                f"prompt and completion may reach {num_tokens} tokens, that is {num_pages} pages"
                f" of {self._page_size} tokens; the KV cache has {pool.num_pages} pages"
                f" ({pool.num_pages * self._page_size} tokens)"
            )
        num_fixed = min(num_pages, self._num_sinks + 1)
        if pool.has_both_tiers and num_fixed > pool.num_device_pages:
            raise NeverFits(
                f"prompt and completion may reach {num_tokens} tokens, which takes {num_fixed} device pages at a time"
                f" ({self._num_sinks} that stay and one to write to); there are {pool.num_device_pages}"
            )

    def set_split(self, key: int, num_device_pages: int | None) -> None:
        """How many of its pages a sequence is to have on the device from now on; None: as many as fit.

        It keeps its sinks and the pages it writes to in any case. `schedule` moves pages towards this number as far
        as there are pages that nobody holds; those that it shares stay where they are.
        """
        self._sequences[key].split = num_device_pages

    def has(self, key: int) -> bool:
        """Whether there is a sequence of this key."""
        return key in self._sequences

    def limit_running(self, max_running: int) -> None:
        """Admit no sequence beyond this many, at least one and at most `max_num_seqs`; those that run go on."""
        self._max_running = max(1, min(max_running, self._max_num_seqs))

    def set_heat(self, heat: Mapping[int, float]) -> None:
        """Which host pages are hot: page id to softmax mass for all readers. Pages that are not named are cold.

        Of a sequence's host pages the hottest come back to the device first, and the most recent of those alike.
        """
        self._heat = heat

    def schedule(self) -> Step:
        """Choose the next step. It is empty only when there are no sequences."""
        spans: list[tuple[_Sequence, int, int]] = []
        preempted: list[int] = []
        spare = self._num_spare_device_pages()
        budget, spare = self._schedule_running(spans, preempted, spare)
        # Whoever was preempted comes back when there is room again; a step that had to preempt has none.
        if not preempted:
            self._admit(spans, budget, spare)
        self._move_towards_splits()
        # Last, since taking pages for one sequence moves those of others.
        parts = tuple(
            StepSequence(
                seq.key, begin, end, seq.table.ids, seq.table.num_device_pages, end == len(seq.tokens)
            )
            for seq, begin, end in spans
        )
        return Step(
            sequences=parts,
            moves=tuple(self._pool.moves),
            preempted=tuple(preempted),
            num_tokens=sum(part.end - part.begin for part in parts),
        )

    def _schedule_running(
        self, spans: list[tuple[_Sequence, int, int]], preempted: list[int], spare: int
    ) -> tuple[int, int]:
        """Returns what is left of the tokens and of the spare device pages."""
        running = self._running
        num_decodes = sum(len(seq.tokens) - seq.computed == 1 for seq in running)
        budget = self._max_num_batched_tokens - num_decodes
        assert len(running) <= self._max_num_batched_tokens, f"{len(running)} run, some without a token"
        index = 0
        while index < len(running):  # preemption shortens the list from behind
            seq = running[index]
            index += 1
            begin, num_known = seq.computed, len(seq.tokens)
            if num_known - begin == 1:
                end = self._provide(seq, num_known, preempted)
            elif budget > 0:
                end, num_extra = self._provide_chunk(seq, begin + budget, preempted, spare)
                spare -= num_extra
                budget -= end - begin
            else:
                continue
            if end > begin:
                spans.append((seq, begin, end))
        return budget, spare

    def _provide(self, seq: _Sequence, end: int, preempted: list[int] | None) -> int:
        """Give the sequence pages to write to for the tokens up to `end`; returns how far they reach.

        Whoever is preempted for the first of them is added to `preempted`; None preempts nobody.
        """
        pool, page_size = self._pool, self._page_size
        first, num_wanted = seq.computed // page_size, self._num_pages_for(end)
        assert num_wanted <= seq.max_total_pages, (
            f"sequence {seq.key} has {len(seq.tokens)} tokens and was added for {seq.max_total_pages} pages"
        )
        pages = seq.table.pages
        for index in range(first, num_wanted):
            if index < len(pages) and pool.can_write(pages[index]):
                continue
            if not self._make_room(seq, preempted if index == first else None):
                return max(seq.computed, index * page_size)
            if index < len(pages):
                pool.promote(pages[index])
            else:
                pool.grow(seq.table)
        return end

    def _provide_chunk(
        self, seq: _Sequence, limit: int, preempted: list[int] | None, spare: int
    ) -> tuple[int, int]:
        """`_provide` for as much as is known up to `limit`, taking up to `spare` pages beyond those it always has.

        Returns how far the pages reach, and how many of the spare ones were taken.
        """
        pages = seq.table.pages
        num_fixed = self._first_to_write(seq, pages) + self._num_device_pages_to_write(seq, pages)
        num_writable = max(num_fixed, len(pages))
        end = min(len(seq.tokens), limit, (num_writable + spare) * self._page_size)
        end = self._provide(seq, end, preempted)
        return end, max(0, len(pages) - num_writable)

    def _make_room(self, seq: _Sequence, preempted: list[int] | None) -> bool:
        """Have a free page to write to; the module's docstring has the order. False: there is none to be had."""
        pool, running = self._pool, self._running
        while not pool.num_free_to_write:
            if pool.reclaim_cached() or self._demote_one():
                continue
            if not pool.has_room_to_demote and self._parked:
                self._give_up_page(self._parked[-1])
                continue
            if preempted is None or running[-1] is seq:
                return False
            victim = running.pop()
            self._preempt(victim)
            preempted.append(victim.key)
        return True

    def _demote_one(self) -> bool:
        """Demote a held device page if there is one that may go and a place for it."""
        if not self._pool.has_room_to_demote:
            return False
        page = self._page_to_demote()
        if page is None:
            return False
        self._pool.demote(page)
        return True

    def _page_to_demote(self) -> Page | None:
        pool, num_sinks = self._pool, self._num_sinks
        for seq in reversed(self._parked):
            if not seq.table.num_device_pages:
                continue
            pages = seq.table.pages
            page = pool.oldest_device_page(seq.table, num_sinks, len(pages))
            if page is not None:
                return page
            for page in pages[:num_sinks]:
                # It may be a sink of a running sequence too.
                if page.num_active == 0 and pool.is_on_device(page):
                    return page
        found, num_most = None, 0
        for seq in self._running:
            if seq.table.num_device_pages > num_most:
                page = self._oldest_movable_page(seq)
                if page is not None:
                    found, num_most = page, seq.table.num_device_pages
        return found

    def _oldest_movable_page(self, seq: _Sequence) -> Page | None:
        """Its first device page after the sinks and before those that it writes to."""
        num_full = min(seq.computed // self._page_size, len(seq.table.pages))
        return self._pool.oldest_device_page(seq.table, self._num_sinks, num_full)

    def _preempt(self, seq: _Sequence) -> None:
        self._pool.truncate(seq.table, self._num_pages_for(seq.computed))  # a dropped step may have left more
        self._pool.park(seq.table)
        seq.state = "waiting"
        seq.num_device_before = seq.table.num_device_pages
        insort(self._waiting, seq, key=_order)
        if seq.table.pages:
            insort(self._parked, seq, key=_order)
        self.num_preemptions_total += 1

    def _give_up_page(self, seq: _Sequence) -> None:
        """Take the last page from a preempted sequence."""
        num_left = len(seq.table.pages) - 1
        self._pool.truncate(seq.table, num_left)
        seq.computed = min(seq.computed, num_left * self._page_size)
        seq.num_published = min(seq.num_published, num_left)
        if not num_left:
            self._parked.remove(seq)

    def _admit(self, spans: list[tuple[_Sequence, int, int]], budget: int, spare: int) -> None:
        """Admit waiting sequences while all of their known tokens fit beside what the running ones soon need.

        Only the first chunk's pages are taken now. The wider look keeps a prompt from being computed by
        halves, preempted for the next page of an older sequence, and computed again.
        """
        if budget == 0 or not self._waiting or len(self._running) >= self._max_running:
            return
        pool = self._pool
        owed = sum(max(0, self._num_pages_soon(seq) - len(seq.table.pages)) for seq in self._running)
        while budget > 0 and self._waiting and len(self._running) < self._max_running:
            seq = self._waiting[0]
            num_soon = self._num_pages_soon(seq)
            if num_soon - len(seq.table.pages) > 0 and owed >= pool.num_reclaimable:
                return  # at least its last token needs a page of its own; do not even look up its prefix
            hits = self._find_prefix(seq)
            pages = [*seq.table.pages, *hits]
            # Preempted sequences other than this one come after it, so it may take their pages.
            num_claimed = sum(page.num_active == 0 for page in pages)
            num_fixed = self._num_fixed_device_pages(seq, pages) if pool.has_both_tiers else 0
            # A page to write to that comes back from the host takes another one for the time of the move.
            num_needed = (
                num_soon - len(pages) + (not all(map(pool.can_write, self._pages_to_write(seq, pages))))
            )
            if num_needed > pool.num_reclaimable - num_claimed - owed or num_fixed > spare:
                return
            self._start(seq, hits)
            begin = seq.computed
            end, num_extra = self._provide_chunk(seq, begin + budget, None, spare - num_fixed)
            spare -= num_fixed + num_extra
            owed += max(0, num_soon - len(seq.table.pages))
            if end > begin:
                budget -= end - begin
                spans.append((seq, begin, end))

    def _start(self, seq: _Sequence, hits: Sequence[Page]) -> None:
        del self._waiting[0]
        if seq.table.pages:
            self._parked.remove(seq)
        else:
            seq.publishes = True
        if seq.table.is_parked:
            self._pool.unpark(seq.table)
        self._pool.extend(seq.table, hits)
        if hits:
            seq.computed = len(seq.table.pages) * self._page_size
            seq.num_published = len(seq.table.pages)
        seq.state = "running"
        insort(self._running, seq, key=_order)
        if not seq.admitted_before:
            seq.admitted_before = True
            seq.num_cached_tokens = seq.computed
            if self._enable_prefix_caching and seq.reuse_prefix:
                self.num_prefix_queries_total += seq.num_prompt
                self.num_prefix_hits_total += seq.computed

    def _find_prefix(self, seq: _Sequence) -> tuple[Page, ...]:
        """Cached pages to go on from, after those it holds. Never all tokens: the last one must be computed
        to sample from it."""
        num_held = len(seq.table.pages)
        if not self._enable_prefix_caching or seq.computed < num_held * self._page_size:
            return ()
        if num_held and not seq.publishes:
            return ()  # its own pages are of other weights, or suspect
        # Without reuse, what it computed itself before it was preempted may still be picked up again.
        limit = len(seq.tokens) - 1 if seq.reuse_prefix else min(len(seq.tokens) - 1, seq.furthest)
        return self._pool.match(seq.chain.digests(num_held, limit // self._page_size, seq.tokens))

    def _num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _num_pages_soon(self, seq: _Sequence) -> int:
        """Pages for its known tokens and, if it can grow so far, one for those to be generated next."""
        return min(self._num_pages_for(len(seq.tokens)) + 1, seq.max_total_pages)

    def _num_spare_device_pages(self) -> int:
        """Device pages beyond those that the running sequences cannot do without in this step.

        A long chunk takes no more than these and the first page that it needs: else it would preempt the decodes that
        come after it, only to wait for them later. With one tier all pages are alike, and spare.
        """
        pool = self._pool
        if not pool.has_both_tiers:
            return pool.num_pages
        sinks = {page for seq in self._running for page in self._device_sinks(seq, seq.table.pages)}
        num_to_write = sum(self._num_device_pages_to_write(seq, seq.table.pages) for seq in self._running)
        return max(0, pool.num_device_pages - len(sinks) - num_to_write)

    def _num_fixed_device_pages(self, seq: _Sequence, pages: Sequence[Page]) -> int:
        """Device pages that a sequence cannot do without if it goes on from `pages`."""
        return len(self._device_sinks(seq, pages)) + self._num_device_pages_to_write(seq, pages)

    def _device_sinks(self, seq: _Sequence, pages: Sequence[Page]) -> list[Page]:
        """Its full sinks that are device pages; a prefix hit on the host stays there."""
        num_full = self._first_to_write(seq, pages)
        return [page for page in pages[: min(self._num_sinks, num_full)] if self._pool.is_on_device(page)]

    def _num_device_pages_to_write(self, seq: _Sequence, pages: Sequence[Page]) -> int:
        """Its sinks that are not full, and one page to write to after them."""
        num_soon = self._num_pages_soon(seq)
        num_full = self._first_to_write(seq, pages)
        return max(0, min(self._num_sinks, num_soon) - num_full) + (num_soon > self._num_sinks)

    def _pages_to_write(self, seq: _Sequence, pages: Sequence[Page]) -> Sequence[Page]:
        """Of these pages the one that is not full, if any."""
        return pages[self._first_to_write(seq, pages) :]

    def _first_to_write(self, seq: _Sequence, pages: Sequence[Page]) -> int:
        """The index of the page that its next token goes to, once it holds `pages`: its own, then prefix hits."""
        return seq.computed // self._page_size if len(pages) == len(seq.table.pages) else len(pages)

    def _move_towards_splits(self) -> None:
        if not self._pool.has_both_tiers:
            return
        for seq in self._running:
            if seq.split is not None:
                self._demote_oldest(seq, seq.table.num_device_pages - seq.split)
        for seq in self._running:
            # Back from preemption a sequence gets as many device pages as it had; prefix hits stay where they are.
            wanted = seq.num_device_before if seq.split is None else seq.split
            self._promote_hottest(seq, wanted - seq.table.num_device_pages)
            seq.num_device_before = 0

    def _demote_oldest(self, seq: _Sequence, num_pages: int) -> None:
        """Move up to so many of its device pages, the oldest first, to free host pages."""
        pool = self._pool
        num_pages = min(num_pages, pool.num_free_host)
        if num_pages <= 0:
            return
        full = seq.table.pages[self._num_sinks : seq.computed // self._page_size]
        movable = [page for page in full if pool.is_on_device(page) and len(page.holders) == 1]
        for page in movable[:num_pages]:
            pool.demote(page)

    def _promote_hottest(self, seq: _Sequence, num_pages: int) -> None:
        """Move up to so many of its host pages, the hottest and then the most recent first, to device pages that nobody
        holds.

        One such page for each running sequence is left to grow into.
        """
        pool = self._pool
        num_pages = min(num_pages, pool.num_free_device + pool.num_cached_device - len(self._running))
        if num_pages <= 0:
            return
        movable = [page for page in seq.table.pages if not pool.is_on_device(page) and len(page.holders) == 1]
        movable.sort(key=lambda page: self._heat.get(page.id, 0.0))  # stable: those alike stay in their order
        for page in movable[-num_pages:]:
            if not pool.num_free_device:
                pool.reclaim_cached()
            pool.promote(page)

    def commit(self, step: Step, sampled: Mapping[int, int]) -> None:
        """Record that `step`, the latest one scheduled, was carried out, its moves included.

        Pages filled by it are published. If another sequence has published the same content, this one's block
        table changes to that page from the next step on: entries for computed tokens are not append-only.

        Args:
            sampled: key -> token, for each sequence of the step that samples. Sequences finished since
                `schedule` are ignored.
        """
        assert list(step.moves) == self._pool.moves, (
            f"the step has {len(step.moves)} moves, {len(self._pool.moves)} are to be made: not the latest step"
        )
        self._pool.moves.clear()
        page_size = self._page_size
        for part in step.sequences:
            seq = self._sequences.get(part.key)
            if seq is None:
                continue
            assert seq.computed == part.begin, (
                f"sequence {seq.key} has {seq.computed} computed tokens, the step begins at {part.begin}"
            )
            if part.samples:
                seq.tokens.append(sampled[part.key])
            seq.computed = part.end
            if part.end > seq.furthest:
                seq.furthest = part.end
            if part.end // page_size > seq.num_published:
                self._publish(seq)
            if seq.key in self._held_back and seq.furthest >= seq.num_prompt:
                self._release_followers(seq.key)

    def _publish(self, seq: _Sequence) -> None:
        if not self._enable_prefix_caching or not seq.publishes:
            return
        num_full = seq.computed // self._page_size
        for index in range(seq.num_published, num_full):
            self._pool.publish(seq.table, index, seq.chain.digest(index, seq.tokens))
        seq.num_published = num_full

    def _release_followers(self, key: int) -> None:
        for seq in self._held_back.pop(key, ()):
            seq.state = "waiting"
            insort(self._waiting, seq, key=_order)

    def finish(self, key: int, *, keep_pages: bool = True) -> None:
        """Forget a sequence, ended or cancelled, whatever its state. Its full pages stay as cached prefixes.

        With `keep_pages` false they are withdrawn instead: for a sequence whose keys and values are suspect,
        say because they gave NaN. Raises KeyError if there is no such sequence.
        """
        seq = self._sequences.pop(key)
        if not keep_pages and seq.table.pages:
            self._withdraw(seq)
        if seq.state == "held back":
            followers = self._held_back[seq.leader]
            followers.remove(seq)
            if not followers:
                del self._held_back[seq.leader]
        else:
            queue = self._running if seq.state == "running" else self._waiting
            del queue[bisect_left(queue, seq.order, key=_order)]
        if seq.state == "waiting" and seq.table.pages:
            self._parked.remove(seq)
        self._pool.truncate(seq.table, 0)
        self._release_followers(key)

    def _withdraw(self, suspect: _Sequence) -> None:
        for seq in (*self._running, *self._parked):
            # Shared pages are a common head, so whoever shares any shares the first, and rests on it.
            if seq.table.pages and seq.table.pages[0] is suspect.table.pages[0]:
                self._pool.withdraw(seq.table)
                seq.publishes = False

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix, say because the weights changed. Running and preempted sequences go on.

        What these compute from now on rests on older pages, so they publish nothing more.
        """
        self._pool.forget()
        for seq in (*self._running, *self._parked):
            seq.publishes = False

    def check_integrity(self) -> None:
        """Raise AssertionError, with the numbers, if the queues and the pages disagree. O(pages)."""
        self._pool.check_integrity(seq.table for seq in (*self._running, *self._parked))
        held_back = [seq for followers in self._held_back.values() for seq in followers]
        queues = {"running": self._running, "waiting": self._waiting, "held back": held_back}
        for state, queue in queues.items():
            for seq in queue:
                assert self._sequences.get(seq.key) is seq, f"{state} sequence {seq.key} is gone"
                assert seq.state == state, f"sequence {seq.key} is {seq.state} in the {state} queue"
                covered = len(seq.table.pages) * self._page_size
                assert seq.computed <= covered, (
                    f"sequence {seq.key}: {seq.computed} computed tokens, pages for {covered}"
                )
                assert seq.computed < len(seq.tokens), (
                    f"sequence {seq.key}: {seq.computed} computed of {len(seq.tokens)} known tokens"
                )
                if state == "running":
                    assert not seq.table.is_parked, f"running sequence {seq.key} counts as parked"
                if state == "held back":
                    assert not seq.table.pages, f"held back sequence {seq.key} holds {covered} tokens"
        assert self._parked == [seq for seq in self._waiting if seq.table.pages], (
            f"{len(self._parked)} parked, {sum(bool(seq.table.pages) for seq in self._waiting)} wait with pages"
        )
        assert all(seq.table.is_parked for seq in self._parked), "a waiting sequence counts as active"
        num_queued = len(self._running) + len(self._waiting) + len(held_back)
        assert num_queued == len(self._sequences), f"{num_queued} queued, {len(self._sequences)} known"
        for queue in (self._running, self._waiting, [*self._running, *self._parked]):
            orders = [seq.order for seq in queue]
            assert orders == sorted(orders), f"a queue is out of order: {orders}"
