"""What lossy attention costs in answers: `python -m bench.accuracy`, on the embedded model.

Contexts of tasks (split "bench" of `bench.embedded.tasks`) and of held-out text are computed once, exactly, and kept
in the prefix cache. All but three pages of a sequence, 96 tokens, are the host's. Then every configuration decodes
from the same pages: the question token by token (it is given, but each of its tokens goes through the policy, which
is harder than serving, where a prompt is computed exactly), then the answer. Text is decoded the same way, 64 given
tokens a document; its loss and how its logits differ from those of `exact` are those of the decoded tokens.

A question counts as answered when what follows begins with the answer, full stop included.
"""

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bench.embedded import tasks
from bench.retrieval import held_out_documents
from bench.throughput import commit, machine
from hybridgen.configs.settings import engine_settings, load_settings
from hybridgen.engine.build import build_engine, make_policy
from hybridgen.engine.kv_store import RetainedMass
from hybridgen.engine.request import Request, SamplingParams
from hybridgen.engine.sampler import Sampled, Sampler

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "configs" / "embedded"
LENGTHS = (2048, 4096, 8192)
ANSWER_TOKENS = 10
QUESTIONS = 4  # asked of one context at most
TEXT_TOKENS = 64  # decoded of each document
DEVICE_PAGES = 3  # of each sequence: its first, the one that is written to, and one that is on its way


@dataclass(frozen=True, slots=True)
class Configuration:
    """A way of attending to host pages, by the fields of EngineSettings that say so."""

    name: str
    settings: Mapping[str, Any]


MASSES = (0.9, 0.95, 0.99, 0.999)
CONFIGURATIONS = (
    Configuration("exact", {"host_attention": "exact"}),
    *(
        Configuration(f"mass {mass}{suffix}", {"host_attention": "mass", "attention_mass": mass, **settings})
        for suffix, settings in (
            ("", {"attention_tail": True}),
            (", no tail", {"attention_tail": False}),
            (", layer-ahead", {"attention_tail": True, "layer_ahead": True}),
        )
        for mass in MASSES
    ),
    *(
        Configuration(
            f"hybridgen 5 %{controller}{suffix}",
            {
                "host_attention": "hybridgen",
                "hybridgen_ratio": 0.05,
                "hybridgen_adapt": adapt,
                "layer_ahead": ahead,
            },
        )
        for controller, adapt in (("", False), (", controller", True))
        for suffix, ahead in (("", False), (", layer-ahead", True))
    ),
)


@dataclass(frozen=True, slots=True)
class Job:
    """A sequence to decode from a context: `given` tokens first, then `num_free` greedy ones."""

    context: Sequence[int]
    given: Sequence[int]
    num_free: int = 0
    keep_logits: bool = False


@dataclass(frozen=True, slots=True)
class Decoded:
    free: list[int]
    # [len(given) - 1, vocab] float32: row i is what was expected after given[i]; None unless asked for.
    logits: Tensor | None


class Prompter(Sampler):
    """A sampler that says given tokens first and keeps the logits it is shown; the rest it leaves to `inner`."""

    def __init__(self, inner: Sampler) -> None:
        self.inner = inner
        self.given: dict[int, Iterator[int]] = {}
        self.kept: dict[int, list[Tensor]] = {}

    def add(self, *args: Any, **kwargs: Any) -> None:
        self.inner.add(*args, **kwargs)

    def remove(self, key: int) -> None:
        self.inner.remove(key)
        self.given.pop(key, None)

    def sample(self, logits: Tensor, keys: Sequence[int]) -> Sampled:
        sampled = self.inner.sample(logits, keys)
        tokens = list(sampled.tokens)
        for place, key in enumerate(keys):
            if key in self.kept:
                self.kept[key].append(logits[place].float().clone())
            tokens[place] = next(self.given.get(key, iter(())), tokens[place])
        return Sampled(tokens, sampled.logprobs, sampled.invalid)


class Engine:
    """The engine's core with a `Prompter` in it, and its policy for host pages changed between requests."""

    def __init__(self, model: Path, max_num_seqs: int) -> None:
        arguments = {
            "model": str(model),
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": 4096,
            "device_pages": DEVICE_PAGES * max_num_seqs,
            # For the index of the pages and for the foretold queries, which other configurations ignore.
            "host_attention": "mass",
            "layer_ahead": True,
        }
        self._settings = engine_settings(load_settings(arguments))
        self.core = build_engine(self._settings)
        self._store = self.core._runner._store
        self._decoder = self.core._runner._decoder
        self._ahead_q = self._decoder._ahead_q
        self._prompter = Prompter(self.core._sampler)
        self.core._sampler = self._prompter
        self._num_requests = 0
        self._lowest = 1.0

    def use(self, configuration: Configuration) -> None:
        """Attend to host pages so from the next step on, and count the retained mass from there."""
        settings = msgspec.structs.replace(self._settings, layer_ahead=False)
        settings = msgspec.structs.replace(settings, **configuration.settings)
        self._store._policy = make_policy(settings, self._store._spec.num_layers)
        self._decoder._ahead_q = self._ahead_q if settings.layer_ahead else ()
        self._store.retained = RetainedMass()
        self._lowest = 1.0

    @property
    def retained(self) -> RetainedMass:
        """Since `use`; `lowest` over all steps."""
        retained = copy.copy(self._store.retained)
        retained.lowest = self._lowest
        return retained

    def prefill(self, contexts: Sequence[Sequence[int]]) -> None:
        """Compute these contexts, exactly, and leave their pages in the prefix cache."""
        self.decode([Job(context, (0,)) for context in contexts])

    def decode(self, jobs: Sequence[Job]) -> list[Decoded]:
        """Decode all jobs as one batch, as far as the scheduler has room for it."""
        keys, ids = [], []
        for job in jobs:
            self._num_requests += 1
            name = str(self._num_requests)
            params = SamplingParams(
                temperature=0.0, max_tokens=len(job.given) + job.num_free, ignore_eos=True
            )
            self.core.add(Request(id=name, prompt=list(job.context), params=params))
            key = self.core._keys[name][0]
            self._prompter.given[key] = iter(job.given)
            if job.keep_logits:
                self._prompter.kept[key] = []
            ids.append(name)
            keys.append(key)
        tokens: dict[str, list[int]] = {name: [] for name in ids}
        while self.core.has_work():
            for output in self.core.step():
                if output.error is not None:
                    raise RuntimeError(output.error)
                tokens[output.id] += output.tokens
            self._lowest = min(self._lowest, self._store.retained.lowest)
        results = []
        for job, name, key in zip(jobs, ids, keys, strict=True):
            rows = self._prompter.kept.pop(key, None)
            # The first row was computed with the context, exactly; it says nothing about the policy.
            logits = None if rows is None else torch.stack(rows[1 : len(job.given)])
            results.append(Decoded(tokens[name][len(job.given) :], logits))
        return results


@dataclass(slots=True)
class TaskScore:
    """Questions of one kind and length, and how their outcome differs from that of `exact`."""

    right: int = 0
    asked: int = 0
    lost: int = 0  # right with exact, wrong here
    won: int = 0


@dataclass(slots=True)
class TextScore:
    """Given tokens of one kind of text and one length."""

    loss: float = 0.0  # nats a token
    top1_agreement: float = 0.0  # share of tokens at which the likeliest token is that of exact
    max_logit_difference: float = 0.0
    num_tokens: int = 0


@dataclass(slots=True)
class Row:
    """All that was found out about one configuration."""

    tasks: dict[str, dict[int, TaskScore]] = field(default_factory=dict)
    text: dict[str, dict[int, TextScore]] = field(default_factory=dict)
    # Over decoded tokens, layers and query heads, as the policy measured it; nothing for `exact`.
    retained: list[RetainedMass] = field(default_factory=list)
    seconds: float = 0.0


def text_contexts(
    tokenizer: Tokenizer, documents: Mapping[str, Sequence[str]], length: int, samples: int, seed: int
) -> dict[str, list[list[int]]]:
    """Token ids of documents one after the other, `length` of them, each sample in an order of its own."""
    contexts: dict[str, list[list[int]]] = {}
    for style, texts in documents.items():
        for sample in range(samples):
            order = random.Random(f"{style}/{seed}/{length}/{sample}").sample(texts, len(texts))
            ids: list[int] = tokenizer.encode("".join(f"{text}<|eos|>" for text in order)).ids
            assert len(ids) >= length, f"{style} has {len(ids)} tokens only"
            contexts.setdefault(style, []).append(ids[:length])
    return contexts


def score_tasks(
    tokenizer: Tokenizer,
    kind: str,
    length: int,
    options: argparse.Namespace,
    rows: Mapping[str, Row],
) -> None:
    """One kind at one length under every configuration."""
    room = length - ANSWER_TOKENS
    jobs: list[Job] = []
    answers: list[str] = []
    contexts: list[list[int]] = []
    for i in range(options.samples):
        example = tasks.make(
            kind,
            options.seed * 1_000_000 + i,
            room,
            lambda text: len(tokenizer.encode(text).ids),
            split="bench",
        )
        contexts.append(tokenizer.encode(example.context).ids)
        for question in example.questions[:QUESTIONS]:
            jobs.append(Job(contexts[-1], tokenizer.encode(question.prompt).ids, ANSWER_TOKENS))
            answers.append(question.answer)
    engine = Engine(options.model, len(jobs))
    engine.prefill(contexts)
    baseline: list[bool] = []
    for configuration in options.configurations:
        row = rows[configuration.name]
        began_s = time.perf_counter()
        engine.use(configuration)
        decoded = engine.decode(jobs)
        row.seconds += time.perf_counter() - began_s
        row.retained.append(engine.retained)
        right = [
            tokenizer.decode(one.free, skip_special_tokens=False).startswith(answer)
            for one, answer in zip(decoded, answers, strict=True)
        ]
        baseline = baseline or right  # `exact` is the first configuration
        pairs = list(zip(baseline, right, strict=True))
        row.tasks.setdefault(kind, {})[length] = TaskScore(
            right=sum(right),
            asked=len(right),
            lost=pairs.count((True, False)),
            won=pairs.count((False, True)),
        )


def score_text(
    contexts_by_style: Mapping[str, Sequence[Sequence[int]]],
    options: argparse.Namespace,
    rows: Mapping[str, Row],
) -> None:
    """Held-out text of one length under every configuration."""
    for style, contexts in contexts_by_style.items():
        length = len(contexts[0])
        # One token more than is decoded: the first one's logits come with the context.
        jobs = [Job(ids[: -TEXT_TOKENS - 1], ids[-TEXT_TOKENS - 1 :], keep_logits=True) for ids in contexts]
        engine = Engine(options.model, len(jobs))
        engine.prefill([job.context for job in jobs])
        targets = torch.tensor([job.given[1:] for job in jobs]).flatten()
        baseline: Tensor | None = None
        for configuration in options.configurations:
            row = rows[configuration.name]
            began_s = time.perf_counter()
            engine.use(configuration)
            logits = torch.cat([kept for one in engine.decode(jobs) if (kept := one.logits) is not None])
            row.seconds += time.perf_counter() - began_s
            row.retained.append(engine.retained)
            if baseline is None:
                baseline = logits
            row.text.setdefault(style, {})[length] = TextScore(
                loss=float(torch.nn.functional.cross_entropy(logits, targets)),
                top1_agreement=float((logits.argmax(-1) == baseline.argmax(-1)).float().mean()),
                max_logit_difference=float((logits - baseline).abs().max()),
                num_tokens=len(targets),
            )


def run(options: argparse.Namespace, report: Callable[[Mapping[str, Row]], None]) -> dict[str, Row]:
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    rows = {configuration.name: Row() for configuration in options.configurations}
    # Before anything is timed: finding out what of the library was not trained on takes most of a minute.
    documents = held_out_documents(options.seed) if options.text_samples else {}
    for length in options.lengths:
        for kind in options.tasks:
            began_s = time.perf_counter()
            score_tasks(tokenizer, kind, length, options, rows)
            print(f"{kind} {length}: {time.perf_counter() - began_s:.0f} s", file=sys.stderr, flush=True)
            report(rows)
        if options.text_samples:
            began_s = time.perf_counter()
            contexts = text_contexts(tokenizer, documents, length, options.text_samples, options.seed)
            score_text(contexts, options, rows)
            print(f"text {length}: {time.perf_counter() - began_s:.0f} s", file=sys.stderr, flush=True)
            report(rows)
    return rows


def markdown(rows: Mapping[str, Row]) -> str:
    """Accuracy over all lengths, in points; text; and what each configuration kept of the softmax."""
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row.tasks))
    styles = list(dict.fromkeys(style for row in rows.values() for style in row.text))
    exact = rows.get("exact")
    text = [
        "Share of questions answered, all lengths together; in brackets lost / won against `exact`.",
        "",
        "| attention | " + " | ".join([*kinds, "all"]) + " | retained mass: mean (least) | tokens read |",
        "|---|" + "--:|" * (len(kinds) + 3),
    ]
    for name, row in rows.items():
        scores = [list(row.tasks.get(kind, {}).values()) for kind in kinds]
        cells = [_share(of_kind) for of_kind in [*scores, [score for of_kind in scores for score in of_kind]]]
        text.append("| " + " | ".join([name, *cells, _mass(row)]) + " |")
    text += [
        "",
        "Held-out text: loss in nats a token (difference from `exact`), likeliest token the same, largest "
        "difference of a logit.",
        "",
        "| attention | " + " | ".join(styles) + " | same token | logit |",
        "|---|" + "--:|" * (len(styles) + 2),
    ]
    for name, row in rows.items():
        cells = []
        for style in styles:
            loss = _mean_loss(row, style)
            cells.append(f"{loss:.3f} ({loss - _mean_loss(exact, style):+.4f})" if exact else f"{loss:.3f}")
        every = [score for of_style in row.text.values() for score in of_style.values()]
        if every:
            cells.append(f"{100 * statistics.fmean(score.top1_agreement for score in every):.2f} %")
            cells.append(f"{max(score.max_logit_difference for score in every):.2f}")
        text.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(text)


def _share(scores: Sequence[TaskScore]) -> str:
    asked = sum(score.asked for score in scores)
    if not asked:
        return "-"
    lost, won = sum(score.lost for score in scores), sum(score.won for score in scores)
    changes = f" ({lost} / {won})" if lost or won else ""
    return f"{100 * sum(score.right for score in scores) / asked:.1f}{changes}"


def _mean_loss(row: Row, style: str) -> float:
    scores = list(row.text.get(style, {}).values())
    if not scores:
        return float("nan")
    return sum(score.loss * score.num_tokens for score in scores) / sum(score.num_tokens for score in scores)


def retained_mass(row: Row) -> dict[str, float]:
    """Mean and least of the softmax mass, and the share of the host's tokens that were read for it; empty for exact."""
    num_heads = sum(retained.num_heads for retained in row.retained)
    if not num_heads:
        return {}
    selected = sum(retained.num_selected for retained in row.retained)
    return {
        "mean": sum(retained.mass for retained in row.retained) / num_heads,
        "least": min(retained.lowest for retained in row.retained),
        "tokens_read": selected / sum(retained.num_scanned for retained in row.retained),
    }


def _mass(row: Row) -> str:
    mass = retained_mass(row)
    if not mass:
        return "- | -"
    return f"{mass['mean']:.4f} ({mass['least']:.4f}) | {100 * mass['tokens_read']:.0f} %"


def as_json(rows: Mapping[str, Row], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "machine": machine(),
        "commit": commit(),
        "samples": options.samples,
        "seed": options.seed,
        "lengths": options.lengths,
        "rows": {
            configuration.name: {
                "settings": dict(configuration.settings),
                "tasks": {
                    kind: {length: _fields(score) for length, score in scores.items()}
                    for kind, scores in rows[configuration.name].tasks.items()
                },
                "text": {
                    style: {length: _fields(score) for length, score in scores.items()}
                    for style, scores in rows[configuration.name].text.items()
                },
                "retained_mass": retained_mass(rows[configuration.name]),
                "decode_seconds": round(rows[configuration.name].seconds, 1),
            }
            for configuration in options.configurations
        },
    }


def _fields(score: TaskScore | TextScore) -> dict[str, int | float]:
    return {name: getattr(score, name) for name in score.__slots__}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tasks", nargs="+", choices=tasks.KINDS, default=list(tasks.KINDS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), metavar="TOKENS")
    parser.add_argument("--samples", type=int, default=20, help="contexts a task and length (default: 20)")
    parser.add_argument(
        "--text-samples", type=int, default=8, help="documents a text and length (default: 8)"
    )
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="configurations beside `exact`, by name"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    options.configurations = [
        configuration
        for configuration in CONFIGURATIONS
        if not options.only or configuration.name in ("exact", *options.only)
    ]
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    began_s = time.monotonic()

    def report(rows: Mapping[str, Row]) -> None:
        if options.json is not None:
            record = {
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - began_s),
                **as_json(rows, options),
            }
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    print(markdown(run(options, report)))


if __name__ == "__main__":
    main()
