"""The byte-level BPE tokenizer of the embedded model: `python -m bench.embedded.tokenizer FOLDER` trains it.

Digits are tokens of their own, with or without a space before, so that a number is copied digit by digit.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.embedded import tasks, texts

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
VOCAB_SIZE = 2048
TRAINING_SEED = 7
PATTERN = r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def corpus() -> Iterator[str]:
    rng = random.Random(TRAINING_SEED)
    # Every word of the grammars often enough to become one token, bare and after a space.
    lists = (tasks.WORDS, texts.NAMES, texts.CITIES, texts.MOODS, texts.SIZES, texts.WEATHER, texts.JOBS)
    for word in itertools.chain.from_iterable(lists):
        for _ in range(40):
            yield f" {word}"
    for _ in range(4000):
        yield texts.story(rng)
        yield texts.facts(rng)
        yield texts.render_chat(texts.chat(rng))
        yield texts.story_sentence(rng)
    yield from texts.library_documents(texts.TOKENIZER_MODULES)
    for seed in range(300):
        kind = rng.choice(tasks.KINDS)
        example = tasks.make(kind, seed, 600, len)
        yield example.context + "".join(q.prompt + q.answer for q in example.questions)


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|im_start|>", "<|eos|>"],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    save(train(), parser.parse_args().folder)
