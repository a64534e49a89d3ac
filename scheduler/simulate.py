"""The engine's decisions on a modelled machine: real scheduler, controller and mapper; modelled clock and processors.

A simulation is a loop of steps: requests arrive, `Scheduler.schedule` chooses, `CostModel.step` says how long it
takes, the clock advances, `commit`; the mapper places the host pages that came and the controller sees the step as
the engine's clocks would show it. Tokens are all alike. The same arguments give the same result.

What is simplified: prompts are computed alone or beside decodes, but never shared (no prefix hits); all host pages are
read alike, so that none is hotter than another; migrations between host nodes take bandwidth that is idle.
"""

import math
import random
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hybridgen.scheduler.cost import Chunk, CostModel, StepCost, StepWork
from hybridgen.scheduler.feedback import (
    Decision,
    FeedbackConfig,
    FeedbackController,
    Mode,
    SequenceLoad,
    StepMeasurement,
)
from hybridgen.scheduler.machine import MemoryNode, Role
from hybridgen.scheduler.mapper import SemanticMapper
from hybridgen.scheduler.placements import ROLES, PageReads, Placement
from hybridgen.scheduler.scheduler import NeverFits, Scheduler
from hybridgen.scheduler.step import Step, StepSequence

CAPACITY = "capacity of KV memory"
MAX_STEPS = 200_000


class DoesNotFit(Exception):
    """The model, or one sequence, does not fit the machine's memory. The message has the numbers."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests to come.

    Attributes:
        contexts: prompt lengths, in tokens; each request draws one.
        output_tokens: that each request generates; None, in a closed loop: enough for the steps to be measured.
        concurrency: closed loop: so many requests at a time, a new one for each that ends. None: open, see `rate`.
        rate: requests a second that arrive.
        poisson: whether they arrive at random moments, or at even distances.
        num_requests: open loop: that arrive altogether.
        num_steps: closed loop: decode steps to measure.
        warmup_steps: closed loop: decode steps before these, in which the controller settles.
        seed: of contexts and arrivals.
    """

    contexts: tuple[int, ...]
    output_tokens: int | None = None
    concurrency: int | None = None
    rate: float | None = None
    poisson: bool = True
    num_requests: int = 64
    num_steps: int = 200
    warmup_steps: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError("a workload has either a concurrency or a rate")
        if not self.contexts or min(self.contexts) < 1 or (self.output_tokens or 1) < 1:
            raise ValueError(f"contexts {self.contexts}, {self.output_tokens} tokens to generate")
        if self.output_tokens is None and self.rate is not None:
            raise ValueError("requests that arrive at a rate need a number of tokens to generate")
        if (self.concurrency is not None and self.concurrency < 1) or (
            self.rate is not None and not self.rate > 0
        ):
            raise ValueError(f"concurrency {self.concurrency}, rate {self.rate}")


@dataclass(frozen=True, slots=True)
class Limits:
    """What `hybridgen serve` would be told. `device_pages` is for machines without a device."""

    page_size: int = 32
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 16384
    num_sink_pages: int = 1
    device_pages: int = 0
    workspace_bytes: int = 1 << 30  # of the device, for activations. Assumption.
    mode: Mode = Mode.MEASURED
    migration_share: float = 0.05  # of the bytes of a step's host reads, that may migrate meanwhile


@dataclass(frozen=True, slots=True)
class Capacity:
    """Pages that the machine has room for."""

    num_device_pages: int
    num_host_pages: int

    @property
    def num_pages(self) -> int:
        return self.num_device_pages + self.num_host_pages

    def num_sequences(self, num_tokens: int, page_size: int, num_fixed: int) -> int:
        """Sequences of so many tokens that run at the same time.

        Args:
            num_fixed: device pages that each cannot do without where there are both tiers.
        """
        by_pages = self.num_pages // -(-num_tokens // page_size)
        if self.num_device_pages and self.num_host_pages:
            return min(by_pages, self.num_device_pages // num_fixed)
        return by_pages


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """What came out. Times in seconds; shares of the measured time.

    Attributes:
        num_steps: measured ones; in a closed loop those without tokens of prompts count for the step times.
        step_p50_s, step_p99_s: of steps that decode.
        ttft_p50_s, ttft_p99_s: from arrival to the first token.
        num_running: sequences in a measured step, on average.
        num_waiting: at the end.
        num_fitting: sequences of the longest context that fit at the same time.
        device_kv_bytes, node_role_bytes: where KV lies at the end.
        limit: what bounds the step: the resource with the most time on its critical path, or the capacity.
        limit_share: of the critical path, that is that resource's.
        critical: resource -> share of the critical path.
        busy: resource -> share of the time that it works.
        device_share: of the running sequences' pages, on the device, at the end.
        link_bytes_per_step: on average.
        migrated_bytes: between host nodes, altogether.
        decision: the controller's last.
    """

    num_steps: int
    step_p50_s: float
    step_p99_s: float
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    num_running: float
    num_waiting: int
    num_fitting: int
    device_kv_bytes: int
    node_role_bytes: Mapping[str, Mapping[Role, int]]
    limit: str
    limit_share: float
    critical: Mapping[str, float]
    busy: Mapping[str, float]
    device_share: float
    link_bytes_per_step: float
    migrated_bytes: int
    decision: Decision | None

    @property
    def host_kv_bytes(self) -> int:
        return sum(sum(roles.values()) for roles in self.node_role_bytes.values())


def find_capacity(model: CostModel, limits: Limits) -> Capacity:
    """How many pages fit beside the weights.

    Raises:
        DoesNotFit: the weights alone do not.
    """
    machine, shape, page_size = model.machine, model.shape, limits.page_size
    page_shape = model.page_shape(page_size)
    host_page_bytes = sum(page_shape.role_bytes)
    rooms = [node.capacity_bytes for node in _free_nodes(model, limits)]
    if machine.device is None:
        needed = shape.weights_bytes + limits.device_pages * model.device_page_bytes(page_size)
        if needed > (capacity := machine.nodes[0].capacity_bytes):
            raise DoesNotFit(
                f"weights and device pages of {shape.name} take {_gib(needed)}; {machine.nodes[0].name} of "
                f"{machine.name} has {_gib(capacity)}"
            )
        num_device_pages = limits.device_pages
        room = 0
    else:
        room = machine.device.memory.capacity_bytes - limits.workspace_bytes - shape.weights_bytes
        if room < 0:
            raise DoesNotFit(
                f"the weights of {shape.name} take {_gib(shape.weights_bytes)} and the workspace "
                f"{_gib(limits.workspace_bytes)}; {machine.device.name} has "
                f"{_gib(machine.device.memory.capacity_bytes)} for both and KV"
            )
        num_device_pages = room // model.device_page_bytes(page_size)
    # A piece is not cut, so each node may have less than one of the largest left over.
    largest = max(page_shape.role_bytes)
    num_host_pages = sum(max(0, capacity - largest) for capacity in rooms) // host_page_bytes
    if beside := model.beside_device_bytes(page_size):
        num_host_pages = min(num_host_pages, room // beside)
    return Capacity(
        num_device_pages if model.system.uses_device_pages else 0,
        num_host_pages if model.system.uses_host_pages else 0,
    )


def simulate(
    model: CostModel, workload: Workload, limits: Limits | None = None, placement: Placement | None = None
) -> SimulationResult:
    """Run a workload on the modelled machine.

    Args:
        placement: another rule for where host pages lie than the mapper's.

    Raises:
        DoesNotFit: the weights or a single sequence do not.
    """
    return Simulation(model, workload, limits or Limits(), placement).run()


@dataclass(slots=True)
class _Request:
    key: int
    arrived_s: float
    num_prompt: int
    num_generated: int = 0
    table: tuple[int, ...] = ()
    num_device_pages: int = 0


@dataclass(slots=True)
class _Totals:
    """Sums over measured steps."""

    steps_s: list[float] = field(default_factory=list[float])  # of those that only decode
    seconds: float = 0.0
    num_steps: int = 0
    num_tokens: int = 0
    num_running: int = 0
    link_bytes: float = 0.0
    critical: Counter[str] = field(default_factory=Counter[str])
    busy: Counter[str] = field(default_factory=Counter[str])


class Simulation:
    """One run. See `simulate`."""

    def __init__(
        self, model: CostModel, workload: Workload, limits: Limits, placement: Placement | None
    ) -> None:
        self._model, self._workload, self._limits = model, workload, limits
        page_size = limits.page_size
        capacity = find_capacity(model, limits)
        self._num_outputs = workload.output_tokens or self._enough_tokens()
        max_tokens = max(workload.contexts) + self._num_outputs
        pages_each = -(-max_tokens // page_size) + 1
        num_seqs = min(limits.max_num_seqs, workload.concurrency or workload.num_requests)
        num_device_pages = min(capacity.num_device_pages, num_seqs * pages_each)
        num_host_pages = min(capacity.num_host_pages, num_seqs * pages_each)
        self.num_fitting = capacity.num_sequences(max_tokens, page_size, limits.num_sink_pages + 1)
        self._num_device_pages, self._num_host_pages = num_device_pages, num_host_pages
        if num_device_pages + num_host_pages == 0:
            raise DoesNotFit(f"there is no room for a page of {model.shape.name} on {model.machine.name}")
        self._scheduler = Scheduler(
            num_device_pages=num_device_pages,
            num_host_pages=num_host_pages,
            page_size=page_size,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=max(limits.max_num_batched_tokens, num_seqs),
            max_model_len=max_tokens,
            num_sink_pages=limits.num_sink_pages,
            enable_prefix_caching=False,
        )
        self._host = _HostPages(model, limits, num_host_pages, placement)
        self._controller = self._make_controller()
        self._decision: Decision | None = None
        self._num_threads = model.machine.num_cores
        self._layer_ahead = model.system.looks_ahead
        self._max_running = limits.max_num_seqs
        self._random = random.Random(workload.seed)
        self._next_key = 0
        self._clock = 0.0
        self._requests: dict[int, _Request] = {}
        self._queue: deque[tuple[float, int]] = (
            deque()
        )  # arrival and prompt length, not yet with the scheduler
        self._ttft: list[float] = []

    def _make_controller(self) -> FeedbackController | None:
        model, limits = self._model, self._limits
        if not (self._scheduler.pages.has_both_tiers and model.system.attends_on_host):
            return None
        page_shape, pattern = model.page_shape(limits.page_size), model.pattern()
        return FeedbackController(
            FeedbackConfig(
                machine=model.machine,
                device_page_bytes=model.device_page_bytes(limits.page_size),
                host_page_read_bytes=sum(
                    num_bytes * share
                    for num_bytes, share in zip(page_shape.role_bytes, pattern.shares, strict=True)
                ),
                num_device_pages=self._num_device_pages,
                max_threads=model.machine.num_cores,
                max_num_seqs=limits.max_num_seqs,
                mode=limits.mode,
                min_device_pages=limits.num_sink_pages + 1,
                can_look_ahead=model.system.looks_ahead,
            )
        )

    def _enough_tokens(self) -> int:
        """So many that no request ends before the last step to be measured, prompts of others included."""
        workload = self._workload
        assert workload.concurrency is not None
        return (
            workload.warmup_steps + workload.num_steps + workload.concurrency + 2 * self._num_prompt_steps()
        )

    def _num_prompt_steps(self) -> int:
        """That the first prompts of a closed loop take, in chunks as large as allowed."""
        prompts = (self._workload.concurrency or 0) * max(self._workload.contexts)
        return -(-prompts // self._limits.max_num_batched_tokens)

    # -- the loop --

    def run(self) -> SimulationResult:
        workload, totals = self._workload, _Totals()
        closed = workload.concurrency is not None
        self._arrive_first()
        num_decode_steps = num_prompt_steps = 0
        # Several times what the prompts take in whole chunks.
        max_prompt_steps = 500 + 4 * self._num_prompt_steps() if closed else 0
        for _ in range(MAX_STEPS):
            self._admit()
            if not self._requests:
                if not self._queue:
                    break
                self._clock = max(self._clock, self._queue[0][0])
                continue
            step = self._scheduler.schedule()
            assert step.sequences, "sequences are alive, yet none was scheduled"
            work = self._work(step)
            cost = self._model.step(work)
            self._clock += cost.total.seconds
            num_sampled = self._commit(step)
            num_prompt_steps = num_prompt_steps + 1 if work.chunks else 0
            if closed and num_prompt_steps > max_prompt_steps:
                raise DoesNotFit(
                    f"{self._model.shape.name} on {self._model.machine.name} by {self._model.system}: in"
                    f" {num_prompt_steps:,} steps there was none without a prompt; {self._num_device_pages} device"
                    f" pages are too few to compute those of {len(self._requests)} sequences in"
                )
            if not work.chunks:
                num_decode_steps += 1
            if not closed or num_decode_steps > workload.warmup_steps:
                self._count(totals, step, work, cost, num_sampled)
            if closed and len(totals.steps_s) >= workload.num_steps:
                break
            self._observe(step, work, cost)
        else:
            raise RuntimeError(f"the simulation did not end within {MAX_STEPS} steps")
        return self._result(totals)

    def _arrive_first(self) -> None:
        workload = self._workload
        if workload.concurrency is not None:
            self._queue.extend((0.0, self._draw()) for _ in range(workload.concurrency))
            return
        assert workload.rate is not None
        at = 0.0
        for _ in range(workload.num_requests):
            at += self._random.expovariate(workload.rate) if workload.poisson else 1 / workload.rate
            self._queue.append((at, self._draw()))

    def _draw(self) -> int:
        return self._random.choice(self._workload.contexts)

    def _admit(self) -> None:
        while self._queue and self._queue[0][0] <= self._clock and len(self._requests) < self._max_running:
            arrived_s, num_prompt = self._queue.popleft()
            request = _Request(self._next_key, arrived_s, num_prompt)
            self._next_key += 1
            try:
                self._scheduler.add(
                    request.key,
                    array("I", bytes(4 * num_prompt)),
                    max_total_tokens=num_prompt + self._num_outputs,
                )
            except NeverFits as error:
                model = self._model
                raise DoesNotFit(
                    f"{model.shape.name} on {model.machine.name} by {model.system}: {error}"
                ) from error
            if self._controller is not None:
                num_pages = -(-num_prompt // self._limits.page_size)
                self._scheduler.set_split(request.key, self._controller.initial_pages(num_pages))
            self._requests[request.key] = request

    def _work(self, step: Step) -> StepWork:
        page_size, min_tokens = self._limits.page_size, self._model.factors.scan_min_tokens
        num_decodes = num_host = device_tokens = scanned = short = num_sampled = 0
        chunks: list[Chunk] = []
        for part in step.sequences:
            on_device, on_host = self._tokens(part, page_size)
            num_sampled += part.samples
            if part.end - part.begin > 1:
                on_device, on_host = self._tokens_before(part, page_size)
                chunks.append(Chunk(part.end - part.begin, on_device, on_host))
                continue
            num_decodes += 1
            device_tokens += on_device
            num_host += on_host > 0
            if on_host >= min_tokens:
                scanned += on_host
            else:
                short += on_host
        shape = self._model.device_page_bytes(page_size)
        self._host.update(step, self._requests, self._num_device_pages)
        return StepWork(
            num_decodes=num_decodes,
            num_host_decodes=num_host,
            device_tokens=device_tokens,
            scanned_tokens=scanned,
            short_tokens=short,
            host_shares=self._host.shares(),
            chunks=tuple(chunks),
            num_sampled=num_sampled,
            moved_bytes=len(step.moves) * shape,
            num_threads=self._num_threads,
            layer_ahead=self._layer_ahead,
        )

    @staticmethod
    def _tokens(part: StepSequence, page_size: int) -> tuple[int, int]:
        """Context on device and host once the step's own tokens are stored. Full pages are the host's first."""
        if not part.num_device_pages:
            return 0, part.end
        on_host = min(part.end, (len(part.block_table) - part.num_device_pages) * page_size)
        return part.end - on_host, on_host

    @staticmethod
    def _tokens_before(part: StepSequence, page_size: int) -> tuple[int, int]:
        if not part.num_device_pages:
            return 0, part.begin
        on_host = min(part.begin, (len(part.block_table) - part.num_device_pages) * page_size)
        return part.begin - on_host, on_host

    def _commit(self, step: Step) -> int:
        sampled = {part.key: 0 for part in step.sequences if part.samples}
        self._scheduler.commit(step, sampled)
        for key in sampled:
            request = self._requests[key]
            request.num_generated += 1
            if request.num_generated == 1:
                self._ttft.append(self._clock - request.arrived_s)
            if request.num_generated >= self._num_outputs:
                self._finish(request)
        return len(sampled)

    def _finish(self, request: _Request) -> None:
        self._scheduler.finish(request.key)
        self._host.release(request.table, self._num_device_pages)
        del self._requests[request.key]
        if self._workload.concurrency is not None:
            self._queue.append((self._clock, self._draw()))

    def _count(self, totals: _Totals, step: Step, work: StepWork, cost: StepCost, num_sampled: int) -> None:
        if not work.chunks:
            totals.steps_s.append(cost.total.seconds)
        totals.seconds += cost.total.seconds
        totals.num_steps += 1
        totals.num_tokens += num_sampled
        totals.num_running += len(step.sequences)
        totals.link_bytes += cost.link_bytes
        totals.critical.update(cost.total.critical)
        totals.busy.update(cost.total.busy)

    def _observe(self, step: Step, work: StepWork, cost: StepCost) -> None:
        budget = self._limits.migration_share * sum(cost.node_bytes)
        self._host.migrate(budget, self._requests.values(), self._num_device_pages)
        if self._controller is None:
            return
        loads = tuple(
            SequenceLoad(part.key, len(part.block_table), part.num_device_pages)
            for part in step.sequences
            if part.key in self._requests
        )
        attends = work.num_host_decodes > 0
        decision = self._controller.decide(
            StepMeasurement(
                sequences=loads,
                step_s=cost.total.seconds,
                device_s=cost.device_s,
                host_s=cost.host_s,
                device_wait_s=max(0.0, cost.host_s - cost.device_s) if attends else 0.0,
                host_wait_s=max(0.0, cost.device_s - cost.host_s) if attends else 0.0,
                device_bytes=round(cost.device_bytes),
                node_bytes=tuple(
                    (node.id, round(num_bytes))
                    for node, num_bytes in zip(self._model.machine.nodes, cost.node_bytes, strict=True)
                ),
                moved_bytes=work.moved_bytes,
                moved_s=cost.moved_s,
                num_prompt_tokens=work.num_tokens - len(step.sequences),
                num_threads=self._num_threads,
                layer_ahead=self._layer_ahead,
            )
        )
        for key, num_pages in decision.splits:
            if key in self._requests:
                self._scheduler.set_split(key, num_pages)
        self._num_threads, self._layer_ahead = decision.num_threads, decision.layer_ahead
        self._max_running = decision.max_running
        self._decision = decision

    # -- the result --

    def _result(self, totals: _Totals) -> SimulationResult:
        model, page_size = self._model, self._limits.page_size
        seconds = totals.seconds or 1.0
        critical = {name: value / seconds for name, value in totals.critical.most_common()}
        num_waiting = len(self._queue) + self._scheduler.num_waiting
        limit, limit_share = next(iter(critical.items()), ("nothing", 0.0))
        if num_waiting and self._scheduler.num_running < self._limits.max_num_seqs and self._num_bounded():
            limit = CAPACITY
        pages = [(len(request.table), request.num_device_pages) for request in self._requests.values()]
        num_device_pages = sum(num_device for _, num_device in pages)
        return SimulationResult(
            num_steps=totals.num_steps,
            step_p50_s=percentile(totals.steps_s, 0.5),
            step_p99_s=percentile(totals.steps_s, 0.99),
            tokens_per_s=totals.num_tokens / seconds,
            ttft_p50_s=percentile(self._ttft, 0.5),
            ttft_p99_s=percentile(self._ttft, 0.99),
            num_running=totals.num_running / max(1, totals.num_steps),
            num_waiting=num_waiting,
            num_fitting=self.num_fitting,
            device_kv_bytes=num_device_pages * model.device_page_bytes(page_size),
            node_role_bytes=self._host.role_bytes(),
            limit=limit,
            limit_share=limit_share,
            critical=critical,
            busy={name: value / seconds for name, value in totals.busy.most_common()},
            device_share=num_device_pages / max(1, sum(num for num, _ in pages)),
            link_bytes_per_step=totals.link_bytes / max(1, totals.num_steps),
            migrated_bytes=self._host.migrated_bytes,
            decision=self._decision,
        )

    def _num_bounded(self) -> bool:
        """Whether it is pages, not the controller, that keep sequences waiting."""
        return len(self._requests) < self._max_running or self._scheduler.num_waiting > 0


class _HostPages:
    """Which host pages there are and where their roles lie: what the mapper is told, and what it says.

    Args:
        placement: default: the mapper.
    """

    MIGRATION_INTERVAL = 16  # steps

    def __init__(self, model: CostModel, limits: Limits, num_pages: int, placement: Placement | None) -> None:
        self._nodes = _free_nodes(model, limits)
        shape = model.page_shape(limits.page_size)
        self._role_bytes = shape.role_bytes
        self._pattern = model.pattern()
        self._min_pages = model.factors.scan_min_tokens / limits.page_size if model.system.selects else 0.0
        self._placement = placement or SemanticMapper(self._nodes, shape, self._pattern, num_pages)
        self._places: dict[int, list[int]] = {}  # page -> position of the node of each role
        self._position = {node.id: place for place, node in enumerate(self._nodes)}
        self._counts = [[0] * len(self._nodes) for _ in ROLES]
        self._num_steps = 0
        self._budget = 0.0
        self.migrated_bytes = 0

    def update(self, step: Step, requests: Mapping[int, _Request], first: int) -> None:
        """Take in what a step changes. Host pages are numbered from `first` in block tables, from 0 here."""
        gone: set[int] = set()
        come: set[int] = set()
        # A page may be the target of one move and the source of a later one.
        for move in step.moves:
            if move.target >= first:
                come.add(move.target - first)
                gone.discard(move.target - first)
            else:
                gone.add(move.source - first)
                come.discard(move.source - first)
        for part in step.sequences:
            request = requests[part.key]
            # The same tuple until a page comes, goes or moves. With a device tier pages come by moves alone.
            if part.block_table is not request.table and not first:
                come.update(part.block_table)
            request.table, request.num_device_pages = part.block_table, part.num_device_pages
        self._release(gone)
        self._place(sorted(page for page in come if page not in self._places))

    def release(self, table: Sequence[int], first: int) -> None:
        """A sequence has ended."""
        self._release(page - first for page in table if page >= first)

    def _place(self, pages: Sequence[int]) -> None:
        if not pages:
            return
        for page, nodes in zip(pages, self._placement.place(pages), strict=True):
            self._places[page] = [self._position[node] for node in nodes]
            for counts, place in zip(self._counts, self._places[page], strict=True):
                counts[place] += 1

    def _release(self, pages: Iterable[int]) -> None:
        known = sorted(page for page in pages if page in self._places)
        if not known:
            return
        self._placement.release(known)
        for page in known:
            for counts, place in zip(self._counts, self._places.pop(page), strict=True):
                counts[place] -= 1

    def migrate(self, num_bytes: float, requests: Iterable[_Request], first: int) -> None:
        """Every few steps: tell the mapper what was read, and let it move as many bytes as these steps have allowed."""
        self._num_steps += 1
        self._budget += num_bytes
        if self._num_steps % self.MIGRATION_INTERVAL or not self._places:
            return
        self._observe(requests, first)
        migrations = self._placement.plan(int(self._budget))
        self._placement.apply(migrations)
        self._budget = 0.0
        for migration in migrations:
            column, target = ROLES.index(migration.role), self._position[migration.target]
            counts, places = self._counts[column], self._places[migration.page]
            counts[places[column]] -= 1
            counts[target] += 1
            places[column] = target
            self.migrated_bytes += self._role_bytes[column]

    def _observe(self, requests: Iterable[_Request], first: int) -> None:
        """Sequences with little on the host are read in full, whatever the policy would select of others."""
        pages: list[int] = []
        full: list[bool] = []
        for request in requests:
            own = [page - first for page in request.table if page - first in self._places]
            pages += own
            full += [len(own) < self._min_pages] * len(own)
        if not any(full):
            return  # as the pattern says
        self._placement.observe(
            PageReads.of_shares(
                pages,
                [1.0 if whole else self._pattern.k for whole in full],
                [1.0 if whole else self._pattern.v for whole in full],
            )
        )

    def shares(self) -> dict[Role, tuple[float, ...]]:
        """Of each role, the share of its bytes on each node."""
        total = max(1, len(self._places))
        return {
            role: tuple(count / total for count in counts)
            for role, counts in zip(ROLES, self._counts, strict=True)
        }

    def role_bytes(self) -> dict[str, dict[Role, int]]:
        """By name of the node."""
        return {
            node.name: {
                role: counts[place] * num_bytes
                for role, counts, num_bytes in zip(ROLES, self._counts, self._role_bytes, strict=True)
            }
            for place, node in enumerate(self._nodes)
        }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many of them do not exceed; 0 if there are none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def _free_nodes(model: CostModel, limits: Limits) -> tuple[MemoryNode, ...]:
    """The host's nodes with what weights and device pages leave of them."""
    nodes = model.machine.nodes
    if model.machine.device is not None:
        return nodes
    taken = model.shape.weights_bytes + limits.device_pages * model.device_page_bytes(limits.page_size)
    return (replace(nodes[0], capacity_bytes=max(0, nodes[0].capacity_bytes - taken)), *nodes[1:])


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
