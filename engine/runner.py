"""Carries a Step out: builds the batch, runs the decoder over the paged KV, returns logits. Decides nothing."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from hybridgen.engine.batch import BatchBuilder
from hybridgen.engine.kv_store import KVStore, RetainedMass
from hybridgen.engine.model import Decoder
from hybridgen.kernels.page_memory import NodeReads
from hybridgen.scheduler.step import Step


class ModelRunner:
    """The decoder and its KV pages on one device."""

    def __init__(self, decoder: Decoder, store: KVStore, device: torch.device) -> None:
        self._decoder = decoder
        self._store = store
        self._device = device
        self._builder = BatchBuilder(device)
        self.reads: NodeReads | None = None  # of the last step

    def run(
        self,
        step: Step,
        known: Mapping[int, Sequence[int]],
        prompt_lens: Mapping[int, int],
        *,
        score_all: Collection[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The step's moves, then one forward pass.

        Args:
            step: at least one sequence.
            known: tokens of every sequence in the step, by key.
            prompt_lens: by key.
            score_all: keys whose every token in this step is to be scored, for prompt log-probabilities.

        Returns:
            logits [sequences with samples, vocab], in the step's order, and for each key in `score_all` that the
            step holds the hidden states [its tokens, embed] of all its positions, for `logits`.
        """
        coming = sum(max(0, prompt_lens[item.key] - item.end) for item in step.sequences)
        self._store.begin_step(step, coming)
        batch = self._builder.build(step, known, prompt_lens)
        attention = self._store.attention(batch)
        rows: list[int] = []
        sampled: list[int] = []  # places within `rows`
        scored: dict[int, slice] = {}
        begin = 0
        for item in step.sequences:
            end = begin + item.end - item.begin
            if item.key in score_all:
                scored[item.key] = slice(len(rows), len(rows) + end - begin)
                rows += range(begin, end)
            elif item.samples:
                rows.append(end - 1)
            if item.samples:
                sampled.append(len(rows) - 1)
            begin = end
        wanted = torch.tensor(rows, dtype=torch.int64, device=self._device)
        hidden = self._decoder.forward(batch.tokens, batch.positions, batch.prompt_lens, attention, wanted)
        self.reads = self._store.end_step()
        if not scored:
            return self._decoder.logits(hidden), {}
        return self._decoder.logits(hidden[sampled]), {key: hidden[span] for key, span in scored.items()}

    @property
    def store(self) -> KVStore:
        """To read clocks and counts from."""
        return self._store

    @property
    def retained(self) -> RetainedMass:
        """What attention kept of the host pages' softmax mass, all steps together."""
        return self._store.retained

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, embed] -> [rows, vocab]."""
        return self._decoder.logits(hidden)

    def prefix_salt(self, prompt_len: int) -> bytes:
        """Sequences whose salts differ must not share pages: their keys would differ for the same tokens.

        Dynamic NTK rotates keys by the prompt's length once it exceeds the original context.
        """
        rope = self._decoder.spec.rope
        if rope is None or not rope.dynamic_factor or prompt_len <= rope.original_max_positions:
            return b""
        return prompt_len.to_bytes(8, "little")

    def forget(self, key: int) -> None:
        """Drop what is kept of an ended sequence."""
        self._builder.forget(key)
