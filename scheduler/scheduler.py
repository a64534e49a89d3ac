"""Queues to Step: which tokens of which sequences the next forward pass computes. No tensors, no clock.

There is no prefill phase and no decode phase. A sequence has known tokens (its prompt, then what was
sampled) and computed tokens (those whose keys and values lie in its pages) and tries to catch up. A decode
is a sequence one token behind; a prompt, a prompt whose head was found in the prefix cache, and a sequence
that lost its pages are the same case, further behind.

How a step's tokens are shared out, and why nothing starves:

- Sequences are ordered by priority (lower first), then by arrival. Running ones come before waiting ones.
- Every decode gets its token. What is left of the budget goes to the sequences further behind, oldest
  first. A sequence is admitted only while tokens are left, so no more run than there are tokens in the
  budget, and the oldest of those further behind always gets one too.
- Pages are found by evicting cached ones, then by preempting from the back of the order. A sequence that
  is itself the last takes the pages there are, or waits a step with what it has. So the first running
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

from hybridgen.scheduler.pages import PagePool
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
    computed: int = 0  # the first `computed` tokens have keys and values in `pages`; 0 unless running
    furthest: int = 0  # the largest `computed` there has been; preemption does not lower it
    pages: tuple[int, ...] = field(default=())  # the block table; empty unless running
    num_published: int = 0  # leading pages that the prefix cache knows
    publishes: bool = True
    num_cached_tokens: int = 0
    admitted_before: bool = False


_order = attrgetter("order")


class Scheduler:
    """Sequences and the pages they hold on one tier.

    Use: `step = schedule()`, run it, `commit(step, sampled)`, then `finish` what has ended. A step that is
    dropped instead of committed leaves nothing to undo: `schedule` gives out pages but advances no counts.

    Invariants (`check_integrity`):
        only running sequences hold pages, and these cover their computed tokens;
        `_waiting` and `_running` are sorted by order;
        with prefix caching, every page that a running sequence has filled was published under its digest.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
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
        self._pool = PagePool(num_pages)
        self._page_size = page_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._enable_prefix_caching = enable_prefix_caching
        self._sequences: dict[int, _Sequence] = {}
        self._running: list[_Sequence] = []
        self._waiting: list[_Sequence] = []
        self._held_back: dict[int, list[_Sequence]] = {}  # by the key they wait for
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
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def num_free_pages(self) -> int:
        return self._pool.num_free

    @property
    def num_cached_pages(self) -> int:
        return self._pool.num_cached

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
        if max_total_pages > self._pool.num_pages:
            raise NeverFits(
                f"prompt and completion may reach {max_total_tokens} tokens, that is {max_total_pages} pages"
                f" of {self._page_size} tokens; the KV cache has {self._pool.num_pages} pages"
                f" ({self._pool.num_pages * self._page_size} tokens)"
            )
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

    def schedule(self) -> Step:
        """Choose the next step. It is empty only when there are no sequences."""
        parts: list[StepSequence] = []
        preempted: list[int] = []
        budget = self._schedule_running(parts, preempted)
        # Whoever was preempted comes back when there is room again; a step that had to preempt has none.
        if not preempted:
            self._admit(parts, budget)
        return Step(
            sequences=tuple(parts),
            preempted=tuple(preempted),
            num_tokens=sum(part.end - part.begin for part in parts),
        )

    def _schedule_running(self, parts: list[StepSequence], preempted: list[int]) -> int:
        """Returns the tokens left of the budget."""
        running, pool, page_size = self._running, self._pool, self._page_size
        num_decodes = sum(len(seq.tokens) - seq.computed == 1 for seq in running)
        budget = self._max_num_batched_tokens - num_decodes
        assert len(running) <= self._max_num_batched_tokens, f"{len(running)} run, some without a token"
        index = 0
        while index < len(running):  # preemption shortens the list from behind
            seq = running[index]
            index += 1
            begin, num_known, num_held = seq.computed, len(seq.tokens), len(seq.pages)
            decodes = num_known - begin == 1
            end = num_known if decodes else min(num_known, begin + budget)
            if end > num_held * page_size:
                num_missing = self._num_pages_for(end) - num_held
                assert num_held + num_missing <= seq.max_total_pages, (
                    f"sequence {seq.key} has {num_known} tokens and was added for {seq.max_total_pages} pages"
                )
                while num_missing > pool.num_available and running[-1] is not seq:
                    victim = running.pop()
                    self._preempt(victim)
                    preempted.append(victim.key)
                if num_missing > pool.num_available:
                    num_missing = pool.num_available
                    end = (num_held + num_missing) * page_size
                seq.pages += pool.allocate(num_missing)
            if end <= begin:
                continue
            if not decodes:
                budget -= end - begin
            parts.append(StepSequence(seq.key, begin, end, seq.pages, end == num_known))
        return budget

    def _preempt(self, seq: _Sequence) -> None:
        self._give_up_pages(seq)
        seq.state = "waiting"
        insort(self._waiting, seq, key=_order)
        self.num_preemptions_total += 1

    def _give_up_pages(self, seq: _Sequence) -> None:
        self._pool.release(seq.pages)
        seq.pages = ()
        seq.computed = 0

    def _admit(self, parts: list[StepSequence], budget: int) -> None:
        """Admit waiting sequences while all of their known tokens fit beside what the running ones soon need.

        Only the first chunk's pages are taken now. The wider look keeps a prompt from being computed by
        halves, preempted for the next page of an older sequence, and computed again.
        """
        if budget == 0 or not self._waiting or len(self._running) >= self._max_num_seqs:
            return
        owed = sum(max(0, self._num_pages_soon(seq) - len(seq.pages)) for seq in self._running)
        while budget > 0 and self._waiting and len(self._running) < self._max_num_seqs:
            seq = self._waiting[0]
            if owed >= self._pool.num_available:
                return  # at least its last token needs a page of its own; do not even look up its prefix
            hits = self._find_prefix(seq)
            num_soon = self._num_pages_soon(seq)
            num_spare = self._pool.num_available - self._pool.count_cached(hits) - owed
            if num_soon - len(hits) > num_spare:
                return
            del self._waiting[0]
            begin = len(hits) * self._page_size
            end = min(len(seq.tokens), begin + budget)
            self._pool.acquire(hits)
            seq.pages = hits + self._pool.allocate(self._num_pages_for(end) - len(hits))
            seq.computed = begin
            seq.num_published, seq.publishes = len(hits), True
            seq.state = "running"
            insort(self._running, seq, key=_order)
            if not seq.admitted_before:
                seq.admitted_before = True
                seq.num_cached_tokens = begin
                if self._enable_prefix_caching and seq.reuse_prefix:
                    self.num_prefix_queries_total += seq.num_prompt
                    self.num_prefix_hits_total += begin
            owed += num_soon - len(seq.pages)
            budget -= end - begin
            parts.append(StepSequence(seq.key, begin, end, seq.pages, end == len(seq.tokens)))

    def _find_prefix(self, seq: _Sequence) -> tuple[int, ...]:
        """Cached pages to start from. Never all tokens: the last one must be computed to sample from it."""
        if not self._enable_prefix_caching:
            return ()
        # Without reuse, after a preemption, what it computed itself before may still be picked up again.
        limit = len(seq.tokens) - 1 if seq.reuse_prefix else min(len(seq.tokens) - 1, seq.furthest)
        return self._pool.match(seq.chain.first(limit // self._page_size, seq.tokens))

    def _num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _num_pages_soon(self, seq: _Sequence) -> int:
        """Pages for its known tokens and, if it can grow so far, one for those to be generated next."""
        return min(self._num_pages_for(len(seq.tokens)) + 1, seq.max_total_pages)

    def commit(self, step: Step, sampled: Mapping[int, int]) -> None:
        """Record that `step`, the latest one scheduled, was computed.

        Pages filled by it are published. If another sequence has published the same content, this one's block
        table changes to that page from the next step on: entries for computed tokens are not append-only.

        Args:
            sampled: key -> token, for each sequence of the step that samples. Sequences finished since
                `schedule` are ignored.
        """
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
        pages = list(seq.pages)
        num_full = seq.computed // self._page_size
        for index in range(seq.num_published, num_full):
            pages[index] = self._pool.publish(pages[index], seq.chain.digest(index, seq.tokens))
        seq.pages = tuple(pages)
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
        if not keep_pages and seq.state == "running":
            self._withdraw(seq)
        if seq.state == "held back":
            followers = self._held_back[seq.leader]
            followers.remove(seq)
            if not followers:
                del self._held_back[seq.leader]
        else:
            queue = self._running if seq.state == "running" else self._waiting
            del queue[bisect_left(queue, seq.order, key=_order)]
        self._give_up_pages(seq)
        self._release_followers(key)

    def _withdraw(self, suspect: _Sequence) -> None:
        for seq in self._running:
            # Shared pages are a common head, so whoever shares any shares the first, and rests on it.
            if seq is suspect or seq.pages[0] == suspect.pages[0]:
                self._pool.withdraw(seq.pages)
                seq.publishes = False

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix, say because the weights changed. Running sequences go on.

        What these compute from now on rests on older pages, so they publish nothing more.
        """
        self._pool.forget()
        for seq in self._running:
            seq.publishes = False

    def check_integrity(self) -> None:
        """Raise AssertionError, with the numbers, if the queues and the pages disagree. O(pages)."""
        self._pool.check_integrity(seq.pages for seq in self._running)
        held_back = [seq for followers in self._held_back.values() for seq in followers]
        queues = {"running": self._running, "waiting": self._waiting, "held back": held_back}
        for state, queue in queues.items():
            for seq in queue:
                assert self._sequences.get(seq.key) is seq, f"{state} sequence {seq.key} is gone"
                assert seq.state == state, f"sequence {seq.key} is {seq.state} in the {state} queue"
                covered = len(seq.pages) * self._page_size
                assert seq.computed <= covered, (
                    f"sequence {seq.key}: {seq.computed} computed tokens, pages for {covered}"
                )
                assert seq.computed < len(seq.tokens), (
                    f"sequence {seq.key}: {seq.computed} computed of {len(seq.tokens)} known tokens"
                )
                if state != "running":
                    assert not seq.pages, f"{state} sequence {seq.key} holds {len(seq.pages)} pages"
        num_queued = len(self._running) + len(self._waiting) + len(held_back)
        assert num_queued == len(self._sequences), f"{num_queued} queued, {len(self._sequences)} known"
        for queue in (self._running, self._waiting):
            orders = [seq.order for seq in queue]
            assert orders == sorted(orders), f"a queue is out of order: {orders}"
