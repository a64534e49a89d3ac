"""HybridGen's attention (Lin et al., 2026), for comparison: logits of all host keys, values of the top k alone.

Per sequence and query head, the k = max(1, int(ratio * host tokens)) tokens with the largest logits are attended to,
the earlier one of two that are equal. Host and device merge by their log-sum-exp, which is one softmax over the
device's logits and the k selected ones. The rest is ignored and renormalised away.

The ratio follows the times of host and device (`RatioController`). One state serves all requests, and nothing bounds
what an answer loses: on a slow host the ratio falls to its minimum, whatever mass that leaves. The retained mass is
measured for the statistics and influences nothing.

A layer ahead, the logits themselves are those of the foretold query, in the softmax too.

Unlike the published scheme, values are summed where they lie instead of being sent to the device (the sum is the
same); chunks of prompts, short sequences and layers with a sliding window are attended in full; and no cap limits the
keys that are scored to the latest ones.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hybridgen.kernels import _cpu
from hybridgen.kernels.attention import AttentionStep, Job, Ticket
from hybridgen.kernels.policies.mass import MIN_TOKENS

RATIO = 0.05
MIN_RATIO = 0.01
MAX_RATIO = 0.5
FEEDBACK_INTERVAL = 4


@dataclass(frozen=True, slots=True)
class RatioController:
    """The published feedback: more tokens while the host is not slower than the device, fewer when it is.

    Attributes:
        ratio: of the host tokens, that each query head attends to.
        interval: steps between decisions; each is made on the times of these steps together.
        num_steps, host_s, device_s: since the last decision.
    """

    ratio: float = RATIO
    interval: int = FEEDBACK_INTERVAL
    num_steps: int = 0
    host_s: float = 0.0
    device_s: float = 0.0

    def observe(self, host_s: float, device_s: float) -> "RatioController":
        """The controller after a step that took so many seconds on host and device, each for itself."""
        host_s, device_s = self.host_s + host_s, self.device_s + device_s
        if self.num_steps + 1 < self.interval:
            return replace(self, num_steps=self.num_steps + 1, host_s=host_s, device_s=device_s)
        ratio = min(self.ratio * 1.2, MAX_RATIO) if host_s <= device_s else max(self.ratio * 0.8, MIN_RATIO)
        return RatioController(ratio, self.interval)


@dataclass(frozen=True, slots=True)
class LayerTopK:
    """What a layer's attention retained since it was last asked.

    Attributes:
        count: query heads of tokens that were measured; short sequences and chunks of prompts are not.
        mean, minimum: of their shares of the softmax mass, of the host's tokens alone; 1 if nothing was measured. Of a
            foretold query, not of the true one.
        scanned, attended: tokens, per query head.
    """

    count: int
    mean: float
    minimum: float
    scanned: int
    attended: int


@dataclass(slots=True)
class _Waits:
    """How long the caller has waited for the host in a step."""

    clock: Callable[[], float]
    seconds: float = 0.0


class _TimedTicket(Ticket):
    __slots__ = ("_waits",)

    def __init__(self, handle: Job, q: Tensor, out: Tensor, lse: Tensor, waits: _Waits) -> None:
        super().__init__(handle, q, out, lse)
        self._waits = waits

    def wait(self) -> tuple[Tensor, Tensor]:
        begin_s = self._waits.clock()
        result = super().wait()
        self._waits.seconds += self._waits.clock() - begin_s
        return result


class _ForetoldTicket(Ticket):
    """Two parts of a layer: `foretold` is about `rows` of the result, `others` about the rest."""

    __slots__ = ("_foretold", "_others", "_rows")

    def __init__(self, others: Ticket, foretold: Ticket, rows: Tensor) -> None:
        self._others = others
        self._foretold = foretold
        self._rows = rows

    def is_done(self) -> bool:
        return self._others.is_done() and self._foretold.is_done()

    def ended_s(self) -> float | None:
        ends = [end_s for ticket in (self._others, self._foretold) if (end_s := ticket.ended_s()) is not None]
        return max(ends, default=None)

    def wait(self) -> tuple[Tensor, Tensor]:
        out, lse = self._others.wait()
        out[self._rows], lse[self._rows] = self._foretold.wait()
        return out, lse


class HybridGenPolicy:
    """See the module.

    Args:
        ratio: of the host tokens, that each query head attends to; at the start, with `adapt`.
        adapt: whether the ratio follows the times of host and device.
        interval: steps between decisions on the ratio.
        min_tokens: sequences with fewer tokens on the tier are attended in full.
        clock: in seconds.

    Raises:
        ValueError: the ratio is not in (0, 1] or the interval is less than 1.
    """

    needs_index = False

    def __init__(
        self,
        num_layers: int,
        *,
        ratio: float = RATIO,
        adapt: bool = True,
        interval: int = FEEDBACK_INTERVAL,
        min_tokens: int = MIN_TOKENS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not 0 < ratio <= 1:
            raise ValueError(f"the ratio must be in (0, 1], got {ratio}")
        if interval < 1:
            raise ValueError(f"the interval must be at least 1 step, got {interval}")
        self.controller = RatioController(ratio, interval)
        self.adapt = adapt
        self.min_tokens = min_tokens
        self._clock = clock
        self._record = _cpu.TopKRecord(num_layers)
        self._step: AttentionStep | None = None
        self._handle: _cpu.HybridGenStep | None = None
        self._rows = torch.zeros(0, dtype=torch.int64)
        self._ahead: dict[
            int, tuple[Ticket, float]
        ] = {}  # by layer; with the soft cap that it was foretold with
        self._begin_s = 0.0
        self._waits = _Waits(clock)

    def submit(
        self, step: AttentionStep, layer: int, q: Tensor, *, sliding_window: int = 0, soft_cap: float = 0.0
    ) -> Ticket:
        """Begin a layer's attention. Layers with a sliding window are attended in full.

        Where `ahead` was told of the layer, rows of scored sequences are what the foretold query gave.

        Raises:
            ValueError: q does not fit, or the layer was foretold with another soft cap.
        """
        handle = self._prepare(step)
        foretold = self._ahead.pop(layer, None)
        if sliding_window or not handle.rows:
            return step.submit(layer, q, sliding_window=sliding_window, soft_cap=soft_cap)
        if foretold is None:
            return self._submit(step, layer, q, len(q), soft_cap, scored=True, others=True)
        ticket, ahead_soft_cap = foretold
        if ahead_soft_cap != soft_cap:
            raise ValueError(f"layer {layer} was foretold with soft cap {ahead_soft_cap}, not {soft_cap}")
        others = self._submit(step, layer, q, len(q), soft_cap, scored=False, others=True)
        return _ForetoldTicket(others, ticket, self._rows)

    def ahead_rows(self, step: AttentionStep) -> Tensor | None:
        """[rows], int64: the tokens whose queries `ahead` takes; None for none.

        Sequences whose newest token is stored on this tier are not foretold: its key is not there yet.
        """
        handle = self._prepare(step)
        return self._rows if handle.rows and handle.is_settled else None

    def ahead(self, step: AttentionStep, layer: int, q: Tensor, *, soft_cap: float = 0.0) -> None:
        """Begin to attend in a later layer of the step with foretold queries of `ahead_rows`, [rows, heads, head_dim].

        Not for layers with a sliding window.

        Raises:
            ValueError: there is nothing to foretell, or q does not fit.
        """
        rows = self.ahead_rows(step)
        if rows is None:
            raise ValueError("no row of this step is to be foretold")
        ticket = self._submit(step, layer, q, len(rows), soft_cap, scored=True, others=False)
        self._ahead[layer] = ticket, soft_cap

    def end_step(self) -> None:
        """The step is over. Its times, for the ratio: the host's is that of the pool's threads, as if they had worked
        on nothing else; the device's is that of the caller from the first layer on, without waiting for the host."""
        host_s = self._record.read_busy_ns() * 1e-9
        if self.adapt and self._handle is not None and self._handle.rows and self._step is not None:
            device_s = self._clock() - self._begin_s - self._waits.seconds
            self.controller = self.controller.observe(host_s / self._step.pool.num_threads, device_s)
        self._ahead.clear()
        self._step = self._handle = None

    def stats(self) -> tuple[LayerTopK, ...]:
        """Per layer, since the last call. Not while attention is in flight."""
        return tuple(
            LayerTopK(count, total / count if count else 1.0, minimum, scanned, attended)
            for count, total, minimum, scanned, attended in self._record.read()
        )

    def _submit(
        self,
        step: AttentionStep,
        layer: int,
        q: Tensor,
        num_rows: int,
        soft_cap: float,
        *,
        scored: bool,
        others: bool,
    ) -> Ticket:
        q_stride = step.query_stride(q, None if others else num_rows)
        out = torch.empty(q.shape, dtype=torch.float32)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        job = self._prepare(step).submit(
            layer,
            q.data_ptr(),
            q_stride,
            out.data_ptr(),
            q.shape[1] * q.shape[2],
            lse.data_ptr(),
            soft_cap,
            scored,
            others,
        )
        return _TimedTicket(job, q, out, lse, self._waits)

    def _prepare(self, step: AttentionStep) -> "_cpu.HybridGenStep":
        if self._handle is None or self._step is not step:
            self._ahead.clear()
            self._step = step
            self._handle = _cpu.HybridGenStep(
                step.handle, self.controller.ratio, self.min_tokens, self._record
            )
            self._rows = torch.tensor(self._handle.rows, dtype=torch.int64)
            self._waits = _Waits(self._clock)
            self._begin_s = self._clock()
        return self._handle
