"""The engine without its process: requests in, one step at a time, outputs out. Token ids only.

One loop owns everything here, so nothing is locked. A step is: ask the scheduler, run the decoder, sample, tell
the scheduler, say what came out.
"""

import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hybridgen.engine.balance import Balance
from hybridgen.engine.request import (
    BalanceStats,
    EngineStats,
    FinishReason,
    InvalidRequest,
    MigrationStats,
    NodeStats,
    Output,
    Ready,
    Request,
    TokenLogprob,
    check_sampling_params,
)
from hybridgen.engine.runner import ModelRunner
from hybridgen.engine.sampler import Sampler
from hybridgen.scheduler.scheduler import NeverFits, Scheduler
from hybridgen.scheduler.step import Step

logger = logging.getLogger(__name__)

# Prompt positions whose logits exist at one time: 256 rows of a 128k vocabulary in float32 are 128 MiB.
_SCORED_ROWS = 256


@dataclass(slots=True)
class _Choice:
    """One of a request's `n` continuations, from admission to its last token."""

    key: int
    request: Request
    index: int
    tokens: list[int]  # prompt, then generated
    max_tokens: int
    stop_token_ids: frozenset[int]
    # Log-probabilities of prompt[1:], filled chunk by chunk; only for choice 0 of requests that ask.
    prompt_scores: list[TokenLogprob] = field(default_factory=list)
    has_reported: bool = False  # an Output of this choice has gone out

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)

    @property
    def wants_prompt_scores(self) -> bool:
        return (
            self.index == 0
            and self.request.params.prompt_logprobs is not None
            and len(self.prompt_scores) < self.prompt_len - 1
        )


class EngineCore:
    """Requests to tokens on one model.

    Every live choice is known to the scheduler and the sampler by the same key; a choice that ends is forgotten by
    all three at once. `check_integrity` holds between any two calls.
    """

    def __init__(
        self,
        *,
        runner: ModelRunner,
        scheduler: Scheduler,
        sampler: Sampler,
        balance: Balance | None = None,
        ready: Ready,
        eos_token_ids: Sequence[int],
        seed: int,
    ) -> None:
        self.ready = ready
        self._runner = runner
        self._scheduler = scheduler
        self._balance = balance  # None: device and host are not processors of their own
        self._sampler = sampler
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seeds = random.Random(seed)
        self._choices: dict[int, _Choice] = {}  # by key
        self._keys: dict[str, dict[int, int]] = {}  # request id -> choice index -> key
        self._known: dict[int, list[int]] = {}  # key -> the choice's tokens
        self._prompt_lens: dict[int, int] = {}
        self._pending: list[Output] = []  # refusals and aborts, said with the next step
        self._next_key = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_device_tokens = 0
        self._num_host_tokens = 0
        self._last_step_tokens = 0
        self._device_s = self._host_s = self._device_wait_s = self._host_wait_s = 0.0

    def add(self, request: Request) -> None:
        """Queue a request. One that cannot be served is answered by the next step with what is wrong with it."""
        try:
            self._admit(request)
        except (InvalidRequest, NeverFits) as error:
            param = error.param if isinstance(error, InvalidRequest) else "max_tokens"
            refusal = Output(id=request.id, finish_reason="error", error=str(error), refused=param)
            self._pending.append(refusal)
        except Exception as error:  # one request must never take the others down
            logger.exception("request %s could not be queued", request.id)
            text = f"the request could not be queued: {type(error).__name__}: {error}"
            self._pending.append(Output(id=request.id, finish_reason="error", error=text))

    def abort(self, ids: Sequence[str]) -> None:
        """End these requests and free their pages; unknown ids are ignored, since they may just have ended."""
        for request_id in ids:
            for index in list(self._keys.get(request_id, ())):
                self.abort_choice(request_id, index)

    def abort_choice(self, request_id: str, index: int) -> None:
        """End one choice; the next step says so with finish_reason "abort". Unknown ones are ignored."""
        key = self._keys.get(request_id, {}).get(index)
        if key is not None:
            self._end(self._choices[key])
            self._pending.append(Output(id=request_id, index=index, finish_reason="abort"))

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._choices or self._pending)

    def step(self) -> list[Output]:
        """One forward pass, or only what is pending when there is nothing to compute."""
        outputs, self._pending = self._pending, []
        if not self._choices:
            return outputs
        step = self._scheduler.schedule()
        if not step.sequences:
            # The scheduler promises progress whenever a sequence is alive.
            assert outputs, "sequences are alive, yet none was scheduled"
            return outputs
        outputs += self._run(step)
        self._num_steps += 1
        self._last_step_tokens = step.num_tokens
        return outputs

    def stats(self) -> EngineStats:
        """Counts for metrics, as of now."""
        scheduler, pages = self._scheduler, self._scheduler.pages
        retained = self._runner.retained
        nodes, migrations = self._node_stats()
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_parked=scheduler.num_parked,
            num_pages=pages.num_pages,
            num_free_pages=pages.num_free,
            num_cached_pages=pages.num_cached,
            num_device_pages=pages.num_device_pages,
            num_free_device_pages=pages.num_free_device,
            num_cached_device_pages=pages.num_cached_device,
            num_demoted_pages_total=pages.num_demoted_total,
            num_promoted_pages_total=pages.num_promoted_total,
            num_device_tokens_total=self._num_device_tokens,
            num_host_tokens_total=self._num_host_tokens,
            num_measured_heads_total=retained.num_heads,
            retained_mass_total=retained.mass,
            lowest_retained_mass=retained.lowest,
            num_scanned_tokens_total=retained.num_scanned,
            num_selected_tokens_total=retained.num_selected,
            num_steps_total=self._num_steps,
            num_preemptions_total=scheduler.num_preemptions_total,
            num_prefix_queries_total=scheduler.num_prefix_queries_total,
            num_prefix_hits_total=scheduler.num_prefix_hits_total,
            num_prompt_tokens_total=self._num_prompt_tokens,
            num_generated_tokens_total=self._num_generated_tokens,
            last_step_tokens=self._last_step_tokens,
            balance=self._balance_stats(),
            nodes=nodes,
            migrations=migrations,
            num_failed_migrations_total=self._runner.store.host.counts().failed,
        )

    def check_integrity(self) -> None:
        """Every page of each tier is free, cached or held, and the books of engine and scheduler agree. For when there
        is no work, after the outputs have left: it looks at every page, which takes milliseconds.

        Raises:
            AssertionError: with the numbers that disagree.
        """
        self._scheduler.check_integrity()
        live = self._scheduler.num_running + self._scheduler.num_waiting
        assert live == len(self._choices), (
            f"the scheduler has {live} sequences, the engine {len(self._choices)}"
        )
        listed = sum(len(keys) for keys in self._keys.values())
        assert listed == len(self._choices), f"{listed} choices are listed, {len(self._choices)} are alive"

    def _admit(self, request: Request) -> None:
        params = request.params
        check_sampling_params(params, vocab_size=self.ready.vocab_size, max_logprobs=self.ready.vocab_size)
        if request.id in self._keys:
            raise InvalidRequest(f"a request with id {request.id!r} is already running", "request_id")
        if not request.prompt:
            raise InvalidRequest("the prompt is empty", "prompt")
        highest, lowest = max(request.prompt), min(request.prompt)
        if lowest < 0 or highest >= self.ready.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise InvalidRequest(
                f"token id {wrong} is outside the vocabulary of {self.ready.vocab_size}", "prompt"
            )
        room = self.ready.max_model_len - len(request.prompt)
        max_tokens = room if params.max_tokens is None else params.max_tokens
        if max_tokens > room or room < 1:
            raise InvalidRequest(
                f"this model's maximum context length is {self.ready.max_model_len} tokens; the prompt has "
                f"{len(request.prompt)} and {max_tokens} were asked for",
                "max_tokens",
            )
        self._keys[request.id] = {}
        try:
            for index in range(params.n):
                self._add_choice(request, index, max_tokens)
        except BaseException:
            # All or nothing: what was added of the request goes again.
            for key in list(self._keys[request.id].values()):
                self._end(self._choices[key])
            self._keys.pop(request.id, None)
            raise

    def _add_choice(self, request: Request, index: int, max_tokens: int) -> None:
        params, key = request.params, self._next_key
        self._next_key += 1
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed + index
        self._sampler.add(key, params, request.prompt, seed)
        try:
            self._scheduler.add(
                key,
                request.prompt,
                max_total_tokens=len(request.prompt) + max_tokens,
                priority=request.priority,
                # Dynamic rope rotates keys by the prompt's length: such prompts may only share pages with their equals.
                salt=self._runner.prefix_salt(len(request.prompt)),
                reuse_prefix=params.prompt_logprobs is None or index > 0,
                # The first choice computes the prompt; the others find it in the prefix cache.
                after=key - index if index else None,
            )
        except BaseException:
            self._sampler.remove(key)
            raise
        if self._balance is not None:
            num_pages = -(-len(request.prompt) // self.ready.page_size)
            self._scheduler.set_split(key, self._balance.initial_pages(num_pages))
        choice = _Choice(
            key, request, index, list(request.prompt), max_tokens, frozenset(params.stop_token_ids)
        )
        self._choices[key] = choice
        self._keys[request.id][index] = key
        self._known[key] = choice.tokens
        self._prompt_lens[key] = choice.prompt_len

    def _run(self, step: Step) -> list[Output]:
        started = time.perf_counter()
        score_all = [item.key for item in step.sequences if self._choices[item.key].wants_prompt_scores]
        logits, hidden = self._runner.run(step, self._known, self._prompt_lens, score_all=score_all)
        for item in step.sequences:
            if item.key in hidden:
                self._score_prompt(self._choices[item.key], item.begin, hidden[item.key])
            self._num_prompt_tokens += max(0, min(item.end, self._prompt_lens[item.key]) - item.begin)
            # Where there are both, host pages are full, and the page being written is a device page.
            num_host_pages = len(item.block_table) - item.num_device_pages
            num_host_tokens = min(item.end, num_host_pages * self.ready.page_size)
            self._num_host_tokens += num_host_tokens
            self._num_device_tokens += item.end - num_host_tokens
        keys = [item.key for item in step.sequences if item.samples]
        outputs: list[Output] = []
        ended: list[_Choice] = []
        suspect: list[int] = []  # their pages may hold NaN, which no later prompt must find
        sampled: dict[int, int] = {}
        if keys:
            result = self._sampler.sample(logits, keys)
            for place, (key, token, logprob) in enumerate(
                zip(keys, result.tokens, result.logprobs, strict=True)
            ):
                choice = self._choices[key]
                sampled[key] = token
                if place in result.invalid:
                    suspect.append(key)
                    text = "the model's logits are NaN or leave no token to choose; this request cannot go on"
                    output = Output(
                        id=choice.request.id, index=choice.index, finish_reason="error", error=text
                    )
                else:
                    output = self._append(choice, token, logprob)
                outputs.append(output)
                if output.finish_reason is not None:
                    ended.append(choice)
            self._num_generated_tokens += len(keys)
        self._scheduler.commit(step, sampled)
        for choice in ended:
            self._end(choice, keep_pages=choice.key not in suspect)
        self._note_clocks(step, time.perf_counter() - started)
        logger.debug(
            "step of %d tokens, %d sequences: %.2f ms",
            step.num_tokens,
            len(step.sequences),
            1e3 * (time.perf_counter() - started),
        )
        return outputs

    def _note_clocks(self, step: Step, step_s: float) -> None:
        store, balance, reads = self._runner.store, self._balance, self._runner.reads
        if store.host.looks_next:
            first = self.ready.num_device_pages
            store.host.release([page - first for page in self._scheduler.pages.free_host_pages])
        clocks = store.clocks
        self._device_s += clocks.device_s
        self._host_s += clocks.host_s
        self._device_wait_s += clocks.device_wait_s
        self._host_wait_s += clocks.host_wait_s
        if balance is None or reads is None:
            return
        balance.after_step(
            step,
            clocks,
            reads,
            step_s=step_s,
            retained_mass=store.last_lowest_mass,
            heat=store.host.heat,
        )
        store.looks_ahead = balance.layer_ahead or not balance.can_look_ahead

    def _balance_stats(self) -> BalanceStats | None:
        balance = self._balance
        if balance is None or balance.decision is None:
            return None
        decision = balance.decision
        return BalanceStats(
            device_s_total=self._device_s,
            host_s_total=self._host_s,
            device_wait_s_total=self._device_wait_s,
            host_wait_s_total=self._host_wait_s,
            target_share=decision.device_share,
            actual_share=balance.actual_share,
            max_running=decision.max_running,
            limit_reason=str(decision.limit_reason),
            reason=str(decision.reason),
            message=decision.message,
            num_changes_total={str(reason): count for reason, count in balance.num_decisions.items()},
        )

    def _node_stats(self) -> tuple[tuple[NodeStats, ...], tuple[MigrationStats, ...]]:
        host = self._runner.store.host
        counts, names = host.counts(), {node.id: node.name for node in host.nodes}
        nodes = tuple(
            NodeStats(
                name=node.name,
                tier=str(node.tier),
                emulated=node.emulated,
                bandwidth=node.read_bandwidth,
                capacity_bytes=node.capacity_bytes,
                read_bytes_total=counts.read_bytes[position],
                delayed_s_total=counts.delayed_s[position],
                num_pieces=tuple(row[position] for row in counts.pages),
            )
            for position, node in enumerate(host.nodes)
        )
        migrations = tuple(
            MigrationStats(source=names[source], target=names[target], reason=reason, num_total=num)
            for (source, target, reason), num in counts.migrated.items()
        )
        return nodes, migrations

    def explain(self, page: int | None) -> tuple[str, ...]:
        """Lines that say where a host page lies and why; of all of them together, without a page."""
        lines = self._runner.store.host.explain(page)
        if page is None and self._balance is not None and self._balance.decision is not None:
            lines += (self._balance.decision.message,)
        return lines

    def _append(self, choice: _Choice, token: int, logprob: TokenLogprob | None) -> Output:
        choice.tokens.append(token)
        params = choice.request.params
        reason: FinishReason | None = None
        stop_reason: int | None = None
        if token in self._eos_token_ids and not params.ignore_eos:
            reason = "stop"
        elif token in choice.stop_token_ids:
            reason, stop_reason = "stop", token
        elif len(choice.tokens) - choice.prompt_len >= choice.max_tokens:
            reason = "length"
        first = not choice.has_reported
        choice.has_reported = True
        prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        if first and choice.index == 0 and params.prompt_logprobs is not None:
            prompt_logprobs = (None, *choice.prompt_scores)
        return Output(
            id=choice.request.id,
            index=choice.index,
            tokens=(token,),
            logprobs=() if logprob is None else (logprob,),
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_cached_tokens=self._scheduler.num_cached_tokens(choice.key) if first else 0,
        )

    def _score_prompt(self, choice: _Choice, begin: int, hidden: Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow positions [begin, begin + len(hidden))."""
        num_top = choice.request.params.prompt_logprobs
        assert num_top is not None
        # A resumed sequence computes positions again; what is already scored is kept.
        position = max(begin, len(choice.prompt_scores))
        end = min(begin + len(hidden), choice.prompt_len - 1)
        while position < end:
            rows = min(_SCORED_ROWS, end - position)
            logits = self._runner.logits(hidden[position - begin : position - begin + rows])
            following = choice.request.prompt[position + 1 : position + 1 + rows]
            choice.prompt_scores += self._sampler.prompt_logprobs(logits, following, num_top)
            position += rows

    def _end(self, choice: _Choice, *, keep_pages: bool = True) -> None:
        self._scheduler.finish(choice.key, keep_pages=keep_pages)
        self._sampler.remove(choice.key)
        self._runner.forget(choice.key)
        del self._choices[choice.key], self._known[choice.key], self._prompt_lens[choice.key]
        keys = self._keys[choice.request.id]
        del keys[choice.index]
        if not keys:
            del self._keys[choice.request.id]
