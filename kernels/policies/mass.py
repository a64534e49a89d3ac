"""Attend exactly to the fewest tokens that hold a share of the softmax mass, found by an int8 index of all tokens.

Per sequence and KV head, the index gives every token's logit nearly. Selected are the fewest tokens whose softmax
probabilities, averaged over the query heads of the group, add up to `mass`; with them the first few tokens and the page
that is not full yet. What each query head retained is measured: exact logits of the selected tokens against estimates
of the others. Where a head fell below `floor`, tokens are added until none does, in the end all, so flat heads
become exact by themselves. So do heads that select over 60 % of the tokens: reading everything in a row is as fast.

Every part of the result is a mean of values. Let eps be the true mass of the tokens left out and e that of the
tail term. The error is at most max(eps, e) times the diameter of the values, without the tail term eps times it.
The measured mass differs from the true one by the estimates' rounding error, which is counted against the floor at
three standard deviations.

A layer ahead (`ahead`), scan and selection use queries foretold from the layer before, with half as much to be left
out, while that layer is still at work. The true queries then attend to what was selected: no logit is ever a foretold
one. What the rest holds by the true queries is estimated from every eighth 32 tokens of it, doubled, and KV heads
that do not hold the floor are scanned again. That notices a stale selection; a single token outside the sample that
only the true query turns to, it does not notice. Without `ahead` every token's estimate is the true query's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hybridgen.kernels import _cpu
from hybridgen.kernels.attention import AttentionStep, Ticket

NUM_SINKS = 4  # first tokens, to which many heads turn when they have nothing to say (arXiv 2309.17453)
MIN_TOKENS = 1024  # below, a scan saves less than it costs


@dataclass(frozen=True, slots=True)
class LayerMass:
    """What a layer's attention retained since it was last asked.

    Attributes:
        count: query heads of tokens that were measured; sequences too short to scan and chunks of prompts are not.
        mean, minimum: of their retained masses; 1 if nothing was measured.
        scanned, attended: tokens, per KV head.
        widened: KV heads of tokens that fell below the floor at first.
        full: KV heads of tokens that were attended in full after all.
        foretold: KV heads of tokens that were selected for a layer ahead.
        rescanned: of these, that did not hold the floor.
    """

    count: int
    mean: float
    minimum: float
    scanned: int
    attended: int
    widened: int
    full: int
    foretold: int
    rescanned: int


class MassPolicy:
    """See the module.

    Args:
        mass: of the softmax, that selected tokens hold on average over the query heads of a group.
        floor: that they hold for every head; default: twice as much may be left out as on average.
        tail: whether the rest counts as its estimated mass times the mean of values of some pages.
        min_tokens: sequences with fewer tokens on the tier are attended in full.

    Raises:
        ValueError: not 0 < floor <= mass < 1.
    """

    needs_index = True

    def __init__(
        self,
        num_layers: int,
        *,
        mass: float = 0.99,
        floor: float | None = None,
        tail: bool = True,
        num_sinks: int = NUM_SINKS,
        min_tokens: int = MIN_TOKENS,
    ) -> None:
        self.mass = mass
        self.floor = max(1 - 2 * (1 - mass), mass / 2) if floor is None else floor
        if not 0 < self.floor <= mass < 1:
            raise ValueError(f"mass is {mass} and floor is {self.floor}; they must be 0 < floor <= mass < 1")
        self.tail = tail
        self.num_sinks = num_sinks
        self.min_tokens = min_tokens
        self._record = _cpu.MassRecord(num_layers)
        self._step: AttentionStep | None = None
        self._handle: _cpu.MassStep | None = None
        # By layer; with the queries that it reads.
        self._foretellings: dict[int, tuple[_cpu.MassForetelling, Tensor]] = {}

    def submit(
        self, step: AttentionStep, layer: int, q: Tensor, *, sliding_window: int = 0, soft_cap: float = 0.0
    ) -> Ticket:
        """Begin a layer's attention. Layers with a sliding window are attended in full.

        Raises:
            ValueError: the step's pages have no index, or q does not fit.
        """
        handle = self._prepare(step)
        foretelling, _ = self._foretellings.pop(layer, (None, None))
        if sliding_window or not handle.num_scanned:
            return step.submit(layer, q, sliding_window=sliding_window, soft_cap=soft_cap)
        q_stride = step.query_stride(q)
        out = torch.empty(q.shape, dtype=torch.float32)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        job = handle.submit(
            layer,
            q.data_ptr(),
            q_stride,
            out.data_ptr(),
            q.shape[1] * q.shape[2],
            lse.data_ptr(),
            soft_cap,
            foretelling,
        )
        return Ticket(job, q, out, lse)

    def ahead_rows(self, step: AttentionStep) -> Tensor | None:
        """[rows], int64: tokens whose queries `ahead` takes; None if there are none."""
        rows = self._prepare(step).scanned_rows
        return torch.tensor(rows) if rows else None

    def ahead(self, step: AttentionStep, layer: int, q: Tensor, *, soft_cap: float = 0.0) -> None:
        """Begin to select for a layer whose attention is submitted later in this step, if with the same soft cap.

        Args:
            q: [rows, num_heads, head_dim], contiguous: foretold queries of the tokens that `ahead_rows` names.

        Raises:
            ValueError: q does not fit.
        """
        handle = self._prepare(step)
        layout = step.pages.layout
        shape = (handle.num_scanned, step.num_heads, layout.head_dim)
        if q.shape != shape or q.dtype != layout.dtype or not q.is_contiguous():
            raise ValueError(f"expected contiguous {layout.dtype} {shape}, got {q.dtype} {tuple(q.shape)}")
        stride = step.num_heads * layout.head_dim
        self._foretellings[layer] = handle.foretell(layer, q.data_ptr(), stride, soft_cap), q

    def end_step(self) -> None:
        self._foretellings.clear()
        self._step = self._handle = None

    def stats(self) -> tuple[LayerMass, ...]:
        """Per layer, since the last call. Not while attention is in flight."""
        return tuple(
            LayerMass(count, total / count if count else 1.0, minimum, *others)
            for count, total, minimum, *others in self._record.read()
        )

    def _prepare(self, step: AttentionStep) -> _cpu.MassStep:
        if self._handle is None or self._step is not step:
            if step.pages.index is None:
                raise ValueError("the mass policy needs pages with an index")
            self._foretellings.clear()
            self._step = step
            self._handle = _cpu.MassStep(
                step.handle,
                step.pool.isa,
                self.mass,
                self.floor,
                self.tail,
                self.num_sinks,
                self.min_tokens,
                self._record,
            )
        return self._handle
