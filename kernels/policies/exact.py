"""Attend to every token."""

from torch import Tensor

from hybridgen.kernels.attention import AttentionStep, Ticket


class ExactPolicy:
    needs_index = False

    def submit(
        self, step: AttentionStep, layer: int, q: Tensor, *, sliding_window: int = 0, soft_cap: float = 0.0
    ) -> Ticket:
        return step.submit(layer, q, sliding_window=sliding_window, soft_cap=soft_cap)

    def ahead_rows(self, step: AttentionStep) -> Tensor | None:
        return None  # every key is read whatever the query

    def ahead(self, step: AttentionStep, layer: int, q: Tensor, *, soft_cap: float = 0.0) -> None:
        raise AssertionError("nobody asked")

    def end_step(self) -> None:
        pass
