"""Training rows: token ids, a loss weight per target, and positions. Answers weigh, haystacks do not."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from bench.embedded import tasks, texts

FIRST_PLAIN_TOKEN = 5  # those before it are the special tokens
ANSWER_WEIGHT = 4.0  # a row of text has a target at every token, a row of a task only at its few answers
QUESTION_WEIGHT = 0.1  # of the words of a question, which are predictable but not what the row is for
Row = tuple[list[int], list[float]]  # token ids, and the weight of each as a target


@dataclass(frozen=True, slots=True)
class Batch:
    """ids: [rows, tokens + 1]; weights (of ids[:, 1:]) and positions (of ids[:, :-1]): [rows, tokens]."""

    ids: Tensor
    weights: Tensor
    positions: Tensor


class RowMaker:
    """Makes rows of every kind from one random stream. `random_tokens` bounds the ids of the token games.

    The library is read in passes, each in an order of its own, and no document comes twice in a pass.
    `library_read` counts the documents, so that a run that goes on reads what it has not read yet.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int, library_read: int = 0) -> None:
        self.rng = random.Random(f"train/rows/{seed}")
        self.draw = np.random.default_rng(seed)
        self.tokenizer = tokenizer
        self.random_tokens = tokenizer.get_vocab_size()
        self.library = texts.training_library()
        self.library_read = library_read
        self.library_rest: list[int] = []  # read, and not yet in a row
        self.library_pass = -1  # the pass that `library_order` belongs to
        self.library_order: list[int] = []
        self.kinds: Mapping[str, Callable[[int], Row]] = {
            "repeat": self.repeat,
            "pairs": self.pairs,
            "task": self.task,
            "codes": self.codes,
            "story": self.story,
            "library": self.library_text,
            "chat": self.chat,
            "fact_chat": self.fact_chat,
        }

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def count_tokens(self, text: str) -> int:
        return len(self.encode(text))

    def batch(self, mix: Mapping[str, float], rows: int, tokens: int, skip: float) -> Batch:
        """`mix` gives the share of each kind; a share `skip` of the rows has jumps in its positions."""
        ids = np.zeros((rows, tokens + 1), dtype=np.int64)
        weights = np.zeros((rows, tokens + 1), dtype=np.float32)
        positions = np.zeros((rows, tokens), dtype=np.int64)
        for i in range(rows):
            kind = self.rng.choices(list(mix), list(mix.values()))[0]
            row, weight = self.kinds[kind](tokens + 1)
            ids[i, : len(row)] = row[: tokens + 1]
            weights[i, : len(weight)] = weight[: tokens + 1]
            positions[i] = self.positions(tokens, jump=self.rng.random() < skip)
        return Batch(torch.from_numpy(ids), torch.from_numpy(weights[:, 1:]), torch.from_numpy(positions))

    def positions(self, tokens: int, *, jump: bool, limit: int = 8192) -> NDArray[np.int64]:
        """0, 1, 2, ... or the same with a few jumps, so that a short row shows long distances (PoSE)."""
        steps = np.ones(tokens, dtype=np.int64)
        steps[0] = 0
        if jump and tokens < limit:
            total = self.rng.randint(0, limit - tokens)
            cuts = sorted(self.rng.randint(0, total) for _ in range(self.rng.randint(1, 4)))
            for begin, end in zip([0, *cuts], [*cuts, total], strict=True):
                steps[self.rng.randrange(tokens)] += end - begin
        return np.cumsum(steps)

    # Games on random tokens: every second target can be known from the row, which is what makes a small model
    # learn to look back within a few million tokens.

    def tokens(self, count: int, *, distinct: bool = False) -> NDArray[np.int64]:
        if distinct:
            span = self.random_tokens - FIRST_PLAIN_TOKEN
            return self.draw.choice(span, count, replace=False) + FIRST_PLAIN_TOKEN
        return self.draw.integers(FIRST_PLAIN_TOKEN, self.random_tokens, count)

    def repeat(self, length: int) -> Row:
        """A random segment over and over."""
        segment = int(self.draw.integers(length // 8, length // 2 + 1))
        ids = np.tile(self.tokens(segment), length // segment + 2)[:length]
        return ids.tolist(), [0.0] * segment + [1.0] * (length - segment)

    def pairs(self, length: int) -> Row:
        """Random pairs of tokens, then the same pairs in random order, again and again."""
        most = min(length // 6, (self.random_tokens - FIRST_PLAIN_TOKEN) // 2)
        count = int(self.draw.integers(4, most + 1))
        pairs = self.tokens(2 * count, distinct=True).reshape(count, 2)
        asked = self.draw.integers(0, count, (length - 2 * count) // 2 + 1)
        ids = np.concatenate([pairs.reshape(-1), pairs[asked].reshape(-1)])[:length]
        weights = [0.0] * (2 * count) + [float(i % 2) for i in range(length - 2 * count)]
        return ids.tolist(), weights

    # Tasks in words.

    def task(self, length: int) -> Row:
        """The context of a retrieval task, then its questions in random order until the row is full."""
        kind = self.rng.choices(tasks.KINDS, (0.7, 2.0, 2.0, 1.0, 0.7, 0.3))[0]
        asking = min(length // 3, self.rng.choice((128, 256, 512)))
        # More needles than the benchmark hides: many answers must pay for the cost of a haystack.
        most = {"needle": 48, "key_value": 64, "variable": 16, "counting": 5}.get(kind, 1)
        most = max(1, min(most, (length - asking) // (60 if kind in ("variable", "counting") else 20)))
        needles = min(most, int(most ** self.rng.random() * 1.5) + 1)
        example = tasks.make(
            kind, self.rng.getrandbits(48), length - asking, self.count_tokens, needles=needles
        )
        ids = self.encode(example.context)
        weights = [0.0] * len(ids)
        while len(ids) < length:
            for question in self.rng.sample(example.questions, len(example.questions)):
                asked, answer = self.encode(question.prompt), self.encode(question.answer)
                ids += asked + answer
                weights += [QUESTION_WEIGHT] * len(asked) + [ANSWER_WEIGHT] * len(answer)
        return ids[:length], weights[:length]

    def codes(self, length: int) -> Row:
        """Keys and numbers of a few digits that repeat, with no haystack: where copying digits goes astray."""
        forms = (*tasks.NEEDLE_FORMS[:3], ("Entry {}: {}.", "Entry {}:"), ("{} {}.", "{}"))
        say, ask = self.rng.choice(forms)
        digits = self.rng.sample("0123456789", self.rng.randint(2, 7))
        keys = self.rng.sample(tasks.WORDS, self.rng.randint(3, max(3, min(length // 36, 60))))
        values = {key: "".join(self.rng.choices(digits, k=self.rng.randint(3, 5))) for key in keys}
        ids = self.encode(" ".join(say.format(key, value) for key, value in values.items()))
        weights = [0.0] * len(ids)
        while len(ids) < length:
            key = self.rng.choice(keys)
            asked, answer = self.encode(f"\n{ask.format(key, key)}"), self.encode(f" {values[key]}.")
            ids += asked + answer
            weights += [QUESTION_WEIGHT] * len(asked) + [ANSWER_WEIGHT] * len(answer)
        return ids[:length], weights[:length]

    # Text.

    def fill(self, length: int, document: Callable[[], str]) -> Row:
        """Documents, each with an end mark, until the row is full; it starts inside the first one."""
        ids: list[int] = []
        while len(ids) < length:
            ids += self.encode(f"{document()}<|eos|>")
        return ids[:length], [1.0] * length

    def story(self, length: int) -> Row:
        def document() -> str:
            return texts.story(self.rng) if self.rng.random() < 0.75 else texts.facts(self.rng)

        return self.fill(length, document)

    def library_text(self, length: int) -> Row:
        """The next part of a pass through the library; what is cut off here opens the next row."""
        ids = self.library_rest
        while len(ids) < length:
            ids += self.encode(f"{self.library[self.library_place(self.library_read)]}<|eos|>")
            self.library_read += 1
        self.library_rest = ids[length - 1 :]  # the last token of a row is only a target in it
        return ids[:length], [1.0] * length

    def library_place(self, read: int) -> int:
        """Where in the library the document stands that is read after `read` others."""
        number, place = divmod(read, len(self.library))
        if number != self.library_pass:
            self.library_pass = number
            self.library_order = list(range(len(self.library)))
            random.Random(f"train/library/{number}").shuffle(self.library_order)
        return self.library_order[place]

    def chat(self, length: int) -> Row:
        return self.fill(length, lambda: texts.render_chat(texts.chat(self.rng)))

    def fact_chat(self, length: int) -> Row:
        """A retrieval task as a conversation: the context in the first turn, one question a turn."""
        kind = self.rng.choice(("passkey", "needle", "key_value"))
        room = min(length, max(192, int(length * self.rng.uniform(0.4, 0.9))))
        needles = 1 if kind == "passkey" else self.rng.randint(2, 4)
        example = tasks.make(kind, self.rng.getrandbits(48), room - 40, self.count_tokens, needles=needles)
        ids: list[int] = []
        weights: list[float] = []
        opening = f"{example.context}\n"
        while len(ids) < length:
            for question in self.rng.sample(example.questions, len(example.questions)):
                asked, _, lead = question.prompt.strip().rpartition("?")
                asked = f"{asked}?" if asked else lead
                turn = self.encode(f"<|im_start|>user\n{opening}{asked}<|im_end|>\n<|im_start|>assistant\n")
                answer = self.encode(f"{lead.strip()}{question.answer}<|im_end|>\n")
                ids += turn + answer
                weights += [0.0 if opening else QUESTION_WEIGHT] * len(turn) + [ANSWER_WEIGHT] * len(answer)
                opening = ""
        return ids[:length], weights[:length]
