"""How well a model uses its context: `python -m bench.retrieval` prints retrieval accuracy and text loss.

Tasks come from `bench.embedded.tasks` (split "bench", which training never draws from). A question is
answered when the greedy completion begins with the answer, its closing full stop included.
"""

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from bench.embedded import tasks, texts
from bench.embedded.ngram import NGram

ANSWER_TOKENS = 10  # a five digit number, its space and its full stop, with room
QUESTIONS = 4  # asked of one context at most
LENGTHS = (1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Score:
    """Questions answered, and the 95 % interval of Wilson (1927) for the accuracy."""

    task: str
    length: int
    right: int
    asked: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TextLoss:
    """Mean loss on held-out text in nats a token; `ngram` is a 4-gram model of the training text."""

    text: str
    tokens: int
    model: float
    ngram: float


class Completer(Protocol):
    """What a backend offers."""

    def complete(self, context: str, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Greedy continuations of `context + prompt`, one a prompt."""
        ...

    def close(self) -> None: ...


class TransformersCompleter:
    """The reference: Hugging Face transformers, one prefill a context, one crop of the cache a question."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model.train(False)

    def complete(self, context: str, prompts: Sequence[str], max_tokens: int) -> list[str]:
        torch = self.torch
        head = self.tokenizer.encode(context).ids
        outputs: list[str] = []
        with torch.inference_mode():
            cache = self.model(torch.tensor([head]), use_cache=True, logits_to_keep=1).past_key_values
            for prompt in prompts:
                feed, answer = self.tokenizer.encode(prompt).ids, []
                for _ in range(max_tokens):
                    result = self.model(torch.tensor([feed]), past_key_values=cache, logits_to_keep=1)
                    feed = [int(result.logits[0, -1].argmax())]
                    answer.append(feed[0])
                outputs.append(self.tokenizer.decode(answer, skip_special_tokens=False))
                cache.crop(len(head) - cache.get_seq_length())  # negative: so many tokens off the end
        return outputs

    def close(self) -> None:
        del self.model


class HybridGenCompleter:
    """HybridGen's own offline API, with the settings that serving uses."""

    def __init__(self, model: str) -> None:
        from hybridgen import LLM, SamplingParams

        self.llm = LLM(model=model, max_model_len=8192)
        self.sampling = SamplingParams

    def complete(self, context: str, prompts: Sequence[str], max_tokens: int) -> list[str]:
        sampling = self.sampling(temperature=0.0, max_tokens=max_tokens)
        outputs = self.llm.generate([context + prompt for prompt in prompts], sampling)
        return [str(output.outputs[0].text) for output in outputs]

    def close(self) -> None:
        close = getattr(self.llm, "close", None)
        if close is not None:
            close()


BACKENDS: dict[str, Callable[[str], Completer]] = {
    "transformers": TransformersCompleter,
    "hybridgen": HybridGenCompleter,
}


def interval(right: int, asked: int) -> tuple[float, float]:
    """Wilson's 95 % interval; (0, 1) when nothing was asked."""
    if asked == 0:
        return 0.0, 1.0
    z, share = 1.96, right / asked
    middle = share + z * z / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def score(
    completer: Completer, tokenizer: Tokenizer, kind: str, length: int, samples: int, seed: int
) -> Score:
    """Ask `samples` contexts of about `length` tokens, up to four questions each."""
    right = asked = 0
    room = length - ANSWER_TOKENS  # so that a full context still leaves the completion its place
    for i in range(samples):
        example = tasks.make(
            kind, seed * 1_000_000 + i, room, lambda text: len(tokenizer.encode(text).ids), split="bench"
        )
        questions = example.questions[:QUESTIONS]
        outputs = completer.complete(example.context, [q.prompt for q in questions], ANSWER_TOKENS)
        right += sum(
            output.startswith(question.answer) for output, question in zip(outputs, questions, strict=True)
        )
        asked += len(questions)
    return Score(kind, length, right, asked, right / max(1, asked), *interval(right, asked))


def held_out_documents(seed: int) -> dict[str, list[str]]:
    rng = random.Random(f"bench/text/{seed}")
    # Some docstrings stand in several modules word for word.
    trained = set(texts.training_library())
    held_out = texts.library_documents(texts.HELD_OUT_MODULES)
    library = [document for document in held_out if document not in trained]
    return {
        "stories": [texts.story(rng) for _ in range(150)],
        "chat": [texts.render_chat(texts.chat(rng)) for _ in range(150)],
        "library": rng.sample(library, min(150, len(library))),
    }


def training_documents() -> list[str]:
    """What the 4-gram model is given: all library text that trains, and 20,000 stories, facts and chats."""
    rng = random.Random("train/text")
    grammars = [
        text
        for _ in range(7000)
        for text in (texts.story(rng), texts.facts(rng), texts.render_chat(texts.chat(rng)))
    ]
    return [*texts.training_library(), *grammars]


def text_losses(model: str, tokenizer: Tokenizer, seed: int) -> list[TextLoss]:
    """Documents of up to 1,024 tokens, each on its own, the first token not counted for either model."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.train(False)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(f"<|eos|>{text}<|eos|>").ids
        return ids

    baseline = NGram([encode(text) for text in training_documents()], 4, tokenizer.get_vocab_size())
    results = []
    for name, documents in held_out_documents(seed).items():
        tokens, model_loss, ngram_loss = 0, 0.0, 0.0
        for document in documents:
            ids = encode(document)[:1024]
            with torch.inference_mode():
                logits = network(torch.tensor([ids])).logits[0, :-1].float()
            model_loss += float(
                torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
            )
            ngram_loss += baseline.loss(ids) - baseline.loss(ids[:1])
            tokens += len(ids) - 1
        results.append(TextLoss(name, tokens, model_loss / tokens, ngram_loss / tokens))
    return results


def machine() -> str:
    """CPU model and cores, for the record."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores"


def print_scores(scores: Sequence[Score]) -> None:
    print(f"{'task':12} {'length':>6} {'accuracy':>8}  {'95 % interval':>15} {'n':>5}")
    for row in scores:
        spread = f"{100 * row.low:.1f} - {100 * row.high:.1f}"
        print(f"{row.task:12} {row.length:6} {100 * row.accuracy:7.1f}%  {spread:>15} {row.asked:5}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="configs/embedded")
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="hybridgen")
    parser.add_argument("--tasks", nargs="+", choices=tasks.KINDS, default=list(tasks.KINDS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--samples", type=int, default=20, help="contexts a task and length")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-text", action="store_true", help="leave out the loss on held-out text")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    options = parser.parse_args()
    began = time.monotonic()
    tokenizer = Tokenizer.from_file(str(Path(options.model) / "tokenizer.json"))
    completer = BACKENDS[options.backend](options.model)
    scores = [
        score(completer, tokenizer, kind, length, options.samples, options.seed)
        for kind in options.tasks
        for length in options.lengths
    ]
    completer.close()
    print_scores(scores)
    losses = [] if options.no_text else text_losses(options.model, tokenizer, options.seed)
    for loss in losses:
        figures = f"loss {loss.model:.3f}, 4-gram {loss.ngram:.3f} nats a token"
        print(f"{loss.text:12} {figures}, {loss.tokens} tokens")
    if options.json:
        report = {
            "command": "python -m bench.retrieval "
            f"--backend {options.backend} --samples {options.samples} --seed {options.seed}",
            "machine": machine(),
            "seconds": round(time.monotonic() - began),
            "scores": [asdict(row) for row in scores],
            "text": [asdict(loss) for loss in losses],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
