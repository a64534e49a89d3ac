"""How much of each sequence the device keeps, so that device and host finish together. No clock, no tensors, no I/O.

`FeedbackController.decide` takes what a step's clocks said and returns what the next steps are to do. It is a
function of the measurements it was given: `replay` of a recorded list makes the same decisions again.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from hybridgen.scheduler.machine import Machine


class Mode(StrEnum):
    """Where the share of the device comes from."""

    MEASURED = "measured"  # by the clocks of steps; by the machine's description until there are some
    PREDICTED = "predicted"  # by the machine's description alone
    FIXED = "fixed"  # as the configuration says


class Reason(StrEnum):
    """Why the split is what it is."""

    IDLE = "idle"  # nothing runs
    FIXED = "fixed"  # the configuration says so
    PREDICTED = "predicted"  # by the machine's description: there are no measurements yet, or none are wanted
    BALANCED = "balanced"  # both finish together, as nearly as is worth a move
    HOST_SLOWER = "host_slower"  # pages move to the device
    DEVICE_SLOWER = "device_slower"  # pages move to the host
    DEVICE_FULL = "device_full"  # the host is slower, and the device has no page left
    HOST_LOSES = "host_loses"  # the device alone is faster than with any page on the host
    MOVE_TOO_DEAR = "move_too_dear"  # another split is faster, but not by what the move costs
    MASS_BELOW_FLOOR = (
        "mass_below_floor"  # the host retained too little: nothing is made faster at its expense
    )
    TRIAL = "trial"  # another number of threads, or looking ahead, is being tried


class LimitReason(StrEnum):
    """Why so many sequences may run."""

    CONFIGURED = "configured"  # no reason to run fewer than configured
    STEP_TIME = "step_time"  # one more, and a step takes longer than asked for
    NO_THROUGHPUT = "no_throughput"  # the host is the bottleneck: one more brings hardly any throughput


@dataclass(frozen=True, slots=True)
class SequenceLoad:
    """A running sequence, as it was in the step.

    Attributes:
        num_pages: of its context, on both tiers.
        num_device_pages: of these on the device.
    """

    key: int
    num_pages: int
    num_device_pages: int


@dataclass(frozen=True, slots=True)
class StepMeasurement:
    """What the clocks and counters said of one step. Times are sums over layers, in seconds.

    Attributes:
        sequences: those of the step.
        step_s: the whole step, moves included.
        device_s: the device's part of attention: what goes on while the host attends.
        host_s: the host's part, from submission until its last thread is done; 0 if no host page was read.
        device_wait_s: the device had its part and waited for the host's.
        host_wait_s: the host had its part and waited for the device's.
        device_bytes: of KV that the device read.
        node_bytes: (id of the node, bytes of KV that the host's threads read of it).
        moved_bytes: of pages copied between device and host for this step.
        moved_s: that the step was longer for it.
        retained_mass: the lowest softmax mass that a head kept; None if the policy reads everything, or measured none.
        num_prompt_tokens: tokens computed beyond one a sequence. Such a step's times say nothing of decoding.
        num_threads: of the pool in this step.
        layer_ahead: whether the host looked a layer ahead in this step.
    """

    sequences: tuple[SequenceLoad, ...]
    step_s: float
    device_s: float
    host_s: float
    device_wait_s: float = 0.0
    host_wait_s: float = 0.0
    device_bytes: int = 0
    node_bytes: tuple[tuple[int, int], ...] = ()
    moved_bytes: int = 0
    moved_s: float = 0.0
    retained_mass: float | None = None
    num_prompt_tokens: int = 0
    num_threads: int = 1
    layer_ahead: bool = False

    @property
    def host_bytes(self) -> int:
        return sum(num_bytes for _, num_bytes in self.node_bytes)


@dataclass(frozen=True, slots=True)
class Decision:
    """What the next steps are to do.

    There is no field by which less of the host's pages could be read: retained mass is the policy's promise.

    Attributes:
        splits: (key, device pages to keep): what `Scheduler.set_split` takes. On the way to `device_share`, a few
            moves a step.
        device_share: of all pages of the running sequences, that the device is to keep in the end.
        num_threads: of the pool.
        layer_ahead: whether the host is to look a layer ahead.
        max_running: sequences that may run; those that do are not stopped.
        predicted_step_s: with that share, moves not counted; 0 if nothing runs.
        message: one sentence with the numbers, for the log.
    """

    splits: tuple[tuple[int, int], ...]
    device_share: float
    num_threads: int
    layer_ahead: bool
    max_running: int
    predicted_step_s: float
    reason: Reason
    limit_reason: LimitReason
    message: str


@dataclass(frozen=True, slots=True)
class FeedbackConfig:
    """What a controller knows beforehand.

    Attributes:
        machine: gives the times until steps are measured. Without a device, its first node stands for the device's
            memory.
        device_page_bytes: K and V of one page: what the device reads of it in a step, and what a move copies.
        host_page_read_bytes: that the host is expected to read of one of its pages in a step.
        num_device_pages: of the device tier: a hard bound for all sequences together.
        min_device_pages: a sequence's sinks and the page it writes to: it has no fewer, while they exist.
        max_threads: of the pool.
        max_num_seqs: that may run at all.
        fixed_share: of a sequence's pages, in mode `fixed`.
        can_look_ahead: whether policy and model can look a layer ahead.
        can_set_threads: whether the pool can work with fewer of its threads; otherwise no number is tried.
        mass_floor: retained mass below it is reported, and nothing is made faster while it lasts.
        target_step_s: longest step to admit sequences into; None: no limit.
        horizon_steps: for how many steps a split is expected to be of use: what a move costs is held against it.
        move_share: of a step's time that moves may take.
    """

    machine: Machine
    device_page_bytes: int
    host_page_read_bytes: float
    num_device_pages: int
    max_threads: int
    max_num_seqs: int
    mode: Mode = Mode.MEASURED
    min_device_pages: int = 2
    fixed_share: float = 0.5
    can_look_ahead: bool = False
    can_set_threads: bool = True
    mass_floor: float | None = None
    target_step_s: float | None = None
    horizon_steps: int = 256
    move_share: float = 0.5


_WINDOW = 24  # steps that a fit looks back
_MIN_SAMPLES = 3  # fewer say less than the machine's description
_CHANGED = 1.25  # this much off the fit, three times in a row to the same side, and the fit starts anew
_SHOCK = (
    1.4  # as much off, at bytes that the fit knows: it is the machine or its load that changed, not the split
)
_DISTURBED = 0.03  # of a step spent on moves: its times are those of a machine with less bandwidth
_CHANGED_DISTURBED = 1.6  # and must be off by this much more before they count
_MOVE_STEPS = 8  # in a row, after which they count all the same: what was before is too long ago
_FAR = 4.0  # times the bytes that were measured: beyond, a fit is only a guess
_EXCITED = 0.04  # relative spread of bytes from which on a fit believes its slope more than the one before
_BAND = 0.015  # of a step's time, that another split must gain; doubled whenever the split turns round
_FORGIVEN = 32  # steps at rest after which one turn is not counted any more
_PREDICTED_BAND = 0.05  # the same while nothing is measured
_SETTLED = 24  # steps without a change of the split before anything is tried
_TRIAL = 8  # steps that a trial is measured
_TRIAL_REST = 64  # steps between the ends and the beginnings of trials
_TRIAL_GAIN = 0.97  # of the predicted step that is left, for the new setting to stay
_TRIAL_LOSS = 1.15  # of the predicted step, for the trial to end early
_MARGINAL = 0.1  # of an average sequence's throughput, that one more has to bring
_STALE = 200  # steps without host pages, after which the host is judged by the description again
_MOST_STALE = 3200  # the same where it has lost again and again
_FIT_STEPS = 4  # steps from one line to the next, while they lie on it: a fit costs a tenth of a millisecond
_LIMIT_STEPS = 16  # steps from one look at the admission limit to the next


class _Side:
    """One processor's time as a function of the bytes it reads: a line through the last steps.

    What does not depend on bytes (launches, submission) is part of the line: at `mean_bytes` bytes it takes `mean_s`,
    and `proportional` of that is proportional to bytes. More than 1 is a side that gets slower with its load; then a
    power stands for the line, which would end below zero.
    """

    def __init__(self, seconds_per_byte: float) -> None:
        self._described = seconds_per_byte
        self._samples: deque[tuple[float, float, bool]] = deque(maxlen=_WINDOW)
        self._astray: deque[bool] = deque(maxlen=3)  # of the last steps that were far off the fit: too slow
        self._num_disturbed = 0  # last steps in a row
        self._num_unfitted = 0  # steps since the line was drawn
        self._slowdown = (
            1.0  # of disturbed steps, by the first ones of every move, when the bytes are still the same
        )
        self.proportional = 0.85
        self.mean_bytes = 0.0
        self.mean_s = 0.0
        self.spread = 0.0  # of times round the line, relative

    @property
    def is_measured(self) -> bool:
        return len(self._samples) >= _MIN_SAMPLES

    def forget(self) -> None:
        self._samples.clear()
        self._astray.clear()

    def seconds(self, num_bytes: float) -> float:
        """For so many bytes; 0 for none, whatever the overhead."""
        if num_bytes <= 0:
            return 0.0
        if not self.is_measured:
            return num_bytes * self._described
        ratio = num_bytes / self.mean_bytes
        if self.proportional > 1 and ratio <= _FAR:
            return self.mean_s * float(ratio**self.proportional)
        seconds = self.mean_s * (1 + self.proportional * (ratio - 1))
        if ratio > _FAR:
            # A few pages are all overhead, which says nothing of many; there the description is the better guess.
            seconds = min(seconds, self.mean_s + 2 * (num_bytes - self.mean_bytes) * self._described)
        return seconds

    def observe(self, num_bytes: float, seconds: float, *, disturbed: bool = False) -> bool:
        """Learn from a step; returns whether the machine has changed under the same load."""
        if num_bytes <= 0 or seconds <= 0:
            return False
        shocked, off = False, 1.0
        self._num_disturbed = self._num_disturbed + 1 if disturbed else 0
        if self._num_disturbed == _MOVE_STEPS + 1:
            kept = [sample for sample in self._samples if sample[2]]
            if len(kept) < _MIN_SAMPLES:
                kept = list(self._samples)[-_MIN_SAMPLES:]
            self._samples = deque(((b, s, True) for b, s, _ in kept), maxlen=_WINDOW)
        if self.is_measured:
            if 0 < self._num_disturbed <= 3:
                off = min(_CHANGED_DISTURBED, max(1.0, seconds / self.seconds(num_bytes)))
                self._slowdown += 0.3 * (off - self._slowdown)
            if disturbed:
                seconds /= self._slowdown
            off = seconds / self.seconds(num_bytes)
            limit = max(_CHANGED, 1 + 4 * self.spread) * (_CHANGED_DISTURBED if disturbed else 1)
            if 1 / limit <= off <= limit:
                self._astray.clear()
                if disturbed and self._num_disturbed <= _MOVE_STEPS:
                    return False
            else:
                if self._astray and self._astray[-1] != (off > 1):
                    self._astray.clear()
                self._astray.append(off > 1)
        self._samples.append((num_bytes, seconds, disturbed))
        if len(self._astray) == 3:
            near = 0.75 <= num_bytes / self.mean_bytes <= 1.33
            shocked = near and not 1 / _SHOCK <= off <= _SHOCK
            last = [self._samples.pop() for _ in range(3)]
            self.forget()
            self._samples.extend(reversed(last))
        self._num_unfitted += 1
        is_settled = len(self._samples) == _WINDOW and not self._astray and not disturbed
        if self.is_measured and not (is_settled and self._num_unfitted < _FIT_STEPS):
            self._fit()
            self._num_unfitted = 0
        return shocked

    def _fit(self) -> None:
        """Least squares after leaving out what is far from the median, drawn to the slope of before.

        Where the bytes hardly vary, times say nothing of the slope, and it stays as it is.
        """
        calm = [(num_bytes, seconds) for num_bytes, seconds, disturbed in self._samples if not disturbed]
        # Moves take the memory's bandwidth from the host's threads; steps with them count while there are no others.
        samples = calm if len(calm) >= _MIN_SAMPLES else [sample[:2] for sample in self._samples]
        if not self.mean_bytes:
            self.mean_bytes, self.mean_s = samples[0]
        ratios = [
            seconds / max(1 + min(1.0, self.proportional) * (num_bytes / self.mean_bytes - 1), 0.05)
            for num_bytes, seconds in samples
        ]
        middle = median(ratios)
        spread = 1.48 * median(abs(ratio / middle - 1) for ratio in ratios)
        kept = [
            sample
            for sample, ratio in zip(samples, ratios, strict=True)
            if abs(ratio / middle - 1) <= max(0.1, 3 * spread)
        ]
        count = len(kept)
        self.spread = spread
        self.mean_bytes = sum(num_bytes for num_bytes, _ in kept) / count
        self.mean_s = sum(seconds for _, seconds in kept) / count
        stiffness = count * _EXCITED**2
        covered = sum((num_bytes / self.mean_bytes - 1) ** 2 for num_bytes, _ in kept)
        together = sum((b / self.mean_bytes - 1) * (s / self.mean_s - 1) for b, s in kept)
        slope = (together + stiffness * self.proportional) / (covered + stiffness)
        # The same steps are looked at again and again: each time a part of what they say is enough.
        weight = 0.3 * covered / (covered + stiffness)
        self.proportional += weight * (min(2.0, max(0.1, slope)) - self.proportional)


class _Model:
    """What a step takes, for any split: both sides, what runs beside them, and what comes after."""

    def __init__(self, config: FeedbackConfig, like: "_Model | None" = None) -> None:
        device_bandwidth, host_bandwidth = _bandwidths(config.machine)
        self.device: _Side = _Side(1 / device_bandwidth)
        self.host: _Side = _Side(1 / host_bandwidth)
        self.host_page_bytes: float = config.host_page_read_bytes
        self.device_page_bytes: float = config.device_page_bytes
        if like is not None:
            self.device.proportional, self.host.proportional = (
                like.device.proportional,
                like.host.proportional,
            )
            self.host_page_bytes, self.device_page_bytes = like.host_page_bytes, like.device_page_bytes
        self._hidden: deque[float] = deque(maxlen=9)
        self._rest: deque[float] = deque(maxlen=5)
        self.num_steps = 0
        self.steps_without_host = 0

    @property
    def hidden_s(self) -> float:
        """Device work beside its part of attention, that the host's part goes on under; below 0: the host starts
        late."""
        return median(self._hidden) if self._hidden else 0.0

    def observe(self, step: StepMeasurement) -> bool:
        """Returns whether a side has changed under the same load."""
        self.num_steps += 1
        self.steps_without_host = 0 if step.host_bytes else self.steps_without_host + 1
        num_device = sum(load.num_device_pages for load in step.sequences)
        num_host = sum(load.num_pages for load in step.sequences) - num_device
        if num_device > 0 and step.device_bytes > 0:
            self.device_page_bytes += 0.4 * (step.device_bytes / num_device - self.device_page_bytes)
        if num_host > 0 and step.host_bytes > 0:
            self.host_page_bytes += 0.4 * (step.host_bytes / num_host - self.host_page_bytes)
        disturbed = step.moved_s > _DISTURBED * step.step_s
        device_shocked = self.device.observe(step.device_bytes, step.device_s)
        host_shocked = self.host.observe(step.host_bytes, step.host_s, disturbed=disturbed)
        hidden_s = 0.0
        if step.host_s > 0 and (step.device_wait_s or step.host_wait_s):
            # Whichever waits, the two clocks agree on how long the device was at something else.
            hidden_s = step.host_s + step.host_wait_s - step.device_s - step.device_wait_s
            self._hidden.append(hidden_s)
        self._rest.append(max(0.0, step.step_s - step.moved_s - max(step.device_s + hidden_s, step.host_s)))
        return device_shocked or host_shocked

    def sides(self, num_device: float, num_pages: float) -> tuple[float, float]:
        """When device and host have their parts, seconds after both began."""
        device_s = self.device.seconds(num_device * self.device_page_bytes)
        if num_device >= num_pages:
            return device_s + max(0.0, self.hidden_s), 0.0
        return device_s + self.hidden_s, self.host.seconds((num_pages - num_device) * self.host_page_bytes)

    def step_s(self, num_device: float, num_pages: float) -> float:
        rest_s = median(self._rest) if self._rest else 0.0
        return rest_s + max(self.sides(num_device, num_pages))

    def best(self, num_pages: int, lowest: int, highest: int) -> int:
        """The number of device pages in [lowest, highest] with the shortest step.

        The device's time rises with it and the host's falls, so it is where they cross, or all of them.
        """
        begin, end = lowest, min(highest, num_pages - 1)
        while begin < end:
            middle = (begin + end) // 2
            device_s, host_s = self.sides(middle, num_pages)
            begin, end = (begin, middle) if device_s >= host_s else (middle + 1, end)
        candidates = {max(lowest, begin - 1), max(lowest, min(begin, highest)), highest}
        return min(sorted(candidates), key=lambda count: self.step_s(count, num_pages))


@dataclass(slots=True)
class _Trial:
    """Steps with other settings, and what they say, apart from what is known of the present ones."""

    settings: tuple[int, bool]  # threads, layer ahead
    model: _Model
    num_steps: int = 0  # since it began, measured or not


class FeedbackController:
    """See the module. One for an engine.

    State: the model (two fits over the last steps), the share aimed at, each running sequence's pages on the way there,
    how often the split has turned round, the settings and the trial under way, the admission limit.

    Why it does not oscillate: the share changes only where the model sees a gain of `_BAND` of the step, doubled each
    time that the change is in the other direction than the last one, and halved after `_FORGIVEN` steps at rest. A
    gain is less than a whole step, so however wrong the model is, there are at most six turns, and one more every
    32 steps, until load or machine change and counting starts again.

    Raises:
        ValueError: the configuration makes no sense; the message has the numbers.
    """

    def __init__(self, config: FeedbackConfig) -> None:
        for name, value, least in (
            ("device_page_bytes", config.device_page_bytes, 1),
            ("num_device_pages", config.num_device_pages, 0),
            ("min_device_pages", config.min_device_pages, 0),
            ("max_threads", config.max_threads, 1),
            ("max_num_seqs", config.max_num_seqs, 1),
            ("horizon_steps", config.horizon_steps, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if config.host_page_read_bytes <= 0 or not 0 < config.move_share <= 1:
            raise ValueError(
                f"host_page_read_bytes is {config.host_page_read_bytes}, move_share {config.move_share}"
            )
        if not 0 <= config.fixed_share <= 1:
            raise ValueError(f"fixed_share is {config.fixed_share}; it must be from 0 to 1")
        self.config = config
        self._model = _Model(config)
        self._link: deque[float] = deque(maxlen=5)  # bytes a second of the last moves
        self._share: float | None = None
        self._splits: dict[int, int] = {}
        self._num_pages = 0  # of the running sequences
        self._num_counted_pages = 0  # the same when the counting of turns began
        self._direction = 0
        self._num_turns = 0
        self._settings = (config.max_threads, False)
        self._num_foreign = 0  # steps in a row that ran with settings never asked for
        self._obeyed = True
        self._trial: _Trial | None = None
        self._tried: set[tuple[int, bool]] = set()
        self._steps_at_rest = 0
        self._steps_since_trial = _TRIAL_REST
        self._stale_after = _STALE
        self._mass_is_low = False  # since the set of sequences changed, looking ahead has cost mass
        self._limit = config.max_num_seqs
        self._limit_reason = LimitReason.CONFIGURED
        self._limit_wanted = config.max_num_seqs
        self._steps_to_limit = 0

    def plan(self, sequences: Sequence[SequenceLoad]) -> Decision:
        """The decision for sequences of which no step was measured, say because some have just been admitted."""
        self._follow(sequences)
        return self._decide(sequences, None)

    def initial_pages(self, num_pages: int) -> int:
        """Device pages for a new sequence of so many pages, by what is known before its first step.

        No sequence need give up pages for it: if the device is full, the scheduler makes room as for any other.
        """
        if self.config.mode is Mode.FIXED:
            share = self.config.fixed_share
        else:
            total = num_pages + self._num_pages
            highest = min(total, self.config.num_device_pages)
            share = self._model.best(total, 0, highest) / total if total else 0.0
        return max(min(self.config.min_device_pages, num_pages), math.floor(share * num_pages))

    def decide(self, measurement: StepMeasurement) -> Decision:
        """Learn from a step and say how to go on. Sequences that are not in it any more are forgotten."""
        self._follow(measurement.sequences)
        if self.config.mode is Mode.MEASURED and measurement.num_prompt_tokens == 0 and measurement.sequences:
            self._learn(measurement)
        return self._decide(measurement.sequences, measurement.retained_mass)

    def _follow(self, sequences: Sequence[SequenceLoad]) -> None:
        """Take up new sequences with the pages that they have, forget those that have ended."""
        num_pages = sum(load.num_pages for load in sequences)
        previous = self._splits
        self._splits = {
            load.key: min(previous.get(load.key, load.num_device_pages), load.num_pages) for load in sequences
        }
        others = self._splits.keys() != previous.keys()
        self._num_pages = num_pages
        if others or not 1 / 1.5 <= num_pages / max(1, self._num_counted_pages) <= 1.5:
            self._num_counted_pages = num_pages
            self._start_counting()
            self._trial = None
        if others:
            self._mass_is_low = False
            self._steps_to_limit = 0
            self._stale_after = _STALE
            if self._model.steps_without_host >= _STALE:
                self._model.host.forget()

    def _start_counting(self) -> None:
        """The load or the machine is another one: turns and trials of before say nothing of it."""
        self._direction = self._num_turns = 0
        self._steps_at_rest = 0
        self._tried.clear()

    def _learn(self, step: StepMeasurement) -> None:
        if step.moved_bytes > 0 and step.moved_s > 0:
            self._link.append(step.moved_bytes / step.moved_s)
        settings = (step.num_threads, step.layer_ahead)
        if self._model.steps_without_host >= self._stale_after:
            # What made the host slow may have ended, and nobody would notice. Each time in vain, the next one is later.
            self._model.host.forget()
            self._model.steps_without_host = 0
            self._stale_after = min(2 * self._stale_after, _MOST_STALE)
            self._start_counting()
        if settings == self._settings:
            self._num_foreign = 0
            if self._model.observe(step):
                self._start_counting()
                self._trial = None
        elif self._trial is not None and settings == self._trial.settings:
            self._trial.model.observe(step)
        else:
            # A step or two may have been under way when settings changed; more of them, and they are not ours to
            # change.
            self._num_foreign += 1
            if self._num_foreign >= _MIN_SAMPLES or self._model.num_steps == 0:
                self._settings, self._trial = settings, None
                self._obeyed = self._obeyed and self._model.num_steps == 0
                self._model.observe(step)

    def _decide(self, sequences: Sequence[SequenceLoad], retained_mass: float | None) -> Decision:
        config = self.config
        num_pages = sum(load.num_pages for load in sequences)
        if not num_pages:
            return self._decision(sequences, 0.0, Reason.IDLE, "nothing runs")
        floor = config.mass_floor
        is_low = floor is not None and retained_mass is not None and retained_mass < floor
        highest = min(num_pages, config.num_device_pages)
        lowest = min(highest, sum(min(config.min_device_pages, load.num_pages) for load in sequences))
        if config.mode is Mode.FIXED:
            self._share = config.fixed_share
            reason, text = Reason.FIXED, f"{config.fixed_share:.0%} of the pages on the device, as configured"
        else:
            reason, text = self._aim(num_pages, lowest, highest, may_narrow=not is_low)
            self._try_settings(num_pages, lowest, highest, is_low=is_low)
            if self._trial is not None and reason in (Reason.BALANCED, Reason.DEVICE_FULL):
                threads, ahead = self._trial.settings
                reason = Reason.TRIAL
                text = (
                    f"trying {threads} threads, {'a' if ahead else 'not a'} layer ahead, for {_TRIAL} steps"
                )
        if is_low:
            self._mass_is_low = True
            self._settings = (self._settings[0], False)
            reason = Reason.MASS_BELOW_FLOOR
            text = f"a head retained {retained_mass:.4f} of its mass, the floor is {floor:.4f}; {text}"
        assert self._share is not None
        target = min(highest, max(lowest, round(self._share * num_pages)))
        self._approach(sequences, target, num_pages)
        self._limit_sequences(len(sequences), num_pages)
        return self._decision(sequences, target / num_pages, reason, text)

    def _aim(self, num_pages: int, lowest: int, highest: int, *, may_narrow: bool) -> tuple[Reason, str]:
        """Change the share if another one gains enough, and pays for its moves; why it is what it is."""
        model = self._model
        best = model.best(num_pages, lowest, highest)
        measured = self.config.mode is Mode.MEASURED and (model.device.is_measured or model.host.is_measured)
        band = _BAND if measured else _PREDICTED_BAND
        if highest == num_pages and not model.host.is_measured:
            # Without need the host is not asked: by description it must gain more than that may be wrong by.
            alone_s = model.step_s(num_pages, num_pages)
            best = num_pages if model.step_s(best, num_pages) > (1 - _PREDICTED_BAND) * alone_s else best
        if self._share is None:
            self._share = sum(self._splits.values()) / num_pages
        aim = min(highest, max(lowest, round(self._share * num_pages)))
        if best < aim and not may_narrow:
            best = aim
        present_s, best_s = model.step_s(aim, num_pages), model.step_s(best, num_pages)
        direction = (best > aim) - (best < aim)
        turns = self._num_turns + (direction == -self._direction)
        noise = max(model.device.spread, model.host.spread) / math.sqrt(_WINDOW)
        is_worth_it = direction and present_s - best_s > max(band, noise) * 2**turns * present_s
        move_s = abs(best - sum(self._splits.values())) * self.config.device_page_bytes / self._link_bandwidth
        is_too_dear = is_worth_it and (present_s - best_s) * self.config.horizon_steps <= move_s
        if is_worth_it and not is_too_dear:
            self._share, self._num_turns, self._direction = best / num_pages, turns, direction
            self._steps_at_rest = 0
            self._tried.clear()  # with more or fewer pages on the host its threads may matter more
            aim = best
        else:
            self._steps_at_rest += 1
            if self._steps_at_rest % _FORGIVEN == 0:
                self._num_turns = max(0, self._num_turns - 1)
        device_s, host_s = model.sides(aim, num_pages)
        text = (
            f"{aim} of {num_pages} pages on the device: device {1e3 * device_s:.2f} ms, "
            f"host {1e3 * host_s:.2f} ms{'' if measured else ', by the description'}"
        )
        if not measured:
            reason = Reason.PREDICTED
        elif is_too_dear:
            reason = Reason.MOVE_TOO_DEAR
            text += f"; {best} would save {1e3 * (present_s - best_s):.3f} ms a step, moves cost {1e3 * move_s:.1f} ms"
        elif is_worth_it:
            reason = Reason.HOST_SLOWER if direction > 0 else Reason.DEVICE_SLOWER
        else:
            reason = Reason.BALANCED
        if aim == num_pages and reason is not Reason.MOVE_TOO_DEAR:
            reason = Reason.HOST_LOSES
            text += "; no page on the host, which would only add to the step"
        elif aim == self.config.num_device_pages and host_s > device_s and reason is not Reason.PREDICTED:
            reason = Reason.DEVICE_FULL
            text += "; the device has no page left"
        return reason, text

    @property
    def _link_bandwidth(self) -> float:
        if self._link:
            return median(self._link)
        device, nodes = self.config.machine.device, self.config.machine.nodes
        return device.link_bandwidth if device is not None else nodes[0].read_bandwidth / 2

    def _approach(self, sequences: Sequence[SequenceLoad], target: int, num_pages: int) -> None:
        """Change the sequences' pages towards `target` in all, by no more than a step's moves may take."""
        present = sum(self._splits.values())
        actual = sum(load.num_device_pages for load in sequences)
        step_s = self._model.step_s(min(actual, num_pages), num_pages)
        allowance_s = self.config.move_share * step_s
        pages = max(1, int(allowance_s * self._link_bandwidth / self.config.device_page_bytes))
        # Not further ahead of what was measured than a few steps' moves: then they would all come at once.
        begin = max(actual - 3 * pages, min(actual + 3 * pages, present))
        wanted = max(begin - pages, min(begin + pages, target))
        wanted = min(wanted, self.config.num_device_pages)
        self._share_out(sequences, wanted)

    def _share_out(self, sequences: Sequence[SequenceLoad], wanted: int) -> None:
        """So many device pages over the sequences with the fewest changes: those furthest from the others change."""
        num_sequences = len(sequences)
        least = {
            load.key: min(
                self.config.min_device_pages, load.num_pages, self.config.num_device_pages // num_sequences
            )
            for load in sequences
        }
        splits = {load.key: max(least[load.key], self._splits[load.key]) for load in sequences}
        grows = wanted > sum(splits.values())

        def at(level: float) -> dict[int, int]:
            shares = {
                load.key: max(least[load.key], math.floor(level * load.num_pages)) for load in sequences
            }
            change = max if grows else min
            return {key: change(splits[key], share) for key, share in shares.items()}

        low, high = 0.0, 1.0
        if sum(splits.values()) != wanted:
            for _ in range(24):
                middle = (low + high) / 2
                low, high = (middle, high) if sum(at(middle).values()) <= wanted else (low, middle)
            splits = at(low)
            left = wanted - sum(splits.values())
            for load in sequences if left > 0 else ():
                extra = min(left, 1, load.num_pages - splits[load.key])
                splits[load.key] += extra
                left -= extra
        self._splits = splits

    def _try_settings(self, num_pages: int, lowest: int, highest: int, *, is_low: bool) -> None:
        """Threads and looking ahead are not modelled but tried, once for a load, and kept if the step gets shorter."""
        trial, model = self._trial, self._model
        self._steps_since_trial += 1
        if self.config.mode is not Mode.MEASURED or is_low:
            self._trial = None
            return
        if trial is None:
            is_due = self._steps_at_rest >= _SETTLED and self._steps_since_trial >= _TRIAL_REST
            if self._obeyed and is_due and model.host.is_measured and highest < num_pages:
                candidates = self._candidates()
                if candidates:
                    self._tried.add(candidates[0])
                    self._trial = _Trial(candidates[0], _Model(self.config, model))
            return
        trial.num_steps += 1
        self._steps_since_trial = 0
        if not trial.model.host.is_measured:
            if trial.num_steps > 2 * _TRIAL:
                self._trial, self._obeyed = None, False  # nobody does as asked
            return
        before_s = model.step_s(model.best(num_pages, lowest, highest), num_pages)
        after_s = trial.model.step_s(trial.model.best(num_pages, lowest, highest), num_pages)
        if after_s > _TRIAL_LOSS * before_s:
            self._trial = None
        elif trial.model.num_steps >= _TRIAL:
            self._trial = None
            if after_s < _TRIAL_GAIN * before_s:
                self._settings, self._model = trial.settings, trial.model
                self._direction = self._num_turns = 0

    def _candidates(self) -> list[tuple[int, bool]]:
        threads, ahead = self._settings
        change = max(1, threads // 8)
        others = [(threads, not ahead)] if self.config.can_look_ahead and not self._mass_is_low else []
        if self.config.can_set_threads:
            others += [
                (max(1, threads - change), ahead),
                (min(self.config.max_threads, threads + change), ahead),
            ]
        return [other for other in others if other != self._settings and other not in self._tried]

    def _limit_sequences(self, num_running: int, num_pages: int) -> None:
        """Now and then, how many sequences like the running ones are worth running at the same time."""
        self._steps_to_limit -= 1
        if self._steps_to_limit > 0 or self.config.mode is Mode.FIXED:
            return
        self._steps_to_limit = _LIMIT_STEPS
        limit, reason = self._find_limit(num_pages / num_running)
        # Twice the same way: a limit that follows the noise makes requests wait for nothing.
        if (limit - self._limit) * (self._limit_wanted - self._limit) > 0:
            self._limit, self._limit_reason = limit, reason
        self._limit_wanted = limit

    def _find_limit(self, pages_each: float) -> tuple[int, LimitReason]:
        config, model = self.config, self._model

        def step_s(count: int) -> tuple[float, bool]:
            num_pages = math.ceil(count * pages_each)
            highest = min(num_pages, config.num_device_pages)
            lowest = min(highest, count * config.min_device_pages)
            best = model.best(num_pages, lowest, highest)
            device_s, host_s = model.sides(best, num_pages)
            known = model.host.is_measured or config.mode is Mode.PREDICTED
            limits = known and best < num_pages and host_s >= 0.9 * device_s
            return model.step_s(best, num_pages), limits

        def objection(count: int) -> LimitReason:
            """Against running so many; only where the host is at work, and not ahead of the device."""
            present_s, host_limits = step_s(count)
            if not host_limits:
                return LimitReason.CONFIGURED
            if config.target_step_s is not None and present_s > config.target_step_s:
                return LimitReason.STEP_TIME
            before = (count - 1) / step_s(count - 1)[0]
            gained = count / present_s - before
            return (
                LimitReason.NO_THROUGHPUT
                if gained < _MARGINAL * before / (count - 1)
                else LimitReason.CONFIGURED
            )

        begin, end = 1, config.max_num_seqs
        reason = LimitReason.CONFIGURED
        while begin < end:
            middle = (begin + end + 1) // 2
            against = objection(middle)
            if against is LimitReason.CONFIGURED:
                begin = middle
            else:
                end, reason = middle - 1, against
        return begin, reason

    def _decision(
        self, sequences: Sequence[SequenceLoad], share: float, reason: Reason, text: str
    ) -> Decision:
        num_pages = sum(load.num_pages for load in sequences)
        predicted_s = self._model.step_s(round(share * num_pages), num_pages) if num_pages else 0.0
        threads, ahead = self._settings if self._trial is None else self._trial.settings
        return Decision(
            splits=tuple(self._splits.items()),
            device_share=share,
            num_threads=threads,
            layer_ahead=ahead,
            max_running=self._limit,
            predicted_step_s=predicted_s,
            reason=reason,
            limit_reason=self._limit_reason,
            message=text,
        )


def _bandwidths(machine: Machine) -> tuple[float, float]:
    """Bytes a second of the device's memory, and of the host's nodes together."""
    host = sum(node.read_bandwidth for node in machine.nodes)
    return (machine.nodes[0] if machine.device is None else machine.device.memory).read_bandwidth, host


def replay(config: FeedbackConfig, measurements: Iterable[StepMeasurement]) -> tuple[Decision, ...]:
    """The decisions of a new controller on recorded measurements."""
    controller = FeedbackController(config)
    return tuple(controller.decide(measurement) for measurement in measurements)
