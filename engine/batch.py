"""One step's inputs as tensors. Built from a Step and the sequences it names; holds nothing between steps but a
cache of block-table rows, since a context of 128k tokens has thousands of pages and a step adds at most a few."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridgen.scheduler.step import Step

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Batch:
    """What the decoder and the attention kernels read. `tokens` counts all sequences' new tokens, one after another."""

    tokens: Tensor  # [tokens], int64
    positions: Tensor  # [tokens], int64
    prompt_lens: Tensor  # [tokens], int64
    query_begin: Tensor  # [sequences + 1], int32: sequence s owns tokens [query_begin[s], query_begin[s + 1])
    kv_len: Tensor  # [sequences], int32: tokens cached once this step has stored its own
    block_table: Tensor  # [sequences, pages of the longest], int32; rows are padded with 0
    has_device_pages: bool  # whether any page of the step's sequences is a device page
    has_host_pages: bool


class BatchBuilder:
    """Turns Steps into Batches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: dict[int, tuple[tuple[int, ...], IntArray]] = {}  # by sequence key

    def build(self, step: Step, known: Mapping[int, Sequence[int]], prompt_lens: Mapping[int, int]) -> Batch:
        """`known` maps a sequence's key to all its known tokens, `prompt_lens` to how many came with the request."""
        sequences = step.sequences
        tokens: list[int] = []
        for item in sequences:
            tokens += known[item.key][item.begin : item.end]
        counts = np.array([item.end - item.begin for item in sequences])
        begins = np.array([item.begin for item in sequences])
        query_begin = np.concatenate(([0], np.cumsum(counts)))
        # Position of token t of sequence s: begins[s] + (t - query_begin[s]).
        positions = np.arange(query_begin[-1]) + np.repeat(begins - query_begin[:-1], counts)
        prompts = np.repeat([prompt_lens[item.key] for item in sequences], counts)
        rows = [self._table(item.key, item.block_table) for item in sequences]
        table = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
        for row, pages in zip(table, rows, strict=True):
            row[: len(pages)] = pages
        return Batch(
            tokens=torch.tensor(tokens, dtype=torch.int64, device=self._device),
            positions=self._tensor(positions, torch.int64),
            prompt_lens=self._tensor(prompts, torch.int64),
            query_begin=self._tensor(query_begin, torch.int32),
            kv_len=self._tensor(begins + counts, torch.int32),
            block_table=self._tensor(table, torch.int32),
            has_device_pages=any(item.num_device_pages for item in sequences),
            has_host_pages=any(item.num_device_pages < len(item.block_table) for item in sequences),
        )

    def forget(self, key: int) -> None:
        """Drop what is kept of an ended sequence."""
        self._tables.pop(key, None)

    def _table(self, key: int, pages: tuple[int, ...]) -> IntArray:
        cached = self._tables.get(key)
        # The scheduler hands out the same tuple until a page is added, so identity is enough to skip the copy.
        if cached is not None and cached[0] is pages:
            return cached[1]
        array = np.array(pages, dtype=np.int32)
        self._tables[key] = (pages, array)
        return array

    def _tensor(self, array: npt.NDArray[np.generic], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device=self._device, dtype=dtype)
