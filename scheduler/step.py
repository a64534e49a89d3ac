"""The scheduler's answer: which tokens of which sequences the next forward pass computes. Frozen data.

Page ids are of one numbering over both tiers: device pages come first, host pages after them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PageMove:
    """Copy the page `source` to the page `target`, which lies on the other tier."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class StepSequence:
    """One sequence's part of a step: compute its tokens at positions [begin, end).

    Read the whole block table: even entries for computed tokens may change between steps, to an equal page.
    After the step the first `end` tokens of the sequence have their keys and values in `block_table`.
    A token is sampled from the last position iff `samples`, that is, when `end` reaches the last known token.
    """

    key: int  # the sequence's number, unique for the life of the scheduler
    begin: int
    end: int
    block_table: tuple[int, ...]  # page ids; covers at least `end` tokens
    num_device_pages: int  # entries of `block_table` that are device pages
    samples: bool


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass. Empty `sequences` means that there is nothing to do.

    `moves` come before it, one after the other: a page may be the source of one and the target of a later one.
    """

    sequences: tuple[StepSequence, ...]
    moves: tuple[PageMove, ...] = ()
    preempted: tuple[int, ...] = ()  # keys of sequences that stopped running to make this step possible
    num_tokens: int = 0  # sum of end - begin
