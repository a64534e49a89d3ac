"""What makes one model family differ from another, as data. Read from a Hugging Face config; holds no weights.

The decoder in `engine/model.py` has no branch on a family's name: everything that differs is a field here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class UnsupportedModel(Exception):
    """The checkpoint's config asks for something that no field of ModelSpec expresses; the message names it."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding: frequencies fixed at load, or, with `dynamic_factor`, growing with the length."""

    inv_freq: tuple[float, ...]  # [head_dim / 2], radians per position
    attention_factor: float  # cos and sin are multiplied by this (yarn)
    dynamic_factor: float = 0.0  # 0: not dynamic-NTK
    theta: float = 0.0  # dynamic-NTK only: base wavelength before scaling
    original_max_positions: int = 0  # dynamic-NTK only: lengths up to this use `inv_freq`


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shapes and choices of one decoder-only transformer."""

    family: str  # the config's model_type
    vocab_size: int
    hidden_size: int
    embed_size: int  # width of the token embedding; differs from hidden_size in OPT-350m only
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    activation: str  # "silu", "gelu", "relu", ...: a name of transformers' ACT2FN
    gated_mlp: bool  # down(act(gate(x)) * up(x)); otherwise fc2(act(fc1(x)))
    rms_norm: bool  # otherwise LayerNorm with bias
    norm_eps: float
    norm_affine: bool
    pre_norm: bool  # norms before attention and MLP; otherwise after the residual sum (OPT-350m)
    final_norm: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each head of q and k before rotary (Qwen3)
    rope: RopeSpec | None  # None: learned positions
    learned_position_offset: int  # row of position 0 in the learned table (OPT: 2)
    tie_embeddings: bool
    sliding_windows: tuple[int, ...]  # [num_layers]; keys seen by a query, itself included; 0: all

    def num_parameters(self) -> int:
        """Weights of the whole model, biases and norms included."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        layer = self.hidden_size * (2 * q + 2 * kv) + (q + 2 * kv) * self.qkv_bias
        layer += self.hidden_size * self.out_bias
        num_up = 2 if self.gated_mlp else 1
        layer += (num_up + 1) * self.hidden_size * self.intermediate_size
        layer += (num_up * self.intermediate_size + self.hidden_size) * self.mlp_bias
        norm = self.hidden_size * (1 if self.rms_norm else 2) * self.norm_affine
        layer += 2 * norm + 2 * self.head_dim * self.qk_norm
        total = self.num_layers * layer + norm * self.final_norm + self.vocab_size * self.embed_size
        if not self.tie_embeddings:
            total += self.vocab_size * self.embed_size
        if self.rope is None:
            total += (self.max_positions + self.learned_position_offset) * self.hidden_size
        if self.embed_size != self.hidden_size:
            total += 2 * self.embed_size * self.hidden_size
        return total


def spec_from_config(config: PreTrainedConfig) -> ModelSpec:
    """Read the fields of a transformers config.

    Raises:
        UnsupportedModel: an unknown model_type, rope type, or activation.
    """
    reader = _READERS.get(config.model_type)
    if reader is None:
        known = ", ".join(sorted(_READERS))
        raise UnsupportedModel(f"model_type {config.model_type!r} is not supported; supported: {known}")
    return reader(config)


def _read_rope(config: PreTrainedConfig, head_dim: int) -> RopeSpec:
    config.standardize_rope_params()  # older checkpoints spell it rope_theta and rope_scaling
    parameters: Mapping[str, Any] = config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("partial rotary embeddings (partial_rotary_factor < 1) are not supported")
    theta = float(parameters["rope_theta"])
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    if kind == "default":
        return RopeSpec(tuple((1.0 / theta**exponents).tolist()), 1.0)
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise UnsupportedModel(
            f"rope type {kind!r} is not supported; supported: linear, dynamic, llama3, yarn"
        )
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if kind == "dynamic":
        return RopeSpec(
            tuple(inv_freq.tolist()),
            float(attention_factor),
            dynamic_factor=float(parameters["factor"]),
            theta=theta,
            original_max_positions=config.max_position_embeddings,
        )
    return RopeSpec(tuple(inv_freq.tolist()), float(attention_factor))


def _max_positions(config: PreTrainedConfig) -> int:
    """The context that the rope scaling stretches to; llama3 checkpoints already state it stretched."""
    config.standardize_rope_params()
    parameters: Mapping[str, Any] = config.rope_parameters
    stated: int = config.max_position_embeddings
    kind = parameters.get("rope_type", "default")
    if kind in ("linear", "dynamic"):
        return int(stated * parameters["factor"])
    if kind == "yarn":
        return max(
            stated, int(parameters.get("original_max_position_embeddings", stated) * parameters["factor"])
        )
    return stated


def _sliding_windows(config: PreTrainedConfig) -> tuple[int, ...]:
    window: int = getattr(config, "sliding_window", None) or 0
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)
    num_layers: int = config.num_hidden_layers
    return (window,) * num_layers


def _read_llama(config: PreTrainedConfig) -> ModelSpec:
    """Llama, Mistral, Qwen2 and Qwen3: one shape, different biases, norms and windows."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bias = bool(getattr(config, "attention_bias", False))
    return ModelSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        embed_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size,
        max_positions=_max_positions(config),
        activation=config.hidden_act,
        gated_mlp=True,
        rms_norm=True,
        norm_eps=config.rms_norm_eps,
        norm_affine=True,
        pre_norm=True,
        final_norm=True,
        qkv_bias=config.model_type == "qwen2" or bias,
        out_bias=config.model_type != "qwen2" and bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        qk_norm=config.model_type == "qwen3",
        rope=_read_rope(config, head_dim),
        learned_position_offset=0,
        tie_embeddings=config.tie_word_embeddings,
        sliding_windows=_sliding_windows(config),
    )


def _read_opt(config: PreTrainedConfig) -> ModelSpec:
    return ModelSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        embed_size=config.word_embed_proj_dim,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        intermediate_size=config.ffn_dim,
        max_positions=config.max_position_embeddings,
        activation=config.activation_function,
        gated_mlp=False,
        rms_norm=False,
        norm_eps=1e-5,
        norm_affine=config.layer_norm_elementwise_affine,
        pre_norm=config.do_layer_norm_before,
        final_norm=config.do_layer_norm_before and not config._remove_final_layer_norm,
        qkv_bias=config.enable_bias,
        out_bias=config.enable_bias,
        mlp_bias=config.enable_bias,
        qk_norm=False,
        rope=None,
        learned_position_offset=2,
        tie_embeddings=config.tie_word_embeddings,
        sliding_windows=(0,) * config.num_hidden_layers,
    )


_READERS = {
    "llama": _read_llama,
    "mistral": _read_llama,
    "qwen2": _read_llama,
    "qwen3": _read_llama,
    "opt": _read_opt,
}
