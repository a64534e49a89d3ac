"""Small random checkpoints of every supported family, and what transformers generates from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 320

# A deviation of 0.02 leaves the logits of so small a model nearly flat, and greedy choice would hang on rounding.
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GATED: dict[str, Any] = {
    **_SHAPE,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
_OPT: dict[str, Any] = {**_SHAPE, "ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.15}


def _scaled(**rope: Any) -> LlamaConfig:
    return LlamaConfig(**_GATED, rope_parameters={"rope_theta": 10000.0, **rope})


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_GATED),
    "llama-mha-biases": LlamaConfig(
        **{**_GATED, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True
    ),
    "llama-head-dim": LlamaConfig(**_GATED, head_dim=24),
    "llama-tied": LlamaConfig(**{**_GATED, "tie_word_embeddings": True}),
    "llama-rope-linear": _scaled(rope_type="linear", factor=4.0),
    # The original context is shorter than the prompts, so that the frequencies do change.
    "llama-rope-dynamic": LlamaConfig(
        **{**_GATED, "max_position_embeddings": 32},
        rope_parameters={"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 8.0},
    ),
    "llama-rope-llama3": _scaled(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "llama-rope-yarn": _scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
    "mistral": MistralConfig(**_GATED, sliding_window=None),
    "mistral-window": MistralConfig(**_GATED, sliding_window=20),
    "qwen2": Qwen2Config(**_GATED),
    "qwen2-window-in-upper-layers": Qwen2Config(
        **_GATED, use_sliding_window=True, sliding_window=20, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**_GATED, head_dim=32),
    "opt": OPTConfig(**_OPT),
    "opt-350m-like": OPTConfig(**{**_OPT, "word_embed_proj_dim": 32}, do_layer_norm_before=False),
    "opt-no-bias-no-affine": OPTConfig(**_OPT, enable_bias=False, layer_norm_elementwise_affine=False),
}


def save_model(name: str, folder: Path, *, seed: int = 0) -> PreTrainedModel:
    """Write the checkpoint of `CONFIGS[name]` in float32 and return the model it holds."""
    torch.set_num_threads(1)  # the models are too small to share out, least of all on a busy machine
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Fresh norms are all ones and biases all zeros: a loader that mixed them up would not show.
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            assert parameter.isfinite().all(), parameter_name
    model.eval()
    model.save_pretrained(folder)
    return model


def generate(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The greedy continuation by transformers, one sequence alone."""
    ids = torch.tensor([list(prompt)])
    # Dynamic NTK keeps the longest sequence's frequencies until it sees a short one: start every sequence fresh.
    model(ids[:, :1])
    out = model.generate(  # type: ignore[operator]  # the stubs lose the mixin
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens
    )
    assert isinstance(out, torch.Tensor)
    return [int(token) for token in out[0, len(prompt) :]]


def save_byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are the 256 bytes, with a chat template that is easy to read."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=(
            "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        ),
    )
    tokenizer.save_pretrained(folder)
