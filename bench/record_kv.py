"""Keys, values and queries as a trained model has them: `python -m bench.record_kv`.

Speed of sparse attention depends on where the softmax mass lies, and random K and q say nothing about that. The
embedded model reads contexts of `bench.embedded.tasks` (split "bench") and of held-out stories; kept are K and V of
all tokens as a cache holds them, rotated, and the queries of the last tokens: the end of the question and the answer.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from bench.embedded import tasks, texts

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "configs" / "embedded"
NUM_QUERIES = 8
KINDS = (*tasks.KINDS, "stories")


@dataclass(frozen=True, slots=True)
class Recording:
    """One sequence. Query i is that of token `num_tokens - NUM_QUERIES + i` and sees the tokens up to its own."""

    kind: str
    k: Tensor  # [num_layers, num_tokens, num_kv_heads, head_dim]  bfloat16
    v: Tensor  # the same
    q: Tensor  # [num_layers, NUM_QUERIES, num_heads, head_dim]

    @property
    def num_tokens(self) -> int:
        return self.k.shape[1]


def token_ids(tokenizer: Tokenizer, kind: str, length: int, seed: int) -> list[int]:
    """A context with one question and its answer, or stories; exactly `length` tokens, which cuts a context's head."""

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    if kind == "stories":
        rng = random.Random(f"bench/record/{seed}")
        text = ""
        while count_tokens(text) < length:
            text += "".join(f"{texts.story(rng)}<|eos|>" for _ in range(20))
        ids: list[int] = tokenizer.encode(text).ids
        return ids[:length]
    # Contexts fall up to 20 tokens short of what is asked for, and questions differ in length.
    example = tasks.make(kind, seed, length + 40, count_tokens, split="bench")
    question = example.questions[0]
    ids = tokenizer.encode(example.context + question.prompt + question.answer).ids
    return ids[len(ids) - length :]


def record(model: Path, kinds: Sequence[str], length: int, seed: int) -> list[Recording]:
    """One recording of each kind, through transformers in bfloat16."""
    # Imported here, since reading finished recordings needs neither.
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Any:
        heads_last = [
            half[0].transpose(0, 1).contiguous() for half in (query[:, :, -NUM_QUERIES:], key, value)
        ]
        seen.append((heads_last[0], heads_last[1], heads_last[2]))
        return sdpa_attention_forward(module, query, key, value, *rest, **more)

    AttentionInterface.register("recording", attend)
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation="recording"
    )
    network.train(False)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    recordings = []
    for kind in kinds:
        seen.clear()
        with torch.inference_mode():
            network(
                torch.tensor([token_ids(tokenizer, kind, length, seed)]), use_cache=False, logits_to_keep=1
            )
        q, k, v = (torch.stack(rows) for rows in zip(*seen, strict=True))
        recordings.append(Recording(kind, k, v, q))
    return recordings


def load_or_record(folder: Path, length: int, *, model: Path = MODEL, seed: int = 1) -> list[Recording]:
    """The recordings of all kinds, from the file in `folder` if this model has made it."""
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    made_of = {"weights": weights, "kinds": json.dumps(KINDS), "seed": str(seed), "queries": str(NUM_QUERIES)}
    path = folder / f"recorded-{length}.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            if file.metadata() == made_of:
                return [
                    Recording(kind, *(file.get_tensor(f"{kind}.{name}") for name in ("k", "v", "q")))
                    for kind in KINDS
                ]
    recordings = record(model, KINDS, length, seed)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{one.kind}.{name}": tensor
        for one in recordings
        for name, tensor in (("k", one.k), ("v", one.v), ("q", one.q))
    }
    save_file(tensors, path, metadata=made_of)
    return recordings


def tokens_of_mass(recording: Recording, layer: int, mass: float) -> Tensor:
    """Share of the tokens that hold `mass` of the softmax for every query head of a KV head: [queries, num_kv_heads].

    Tokens are taken by their largest share among the heads of the group, and the fewest that bring each head to `mass`.
    """
    k, q = recording.k[layer].float(), recording.q[layer].float()
    num_tokens, num_kv_heads, head_dim = k.shape
    shares = torch.empty(len(q), num_kv_heads)
    for i in range(len(q)):
        visible = num_tokens - len(q) + i + 1
        for head, rows in enumerate(q[i].view(num_kv_heads, -1, head_dim)):
            weights = torch.softmax(rows @ k[:visible, head].T * head_dim**-0.5, dim=-1)
            order = weights.amax(dim=0).argsort(descending=True)
            reached = weights[:, order].cumsum(dim=-1).amin(dim=0)
            shares[i, head] = (int((reached < mass).sum()) + 1) / visible
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m bench.record_kv",
    )
    parser.add_argument("--length", type=int, default=8192, metavar="TOKENS")
    parser.add_argument("--mass", type=float, default=0.99, help="print the share of tokens that hold it")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "build" / "bench", metavar="DIR")
    options = parser.parse_args()
    recordings = load_or_record(options.work_dir, options.length)
    num_layers = len(recordings[0].k)
    print("share of tokens that hold the mass, mean over queries and KV heads (most)")
    print(f"{'kind':12} " + " ".join(f"{f'layer {layer}':>15}" for layer in range(num_layers)))
    for recording in recordings:
        shares = [tokens_of_mass(recording, layer, options.mass) for layer in range(num_layers)]
        cells = [f"{100 * share.mean():6.2f} ({100 * share.max():5.1f})" for share in shares]
        print(f"{recording.kind:12} " + " ".join(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    main()
