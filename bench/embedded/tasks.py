"""Retrieval tasks as pure functions of a seed and a length: a context, and questions with their answers.

Scoring and models are elsewhere (`bench.retrieval`), so that the same tasks can judge any way of attending.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from bench.embedded import texts

WORDS = tuple(sorted({*texts.ANIMALS, *texts.THINGS, *texts.PLACES, *texts.COLORS}))
"""The keys, values and list items of every task: each is one token of the embedded model's tokenizer."""

CountTokens = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Question:
    """`prompt` follows the context; `answer` opens with the space that a model must write first."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Example:
    kind: str
    context: str
    questions: tuple[Question, ...]


def number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def haystack_sentence(rng: random.Random, style: str) -> str:
    return texts.noise_sentence(rng) if style == "noise" else texts.story_sentence(rng)


HAYSTACKS = ("noise", "story")


def hide(needles: list[str], rng: random.Random, room: int, count_tokens: CountTokens, style: str) -> str:
    """Needles in order at random depths among haystack sentences; `room` tokens, or up to 20 fewer."""
    used = sum(count_tokens(f" {needle}") for needle in needles)
    hay: list[str] = []
    while True:
        sentence = haystack_sentence(rng, style)
        used += count_tokens(f" {sentence}")
        if used > room:
            break
        hay.append(sentence)
    depths = sorted(rng.randint(0, len(hay)) for _ in needles)
    pieces: list[str] = []
    begin = 0
    for depth, needle in zip(depths, needles, strict=True):
        pieces.extend(hay[begin:depth])
        pieces.append(needle)
        begin = depth
    pieces.extend(hay[begin:])
    return " ".join(pieces)


def _room(length: int, questions: list[Question], count_tokens: CountTokens) -> int:
    """Tokens that the context may take so that context and the longest question fill `length`."""
    return length - max(count_tokens(question.prompt + question.answer) for question in questions)


PASSKEY_FORMS = (
    ("The pass key is {}. Remember it.", "What is the pass key? The pass key is"),
    ("The pass key is {}. Remember it. {} is the pass key.", "What is the pass key? The pass key is"),
    ("Remember the pass key: {}.", "What was the pass key? The pass key:"),
    ("The secret number is {}.", "What is the secret number? The secret number is"),
)


def passkey(rng: random.Random, length: int, count_tokens: CountTokens, needles: int = 1) -> Example:
    """One number of five digits in a haystack."""
    needle, ask = PASSKEY_FORMS[0 if rng.random() < 0.5 else rng.randrange(len(PASSKEY_FORMS))]
    value = number(rng, 5)
    questions = [Question(f"\n{ask}", f" {value}.")]
    room = _room(length, questions, count_tokens)
    context = hide([needle.format(value, value)], rng, room, count_tokens, rng.choice(HAYSTACKS))
    return Example("passkey", context, tuple(questions))


NEEDLE_FORMS = (
    (
        "The magic number of the {} is {}.",
        "What is the magic number of the {}? The magic number of the {} is",
    ),
    ("The number for {} is {}.", "What is the number for {}? The number for {} is"),
    ("The code of the {} is {}.", "What is the code of the {}? The code of the {} is"),
    ("The secret word for {} is {}.", "What is the secret word for {}? The secret word for {} is"),
)


def needle(rng: random.Random, length: int, count_tokens: CountTokens, needles: int = 4) -> Example:
    """Keys with values, spread over a haystack; every key is asked."""
    form = rng.randrange(len(NEEDLE_FORMS))
    say, ask = NEEDLE_FORMS[form]
    keys = rng.sample(WORDS, needles)
    values = rng.sample(WORDS, needles) if form == 3 else [number(rng, 4) for _ in keys]
    told = [say.format(key, value) for key, value in zip(keys, values, strict=True)]
    questions = [
        Question(f"\n{ask.format(key, key)}", f" {value}.") for key, value in zip(keys, values, strict=True)
    ]
    context = hide(told, rng, _room(length, questions, count_tokens), count_tokens, rng.choice(HAYSTACKS))
    rng.shuffle(questions)
    return Example("needle", context, tuple(questions))


def key_value(rng: random.Random, length: int, count_tokens: CountTokens, needles: int = 32) -> Example:
    """Entries `key: value` at random depths in a haystack."""
    keys = rng.sample(WORDS, needles)
    values = [number(rng, 3) for _ in keys] if rng.random() < 0.5 else [rng.choice(WORDS) for _ in keys]
    told = [f"Entry {key}: {value}." for key, value in zip(keys, values, strict=True)]
    questions = [Question(f"\nEntry {key}:", f" {value}.") for key, value in zip(keys, values, strict=True)]
    context = hide(told, rng, _room(length, questions, count_tokens), count_tokens, rng.choice(HAYSTACKS))
    rng.shuffle(questions)
    return Example("key_value", context, tuple(questions))


def variable(rng: random.Random, length: int, count_tokens: CountTokens, needles: int = 4) -> Example:
    """Chains of two assignments: one variable gets a number, a second one gets the first."""
    names = rng.sample(WORDS, 2 * needles)
    told: list[str] = []
    questions: list[Question] = []
    waiting: list[str] = []
    for i in range(needles):
        first, second, value = names[2 * i], names[2 * i + 1], number(rng, 4)
        told.append(f"Set {first} = {value}.")
        waiting.append(f"Set {second} = {first}.")
        questions.append(Question(f"\nWhat is {second}? {second} = {first} =", f" {value}."))
        questions.append(Question(f"\nWhat is {second}? {second} =", f" {first} = {value}."))
    rng.shuffle(waiting)
    room = _room(length, questions, count_tokens)
    context = hide(told + waiting, rng, room, count_tokens, rng.choice(HAYSTACKS))
    rng.shuffle(questions)
    return Example("variable", context, tuple(questions))


def counting(rng: random.Random, length: int, count_tokens: CountTokens, needles: int = 2) -> Example:
    """How often was an animal seen? One to nine times, each a sentence of its own in the haystack."""
    marks = rng.sample(texts.ANIMALS, needles)
    counts = {mark: rng.randint(1, 9) for mark in marks}
    told = [f"A {mark} was seen." for mark in marks for _ in range(counts[mark])]
    rng.shuffle(told)
    questions = [
        Question(f"\nHow many times was a {mark} seen? The {mark} was seen", f" {counts[mark]} times.")
        for mark in marks
    ]
    context = hide(told, rng, _room(length, questions, count_tokens), count_tokens, "noise")
    return Example("counting", context, tuple(questions))


def common_word(rng: random.Random, length: int, count_tokens: CountTokens, needles: int = 1) -> Example:
    """A list of words; one of them makes up a quarter of it, the others come once in a while."""
    questions = [Question("\nThe most common word is", f" {rng.choice(WORDS)}.")]
    answer = questions[0].answer[1:-1]
    others = [word for word in WORDS if word != answer]
    used = count_tokens("Words:")
    room = _room(length, questions, count_tokens)
    words: list[str] = []
    while True:
        word = answer if rng.random() < 0.25 else rng.choice(others)
        used += count_tokens(f" {word}")
        if used > room:
            break
        words.append(word)
    return Example("common_word", "Words: " + " ".join(words), tuple(questions))


_MAKERS = {
    "passkey": passkey,
    "needle": needle,
    "key_value": key_value,
    "variable": variable,
    "counting": counting,
    "common_word": common_word,
}
KINDS = tuple(_MAKERS)


def make(
    kind: str,
    seed: int,
    length: int,
    count_tokens: CountTokens,
    *,
    split: str = "train",
    needles: int | None = None,
) -> Example:
    """Example number `seed` of a split, "train" or "bench": the two never share a random stream."""
    rng = random.Random(f"{split}/{kind}/{seed}")
    maker = _MAKERS[kind]
    return maker(rng, length, count_tokens) if needles is None else maker(rng, length, count_tokens, needles)
