"""Keeps device and host finishing together: tells the controller what steps took, and the scheduler what it decides.

Only where the two are processors of their own; otherwise the split changes nothing but which kernel reads a page.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from hybridgen.kernels.page_memory import NodeReads
from hybridgen.scheduler.feedback import Decision, FeedbackController, Reason, SequenceLoad, StepMeasurement
from hybridgen.scheduler.scheduler import Scheduler
from hybridgen.scheduler.step import Step

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class StepClocks:
    """Seconds of one step, added up over its layers, as `StepMeasurement` has them."""

    device_s: float = 0.0
    host_s: float = 0.0
    device_wait_s: float = 0.0
    host_wait_s: float = 0.0
    moved_s: float = 0.0


class Balance:
    """One engine's controller, and what it has decided so far.

    Args:
        page_bytes: K and V of one page.
        num_device_pages: of the device tier, which come first in block tables' numbering.
        node_ids: by position in `NodeReads`.
        num_threads: of the host's pool.
    """

    def __init__(
        self,
        controller: FeedbackController,
        scheduler: Scheduler,
        *,
        page_bytes: int,
        node_ids: tuple[int, ...],
        num_threads: int,
    ) -> None:
        self._controller = controller
        self._scheduler = scheduler
        self._page_bytes = page_bytes
        self._node_ids = node_ids
        self._num_threads = num_threads
        self._layer_ahead = False
        self._heat: Mapping[int, float] = {}
        self.decision: Decision | None = None  # the last one
        self.num_decisions: Counter[Reason] = Counter()  # those that changed the share aimed at
        self.actual_share = 0.0  # of the running sequences' pages on the device, in the last step

    def initial_pages(self, num_pages: int) -> int:
        """Device pages for a new sequence of so many pages, by what is known before its first step."""
        return self._controller.initial_pages(num_pages)

    @property
    def can_look_ahead(self) -> bool:
        return self._controller.config.can_look_ahead

    @property
    def layer_ahead(self) -> bool:
        """Whether the host is to look a layer ahead in the next step."""
        return self._layer_ahead

    def after_step(
        self,
        step: Step,
        clocks: StepClocks,
        reads: NodeReads,
        *,
        step_s: float,
        retained_mass: float | None,
        heat: Mapping[int, float],
    ) -> None:
        """Learn from a step that was committed; what is decided takes effect with the next one that is scheduled.

        Args:
            heat: host pages, counted from 0, to softmax mass, of those that were measured: the hottest are promoted
                first. The same object until it has changed.
        """
        scheduler = self._scheduler
        loads = tuple(
            SequenceLoad(item.key, len(item.block_table), item.num_device_pages) for item in step.sequences
        )
        num_device = sum(load.num_device_pages for load in loads)
        num_pages = sum(load.num_pages for load in loads)
        self.actual_share = num_device / num_pages if num_pages else 0.0
        decision = self._controller.decide(
            StepMeasurement(
                sequences=loads,
                step_s=step_s,
                device_s=clocks.device_s,
                host_s=clocks.host_s,
                device_wait_s=clocks.device_wait_s,
                host_wait_s=clocks.host_wait_s,
                device_bytes=num_device * self._page_bytes,
                node_bytes=tuple(zip(self._node_ids, reads.bytes.tolist(), strict=True)),
                moved_bytes=len(step.moves) * self._page_bytes,
                moved_s=clocks.moved_s,
                retained_mass=retained_mass,
                num_prompt_tokens=step.num_tokens - len(step.sequences),
                num_threads=self._num_threads,
                layer_ahead=self._layer_ahead,
            )
        )
        before = self.decision
        self.decision = decision
        self._layer_ahead = decision.layer_ahead
        for key, num_pages_kept in decision.splits:
            if scheduler.has(key):
                scheduler.set_split(key, num_pages_kept)
        if heat is not self._heat:
            self._heat = heat
            first = scheduler.pages.num_device_pages
            scheduler.set_heat({first + page: mass for page, mass in heat.items()})
        scheduler.limit_running(decision.max_running)
        if (
            before is None
            or before.reason is not decision.reason
            or before.max_running != decision.max_running
        ):
            logger.debug(
                "split: %s: %s; up to %d sequences (%s)",
                decision.reason,
                decision.message,
                decision.max_running,
                decision.limit_reason,
            )
        if before is None or abs(before.device_share - decision.device_share) > 0.005:
            self.num_decisions[decision.reason] += 1
