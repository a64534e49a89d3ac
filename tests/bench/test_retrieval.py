"""Facts about how the retrieval benchmark scores: what counts as an answer, and how sure a share is."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bench.embedded import tasks
from bench.retrieval import ANSWER_TOKENS, QUESTIONS, held_out_documents, interval, score, training_documents

TOKENIZER = Path(__file__).parents[2] / "configs" / "embedded" / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


class Oracle:
    """Knows the answers of one benchmark split; leaves out the last `missing` characters of each."""

    def __init__(self, tokenizer: Tokenizer, kind: str, length: int, missing: int) -> None:
        self.answers: dict[str, str] = {}
        for seed in range(1_000_000, 1_000_004):
            example = tasks.make(
                kind,
                seed,
                length - ANSWER_TOKENS,
                lambda text: len(tokenizer.encode(text).ids),
                split="bench",
            )
            for question in example.questions:
                answer = question.answer[: len(question.answer) - missing]
                self.answers[example.context + question.prompt] = answer

    def complete(self, context: str, prompts: Sequence[str], max_tokens: int) -> list[str]:
        return [self.answers[context + prompt] for prompt in prompts]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_the_right_answers_score_everything(kind: str, tokenizer: Tokenizer) -> None:
    result = score(Oracle(tokenizer, kind, 1024, missing=0), tokenizer, kind, 1024, samples=4, seed=1)
    assert result.right == result.asked
    assert 4 <= result.asked <= 4 * QUESTIONS
    assert result.accuracy == 1.0


def test_a_number_that_does_not_end_is_not_an_answer(tokenizer: Tokenizer) -> None:
    result = score(
        Oracle(tokenizer, "passkey", 1024, missing=1), tokenizer, "passkey", 1024, samples=4, seed=1
    )
    assert result.right == 0


@pytest.mark.parametrize(("right", "asked"), [(0, 20), (1, 20), (10, 20), (19, 20), (20, 20)])
def test_the_interval_holds_the_share_and_stays_between_zero_and_one(right: int, asked: int) -> None:
    low, high = interval(right, asked)
    assert 0.0 <= low <= right / asked <= high + 1e-12  # rounding at 20 of 20
    assert high <= 1.0
    assert low < high


def test_the_interval_of_nothing_asked_is_everything() -> None:
    assert interval(0, 0) == (0.0, 1.0)


def test_the_interval_is_wilsons() -> None:
    # Wilson (1927) for 19 of 20 at 95 %.
    assert interval(19, 20) == pytest.approx((0.7639, 0.9911), abs=1e-3)


def test_held_out_text_is_not_among_the_training_text() -> None:
    training = set(training_documents())
    library = held_out_documents(1)["library"]
    assert library
    assert not training & set(library)
