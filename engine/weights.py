"""From a checkpoint on disk to the decoder's tensors. safetensors only: a pickle can run code.

Projections that read the same input are stored as one matrix (q, k and v; gate and up), so that a layer is four
matrix products whatever the family. Every tensor is checked against the shape that the config implies before
any is read.
"""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hybridgen.configs.presets import preset_folder
from hybridgen.engine.model_spec import ModelSpec
from hybridgen.kernels.linear import Linear

logger = logging.getLogger(__name__)


class WeightError(Exception):
    """The checkpoint cannot be loaded as the model its config describes; the message names tensor and file."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm's scale and shift; LayerNorm has both or, in some OPT models, neither; RMSNorm the scale alone."""

    weight: Tensor | None  # [hidden]
    bias: Tensor | None  # [hidden]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer."""

    attention_norm: Norm
    qkv: Linear  # [(heads + 2 * kv_heads) * head_dim, hidden]: q, then k, then v
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    out: Linear  # [hidden, heads * head_dim]
    mlp_norm: Norm
    up: Linear  # gated: [2 * intermediate, hidden], gate first; otherwise [intermediate, hidden]
    down: Linear  # [hidden, intermediate]


@dataclass(frozen=True, slots=True)
class Weights:
    """All of a decoder's parameters."""

    embedding: Tensor  # [vocab, embed]
    positions: Tensor | None  # [offset + max_positions, hidden]
    project_in: Linear | None  # [hidden, embed]
    layers: tuple[LayerWeights, ...]
    final_norm: Norm | None
    project_out: Linear | None  # [embed, hidden]
    lm_head: Linear  # [vocab, embed]; the embedding's values when tied


@dataclass(frozen=True, slots=True)
class _Names:
    """How a family spells its parameters. `{}` is the layer's number."""

    prefix: str
    embedding: str = "embed_tokens"
    layer: str = "layers.{}."
    attention: str = "self_attn."
    out: str = "self_attn.o_proj"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    final_norm: str = "norm"


_LLAMA_NAMES = _Names(prefix="model.")
_OPT_NAMES = _Names(
    prefix="model.decoder.",
    out="self_attn.out_proj",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    up=("fc1",),
    down="fc2",
    final_norm="final_layer_norm",
)

# Takes a tensor's name in the checkpoint and the shape it must have.
_Read = Callable[[str, tuple[int, ...]], Tensor]


def resolve_model(model: str, *, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The local folder of `model`: itself if it is one, a preset's shapes, or a snapshot from the Hugging Face hub.

    Raises:
        WeightError: neither a folder nor a model that the hub, or its local cache, can give.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise WeightError(f"{path} has no config.json: not a model folder")
        return path
    if path.is_absolute() or model.startswith((".", "~")):
        raise WeightError(f"model folder {path} does not exist")
    preset = preset_folder(model)
    if preset is not None:
        return preset
    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        found = snapshot_download(model, revision=revision, cache_dir=download_dir, allow_patterns=patterns)
    except Exception as error:  # the hub client raises its own, requests' and OS errors alike
        raise WeightError(
            f"{model!r} is no local folder and could not be had from the hub: {error}"
        ) from error
    return Path(found)


def load_weights(
    folder: Path, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device, show_progress: bool = False
) -> Weights:
    """Read a safetensors checkpoint, one file or many, into `dtype` on `device`.

    Raises:
        WeightError: no safetensors files, an unreadable file, or tensors missing or of another shape (all are named).
    """
    files = _tensor_files(folder)
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        for path in sorted(set(files.values())):
            try:
                handles[path] = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise WeightError(f"cannot read {path}: {error}") from error
        _check_tensors(spec, files, handles)
        console = Console(stderr=True)
        bar = Progress(console=console, transient=True, disable=not (show_progress and console.is_terminal))
        progress = stack.enter_context(bar)
        task = progress.add_task("Loading weights", total=sum(1 for _ in _expected_tensors(spec)))

        def read(name: str, shape: tuple[int, ...]) -> Tensor:
            found = _find(name, files)
            assert found is not None, name
            progress.advance(task)
            tensor: Tensor = handles[files[found]].get_tensor(found)
            return tensor.to(device=device, dtype=dtype)

        return _assemble(spec, read)


def dummy_weights(spec: ModelSpec, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Weights:
    """Random weights of the right shapes, for benchmarks: normal with deviation 0.02, norms at 1, biases at 0."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith(".bias"):
            return torch.zeros(shape, dtype=dtype, device=device)
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)

    return _assemble(spec, read)


def _assemble(spec: ModelSpec, read: _Read) -> Weights:
    names = _names(spec)
    hidden, embed = spec.hidden_size, spec.embed_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim

    def norm(name: str, size: int) -> Norm:
        if not spec.norm_affine:
            return Norm(None, None)
        bias = None if spec.rms_norm else read(f"{name}.bias", (size,))
        return Norm(read(f"{name}.weight", (size,)), bias)

    def linear(parts: tuple[tuple[str, int], ...], inputs: int, *, bias: bool) -> Linear:
        weight = [read(f"{name}.weight", (outputs, inputs)) for name, outputs in parts]
        shift = [read(f"{name}.bias", (outputs,)) for name, outputs in parts] if bias else []
        # One part is already the matrix; several are copied once into one and let go.
        return Linear(
            weight[0].contiguous() if len(weight) == 1 else torch.cat(weight),
            torch.cat(shift) if shift else None,
        )

    def layer(index: int) -> LayerWeights:
        base = names.prefix + names.layer.format(index)
        attention = base + names.attention
        parts = tuple((f"{attention}{p}_proj", n) for p, n in (("q", q_size), ("k", kv_size), ("v", kv_size)))
        up = tuple((base + name, spec.intermediate_size) for name in names.up)
        return LayerWeights(
            attention_norm=norm(base + names.attention_norm, hidden),
            qkv=linear(parts, hidden, bias=spec.qkv_bias),
            q_norm=read(f"{attention}q_norm.weight", (spec.head_dim,)) if spec.qk_norm else None,
            k_norm=read(f"{attention}k_norm.weight", (spec.head_dim,)) if spec.qk_norm else None,
            out=linear(((base + names.out, hidden),), q_size, bias=spec.out_bias),
            mlp_norm=norm(base + names.mlp_norm, hidden),
            up=linear(up, hidden, bias=spec.mlp_bias),
            down=linear(((base + names.down, hidden),), spec.intermediate_size, bias=spec.mlp_bias),
        )

    embedding = read(f"{names.prefix}{names.embedding}.weight", (spec.vocab_size, embed))
    rows = spec.max_positions + spec.learned_position_offset
    projected = embed != hidden
    return Weights(
        embedding=embedding,
        positions=read(f"{names.prefix}embed_positions.weight", (rows, hidden))
        if spec.rope is None
        else None,
        project_in=Linear(read(f"{names.prefix}project_in.weight", (hidden, embed))) if projected else None,
        layers=tuple(layer(index) for index in range(spec.num_layers)),
        final_norm=norm(names.prefix + names.final_norm, hidden) if spec.final_norm else None,
        project_out=Linear(read(f"{names.prefix}project_out.weight", (embed, hidden))) if projected else None,
        lm_head=Linear(
            embedding if spec.tie_embeddings else read("lm_head.weight", (spec.vocab_size, embed))
        ),
    )


def _names(spec: ModelSpec) -> _Names:
    return _OPT_NAMES if spec.family == "opt" else _LLAMA_NAMES


def _expected_tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that `_assemble` will ask for, found by letting it ask."""
    asked: list[tuple[str, tuple[int, ...]]] = []

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        asked.append((name, shape))
        return torch.empty(shape, device="meta")

    _assemble(spec, read)
    return iter(asked)


def _find(name: str, files: dict[str, Path]) -> str | None:
    """The checkpoint's spelling of `name`: some leave out the leading `model.`."""
    for candidate in (name, name.removeprefix("model.")):
        if candidate in files:
            return candidate
    return None


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise WeightError(f"{index} is not a safetensors index: {error}") from error
        missing = sorted({name for name in weight_map.values() if not (folder / name).is_file()})
        if missing:
            raise WeightError(f"{index} names files that are not there: {', '.join(missing)}")
        return {tensor: folder / name for tensor, name in weight_map.items()}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {', '.join(pickles)} are pickles, which are not read: convert them" if pickles else ""
        raise WeightError(f"{folder} has no *.safetensors file{hint}")
    files = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as handle:
                files.update(dict.fromkeys(handle.keys(), path))
        except (OSError, SafetensorError) as error:
            raise WeightError(f"cannot read {path}: {error}") from error
    return files


def _check_tensors(spec: ModelSpec, files: dict[str, Path], handles: dict[Path, Any]) -> None:
    problems = []
    for name, shape in _expected_tensors(spec):
        found = _find(name, files)
        if found is None:
            problems.append(f"{name} {list(shape)} is missing")
            continue
        path = files[found]
        try:
            actual = tuple(handles[path].get_slice(found).get_shape())
        except SafetensorError as error:
            problems.append(f"{name}: {error} in {path.name}")
            continue
        if actual != shape:
            problems.append(
                f"{name} has shape {list(actual)} in {path.name}; the config implies {list(shape)}"
            )
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise WeightError("; ".join(problems[:5]) + more)
