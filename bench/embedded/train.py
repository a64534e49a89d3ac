"""Trains the embedded model from scratch on a CPU or a GPU: `python -m bench.embedded.train --state FOLDER`.

Stopped at any moment and started again with the same command, it goes on from the last state saved (every
minute, and on SIGTERM). `bench.embedded.export` turns a state into a Hugging Face checkpoint.
"""

import argparse
import os
import signal
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from bench.embedded.model import Llama, ModelShape
from bench.embedded.rows import Batch, RowMaker
from bench.retrieval import held_out_documents

SAVE_SECONDS = 60.0
LOG_STEPS = 25
HELD_OUT_STEPS = 250  # between two looks at the loss on held-out text
HELD_OUT_DOCUMENTS = 60  # of each sort
WARMUP_STEPS = 40


@dataclass(frozen=True, slots=True)
class Part:
    """One sort of step: its batch, and how often it is taken."""

    share: float  # of the steps of its stage
    rows: int
    length: int
    mix: Mapping[str, float]
    skip: float = 0.0  # share of rows whose positions jump
    queries: int = 0  # > 0: only the last so many tokens get gradients; those before are read and no more


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of the run. The learning rate goes linearly from `rates[0]` to `rates[1]` over its tokens."""

    name: str
    million_tokens: float
    rates: tuple[float, float]
    parts: tuple[Part, ...]
    random_tokens: int = 2048  # the token games draw from the ids below this


GAMES = {"repeat": 0.5, "pairs": 0.5}
MIXED = {
    "repeat": 0.03, "pairs": 0.07, "task": 0.3, "fact_chat": 0.08, "story": 0.06, "library": 0.36, "chat": 0.1,
}  # fmt: skip
TEXT = {"library": 0.68, "chat": 0.22, "story": 0.1}
TALK = {"library": 0.5, "chat": 0.42, "story": 0.08}
READING = {"library": 0.82, "chat": 0.13, "story": 0.05}
RECALL = {"task": 0.6, "codes": 0.2, "fact_chat": 0.15, "pairs": 0.05}

# Looking back is learned first, on short rows of random tokens where half of the targets pay for it; then words,
# then length. Text learns best on short rows, and takes more than half of the steps once looking back is there.
STAGES = (
    Stage("induction", 2.0, (4e-3, 4e-3), (Part(1.0, 32, 64, GAMES),), random_tokens=149),
    Stage("vocabulary", 2.0, (4e-3, 4e-3), (Part(1.0, 32, 64, GAMES),)),
    Stage("words", 1.2, (4e-3, 4e-3), (Part(1.0, 16, 256, MIXED, skip=0.1),)),
    Stage("medium", 2.5, (4e-3, 3e-3), (Part(1.0, 8, 512, MIXED, skip=0.4),)),
    Stage("long", 1.0, (3e-3, 2.5e-3), (Part(0.6, 8, 512, TEXT), Part(0.4, 4, 1024, RECALL, skip=0.5))),
    Stage(
        "last",
        7.0,
        (2.5e-3, 5e-5),
        (
            Part(0.48, 8, 512, TEXT),
            Part(0.16, 8, 512, RECALL, skip=0.5),
            Part(0.18, 2, 2048, RECALL, skip=0.5),
            Part(0.09, 1, 4096, RECALL, queries=512),
            Part(0.09, 1, 8192, RECALL, queries=512),
        ),
    ),
    Stage(
        "polish",
        2.2,
        (1.5e-3, 2e-5),
        (
            Part(0.3, 8, 512, TALK),
            Part(0.45, 8, 512, RECALL, skip=0.5),
            Part(0.12, 2, 2048, RECALL, skip=0.5),
            Part(0.08, 1, 4096, RECALL, queries=512),
            Part(0.05, 1, 8192, RECALL, queries=512),
        ),
    ),
    Stage(
        "library",
        8.0,
        (2.5e-3, 2e-5),
        (
            Part(0.58, 8, 512, READING),
            Part(0.1, 16, 256, {"codes": 1.0}),
            Part(0.16, 8, 512, RECALL, skip=0.5),
            Part(0.08, 2, 2048, RECALL, skip=0.5),
            Part(0.04, 1, 4096, RECALL, queries=512),
            Part(0.04, 1, 8192, RECALL, queries=512),
        ),
    ),
)


def optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("layers.")]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or not name.startswith("layers.")]
    return [
        torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_and_hits(model: Llama, batch: Batch, queries: int) -> tuple[Tensor, Tensor]:
    """The weighted mean loss, and the share of the heaviest targets that are the most likely token."""
    ids, targets, positions, weights = batch.ids[:, :-1], batch.ids[:, 1:], batch.positions, batch.weights
    past = None
    if queries:
        split = ids.shape[1] - queries
        with torch.no_grad():
            _, past = model(ids[:, :split], positions[:, :split])
        # Autocast keeps the casts of the weights, and those made here carry no gradient.
        torch.clear_autocast_cache()
        ids, targets = ids[:, split:], targets[:, split:]
        positions, weights = positions[:, split:], weights[:, split:]
    hidden, _ = model(ids, positions, past)
    chosen = weights > 0  # the output head is a third of the work: skip targets that do not count
    logits = model.logits(hidden[chosen]).float()
    weight, target = weights[chosen], targets[chosen]
    losses = functional.cross_entropy(logits, target, reduction="none")
    heaviest = weight == weight.max()
    hits = (logits.detach().argmax(-1) == target)[heaviest].float().mean()
    return (losses * weight).sum() / weight.sum(), hits


class Trainer:
    """Model, optimizers, and how far each stage has come. `state` is where all of it is kept between runs."""

    def __init__(self, state: Path, tokenizer: Tokenizer, device: str) -> None:
        self.path = state / "state.pt"
        self.device = device
        self.tokenizer = tokenizer
        torch.manual_seed(0)
        self.model = Llama(ModelShape(vocab_size=tokenizer.get_vocab_size())).to(device)
        self.optimizers = optimizers(self.model)
        self.tokens_done: dict[str, int] = {}
        self.library_read = 0
        self.seconds = 0.0
        self.stopping = False
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            self.model.load_state_dict(saved["model"])
            for optimizer, kept in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            self.tokens_done, self.seconds = saved["tokens_done"], saved["seconds"]
            self.library_read = saved.get("library_read", 0)  # the first states have no such count
        state.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        part = self.path.with_suffix(".part")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "tokens_done": self.tokens_done,
                "library_read": self.library_read,
                "seconds": self.seconds,
            },
            part,
        )
        os.replace(part, self.path)

    def stop(self, signum: int, frame: FrameType | None) -> None:
        self.stopping = True

    def step(self, batch: Batch, queries: int, rate: float) -> tuple[float, float]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        batch = Batch(
            batch.ids.to(self.device), batch.weights.to(self.device), batch.positions.to(self.device)
        )
        with torch.autocast(self.device, torch.bfloat16):
            loss, hits = loss_and_hits(self.model, batch, queries)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item(), hits.item()

    def held_out_losses(self) -> dict[str, float]:
        """Nats a token on a sample of each sort of held-out text. Only told: nothing is chosen by it."""
        losses: dict[str, float] = {}
        for name, documents in held_out_documents(0).items():
            total, count = 0.0, 0
            for document in documents[:HELD_OUT_DOCUMENTS]:
                ids = self.tokenizer.encode(f"<|eos|>{document}<|eos|>").ids[:1024]
                row = torch.tensor([ids], device=self.device)
                with torch.inference_mode():
                    hidden, _ = self.model(row, torch.arange(len(ids), device=self.device)[None])
                    logits = self.model.logits(hidden[0, :-1])
                total += functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
                count += len(ids) - 1
            losses[name] = total / count
        return losses

    def run(self, stage: Stage) -> None:
        total = int(stage.million_tokens * 1e6)
        done = self.tokens_done.setdefault(stage.name, 0)
        seed = zlib.crc32(f"{stage.name}/{done}".encode())
        maker = RowMaker(self.tokenizer, seed, self.library_read)
        maker.random_tokens = stage.random_tokens
        steps, window = 0, 0
        seen: dict[int, list[tuple[float, float]]] = {}
        began = saved_at = logged_at = time.monotonic()
        while done < total and not self.stopping:
            chosen = maker.rng.choices(range(len(stage.parts)), [part.share for part in stage.parts])[0]
            part = stage.parts[chosen]
            begin, end = stage.rates
            rate = (begin + (end - begin) * done / total) * min(1.0, (steps + 1) / WARMUP_STEPS)
            batch = maker.batch(part.mix, part.rows, part.length, part.skip)
            seen.setdefault(chosen, []).append(self.step(batch, part.queries, rate))
            steps, window = steps + 1, window + part.rows * part.length
            done += part.rows * part.length
            self.tokens_done[stage.name] = done
            self.library_read = maker.library_read
            now = time.monotonic()
            if steps % LOG_STEPS == 0:
                clock, speed = time.strftime("%H:%M:%S"), window / (now - logged_at)
                print(
                    f"{clock} {stage.name} {done / 1e6:.2f}M {speed:.0f} tok/s{summary(stage, seen)}",
                    flush=True,
                )
                window, logged_at = 0, now
                seen.clear()
            if steps % HELD_OUT_STEPS == 0:
                losses = self.held_out_losses().items()
                print("held out " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses), flush=True)
            if now - saved_at > SAVE_SECONDS or self.stopping or done >= total:
                self.seconds += now - began
                began = saved_at = now
                self.save()


def summary(stage: Stage, seen: Mapping[int, list[tuple[float, float]]]) -> str:
    """Mean loss and share of hits of each part since the last line of the log."""
    return "".join(
        f" | {stage.parts[i].length}: {sum(loss for loss, _ in pairs) / len(pairs):.3f}"
        f" {sum(hit for _, hit in pairs) / len(pairs):.3f}"
        for i, pairs in sorted(seen.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=Path("build/embedded"))
    parser.add_argument("--tokenizer", type=Path, default=Path("configs/embedded/tokenizer.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    trainer = Trainer(options.state, Tokenizer.from_file(str(options.tokenizer)), options.device)
    signal.signal(signal.SIGTERM, trainer.stop)
    signal.signal(signal.SIGINT, trainer.stop)
    for stage in STAGES:
        if trainer.tokens_done.get(stage.name, 0) < stage.million_tokens * 1e6 and not trainer.stopping:
            trainer.run(stage)


if __name__ == "__main__":
    main()
