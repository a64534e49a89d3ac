"""What a policy is: it answers a layer's queries from one tier's pages, reading as much of them as it sees fit."""

from typing import Protocol

from torch import Tensor

from hybridgen.kernels.attention import AttentionStep, Ticket


class Policy(Protocol):
    """One object serves all steps and layers of a model; steps follow one another."""

    @property
    def needs_index(self) -> bool:
        """Whether pages must have been allocated with an index of K."""
        ...

    def submit(
        self, step: AttentionStep, layer: int, q: Tensor, *, sliding_window: int = 0, soft_cap: float = 0.0
    ) -> Ticket:
        """Begin a layer's attention, as `AttentionStep.submit` does."""
        ...

    def ahead_rows(self, step: AttentionStep) -> Tensor | None:
        """[rows], int64: tokens of the step whose queries `ahead` takes; None for none."""
        ...

    def ahead(self, step: AttentionStep, layer: int, q: Tensor, *, soft_cap: float = 0.0) -> None:
        """Told before `layer` is submitted what the queries of `ahead_rows` will be about: begin to look for it.

        Args:
            q: [rows, num_heads, head_dim], contiguous.
        """
        ...

    def end_step(self) -> None:
        """The step is over: what was kept for its next layers can go."""
        ...
