"""An n-gram language model with Kneser-Ney smoothing: what the embedded model must beat on text."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

DISCOUNT = 0.75
Gram = tuple[int, ...]


class NGram:
    """Kneser and Ney (1995), interpolated, one discount for all orders (Chen and Goodman 1999, 2.7)."""

    def __init__(self, documents: Sequence[Sequence[int]], order: int, vocab_size: int) -> None:
        self.order = order
        self.vocab_size = vocab_size
        counts: Counter[Gram] = Counter()
        for document in documents:
            padded = [-1] * (order - 1) + list(document)
            counts.update(zip(*(padded[i:] for i in range(order)), strict=False))
        # The highest order counts occurrences, a lower one the distinct tokens seen before a gram.
        self.counts: list[Counter[Gram]] = [Counter() for _ in range(order)]
        self.counts[order - 1] = counts
        for n in range(order - 1, 0, -1):
            self.counts[n - 1] = Counter(gram[1:] for gram in self.counts[n])
        self.totals: list[dict[Gram, int]] = []
        self.distinct: list[dict[Gram, int]] = []
        for table in self.counts:
            totals: dict[Gram, int] = defaultdict(int)
            distinct: dict[Gram, int] = defaultdict(int)
            for gram, count in table.items():
                totals[gram[:-1]] += count
                distinct[gram[:-1]] += 1
            self.totals.append(totals)
            self.distinct.append(distinct)

    def probability(self, context: Gram, token: int) -> float:
        """Of `token` after `context`, whose last `order - 1` ids count."""
        chance = 1.0 / self.vocab_size
        for n in range(self.order):
            history = context[len(context) - n :] if n else ()
            total = self.totals[n].get(history, 0)
            if total == 0:
                return chance
            seen = self.counts[n].get((*history, token), 0)
            spread = DISCOUNT * self.distinct[n][history] / total
            chance = max(seen - DISCOUNT, 0.0) / total + spread * chance
        return chance

    def loss(self, document: Sequence[int]) -> float:
        """Sum over the tokens of -ln p, in nats."""
        padded = [-1] * (self.order - 1) + list(document)
        return -sum(
            math.log(self.probability(tuple(padded[i : i + self.order - 1]), padded[i + self.order - 1]))
            for i in range(len(document))
        )
