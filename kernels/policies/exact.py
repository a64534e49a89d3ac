"""Attend to every token."""

from torch import Tensor

from hybridgen.kernels.attention import AttentionStep, Ticket


class ExactPolicy:
    needs_index = False

    def submit(
        self, step: AttentionStep, layer: int, q: Tensor, *, sliding_window: int = 0, soft_cap: float = 0.0
    ) -> Ticket:
        return step.submit(layer, q, sliding_window=sliding_window, soft_cap=soft_cap)

    def end_step(self) -> None:
        pass
