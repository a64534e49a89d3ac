"""How much of each sequence the device keeps, so that device and host finish together. No clock, no tensors, no I/O.

`FeedbackController.decide` takes what a step's clocks said and returns what the next steps are to do. It is a function of
the measurements it was given: `replay` of a recorded list makes the same decisions again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

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
    MASS_BELOW_FLOOR = "mass_below_floor"  # the host retained too little: nothing is made faster at its expense
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
        splits: (key, device pages to keep): what `Scheduler.set_split` takes. On the way to `device_share`, a few moves a step.
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
        machine: gives the times until steps are measured. Without a device, its first node stands for the device's memory.
        device_page_bytes: K and V of one page: what the device reads of it in a step, and what a move copies.
        host_page_read_bytes: that the host is expected to read of one of its pages in a step.
        num_device_pages: of the device tier: a hard bound for all sequences together.
        min_device_pages: a sequence's sinks and the page it writes to: it has no fewer, while they exist.
        max_threads: of the pool.
        max_num_seqs: that may run at all.
        fixed_share: of a sequence's pages, in mode `fixed`.
        can_look_ahead: whether policy and model can look a layer ahead.
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
    mass_floor: float | None = None
    target_step_s: float | None = None
    horizon_steps: int = 256
    move_share: float = 0.5


class FeedbackController:
    """See the module. One for an engine."""

    def __init__(self, config: FeedbackConfig) -> None:
        self.config = config

    def plan(self, sequences: Sequence[SequenceLoad]) -> Decision:
        """The decision for sequences of which no step was measured, say because some have just been admitted."""
        raise NotImplementedError

    def initial_pages(self, num_pages: int) -> int:
        """Device pages for a new sequence of so many pages, by what is known before its first step."""
        raise NotImplementedError

    def decide(self, measurement: StepMeasurement) -> Decision:
        """Learn from a step and say how to go on. Sequences that are not in it any more are forgotten."""
        raise NotImplementedError


def replay(config: FeedbackConfig, measurements: Iterable[StepMeasurement]) -> tuple[Decision, ...]:
    """The decisions of a new controller on recorded measurements."""
    controller = FeedbackController(config)
    return tuple(controller.decide(measurement) for measurement in measurements)
