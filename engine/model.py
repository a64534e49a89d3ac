"""The decoder: one forward pass over the tokens of a step. Knows no request, no page and no family by name.

Attention is a callable given with each pass, so that the same decoder runs on one tier or on several.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor
from transformers.activations import ACT2FN

from hybridgen.engine.model_spec import ModelSpec, RopeSpec, UnsupportedModel
from hybridgen.engine.weights import LayerWeights, Norm, Weights
from hybridgen.kernels.layer import Layer
from hybridgen.kernels.linear import streams
from hybridgen.kernels.ops import fused_add_rms_norm, rms_norm, rotary_, silu_and_mul
from hybridgen.kernels.pool import AttentionPool


class Attention(Protocol):
    """Attention of one step's queries over everything their sequences have cached, this step included."""

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write this step's keys and values, [tokens, kv_heads, head_dim], to their slots."""
        ...

    def attend(self, layer: int, q: Tensor, *, sliding_window: int = 0) -> Tensor:
        """q [tokens, heads, head_dim] -> the same shape."""
        ...

    @property
    def ahead_rows(self) -> Tensor | None:
        """[rows], int64: the tokens whose queries are to be foretold a layer ahead; None for none."""
        ...

    def ahead(self, layer: int, q: Tensor) -> None:
        """Told before the layer before `layer` is attended: what the queries of `ahead_rows` will be about.

        Args:
            q: [rows, heads, head_dim], from the residual stream that enters the layer before.
        """
        ...


class RotaryTable:
    """cos and sin of every position's angles.

    Dynamic NTK (`dynamic_factor`) changes a token's frequencies with the length of the sequence at the time when the
    token was computed. To be independent of chunking, that length is taken as the prompt's for prompt tokens and
    as position + 1 for generated ones, which is what an unchunked run sees.
    """

    def __init__(self, spec: RopeSpec, max_positions: int, device: torch.device) -> None:
        self._spec = spec
        self._inv_freq = torch.tensor(spec.inv_freq, dtype=torch.float32, device=device)
        positions = torch.arange(max_positions, dtype=torch.float32, device=device)
        self._cos, self._sin = self._cos_sin(positions, self._inv_freq)

    def _cos_sin(self, positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None] * inv_freq
        return angles.cos() * self._spec.attention_factor, angles.sin() * self._spec.attention_factor

    def lookup(self, positions: Tensor, prompt_lens: Tensor) -> tuple[Tensor, Tensor]:
        """positions, prompt_lens [tokens], int64 -> cos, sin [tokens, head_dim / 2], float32."""
        spec = self._spec
        if not spec.dynamic_factor:
            return self._cos[positions], self._sin[positions]
        lengths = torch.maximum(prompt_lens, positions + 1).clamp(min=spec.original_max_positions)
        dim = 2 * len(spec.inv_freq)
        stretch = spec.dynamic_factor * lengths / spec.original_max_positions - (spec.dynamic_factor - 1)
        base = spec.theta * stretch.float() ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        return self._cos_sin(positions.float(), 1.0 / base[:, None] ** exponents)


class Decoder:
    """A decoder-only transformer, differences between families being fields of its ModelSpec.

    Args:
        pool: shares out the row-wise operations when there are many rows.
        layer_ahead: foretell each layer's queries to attentions that ask for it. The residual stream changes little
            from layer to layer, so the next layer's norm and query projection of it come close.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        *,
        max_model_len: int,
        pool: AttentionPool | None = None,
        layer_ahead: bool = False,
    ) -> None:
        if spec.activation not in ACT2FN:
            raise UnsupportedModel(f"activation {spec.activation!r} is not known to transformers")
        self.spec = spec
        self._weights = weights
        self._pool = pool
        self._activation: Callable[[Tensor], Tensor] = ACT2FN[spec.activation]
        device = weights.embedding.device
        q_size = spec.num_heads * spec.head_dim
        self._ahead_q = tuple(layer.qkv.first(q_size) for layer in weights.layers) if layer_ahead else ()
        self._fused = _fused_layers(spec, weights) if spec.pre_norm and streams(pool, 1) else ()
        self._rotary = None if spec.rope is None else RotaryTable(spec.rope, max_model_len, device)

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, positions: Tensor, prompt_lens: Tensor, attention: Attention, rows: Tensor
    ) -> Tensor:
        """The last hidden states of chosen tokens.

        Args:
            tokens, positions: [tokens], int64: ids, and places in their sequences from 0.
            prompt_lens: [tokens], int64: the prompt length of each token's sequence (dynamic rope reads it).
            attention: this step's.
            rows: [rows], int64: the tokens whose hidden states are wanted.

        Returns:
            [rows, embed_size], ready for `logits`.
        """
        spec, weights = self.spec, self._weights
        x = F.embedding(tokens, weights.embedding)
        if weights.project_in is not None:
            x = weights.project_in(x, pool=self._pool)
        if weights.positions is not None:
            x = x + F.embedding(positions + spec.learned_position_offset, weights.positions)
        rotation = None if self._rotary is None else self._rotary.lookup(positions, prompt_lens)
        x = (
            self._pre_norm_layers(x, rotation, attention, rows)
            if spec.pre_norm
            else (self._post_norm_layers(x, rotation, attention)[rows])
        )
        return x if weights.project_out is None else weights.project_out(x, pool=self._pool)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, embed_size] -> [rows, vocab_size], in the model's dtype."""
        return self._weights.lm_head(hidden, pool=self._pool)

    def _pre_norm_layers(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, attention: Attention, rows: Tensor
    ) -> Tensor:
        # `residual` is the running sum; `x` is always what the last block adds to it.
        layers = self._weights.layers
        residual = x
        if self._fused and streams(self._pool, len(residual)):
            return self._fused_layers(residual, rotation, attention, self._pool)[rows]
        x = self._norm(residual, layers[0].attention_norm)
        for index, layer in enumerate(layers):
            self._look_ahead(index + 1, residual, rotation, attention)
            x = self._attention(index, layer, x, rotation, attention)
            if index == len(layers) - 1 and len(rows) < len(x):
                # Past the last attention, tokens no longer see each other: go on with the wanted ones alone.
                x, residual = x[rows], residual[rows]
                rows = torch.arange(len(rows), device=rows.device)
            x = self._add_norm(x, residual, layer.mlp_norm)
            x = self._mlp(layer, x)
            if index + 1 < len(layers):
                x = self._add_norm(x, residual, layers[index + 1].attention_norm)
        final = self._weights.final_norm
        x = residual + x if final is None else self._add_norm(x, residual, final)
        return x[rows]

    def _fused_layers(
        self,
        residual: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        attention: Attention,
        pool: AttentionPool,
    ) -> Tensor:
        """As `_pre_norm_layers` does, to the same bits: few rows, and each half of a layer one call."""
        x = None
        for index, layer in enumerate(self._fused):
            q, k, v = layer.enter(x, residual, rotation, pool)
            self._look_ahead(index + 1, residual, rotation, attention)
            attention.store(index, k, v)
            out = attention.attend(index, q, sliding_window=self.spec.sliding_windows[index])
            x = layer.leave(out, residual, pool)
        final = self._weights.final_norm
        assert x is not None, "a decoder without layers"
        return residual + x if final is None else self._add_norm(x, residual, final)

    def _post_norm_layers(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, attention: Attention
    ) -> Tensor:
        for index, layer in enumerate(self._weights.layers):
            self._look_ahead(index + 1, x, rotation, attention)
            x = self._norm(x + self._attention(index, layer, x, rotation, attention), layer.attention_norm)
            x = self._norm(x + self._mlp(layer, x), layer.mlp_norm)
        return x if self._weights.final_norm is None else self._norm(x, self._weights.final_norm)

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        attention: Attention,
    ) -> Tensor:
        spec = self.spec
        heads = layer.qkv(x, pool=self._pool)
        heads = heads.view(len(x), spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        q = heads[:, : spec.num_heads]
        k = heads[:, spec.num_heads : spec.num_heads + spec.num_kv_heads]
        v = heads[:, spec.num_heads + spec.num_kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._rms_norm(q, layer.q_norm), self._rms_norm(k, layer.k_norm)
        if rotation is not None:
            rotary_(q, k, *rotation, pool=self._pool)
        attention.store(index, k, v)
        out = attention.attend(index, q, sliding_window=spec.sliding_windows[index])
        return layer.out(out.view(len(x), -1), pool=self._pool)

    def _look_ahead(
        self, index: int, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None, attention: Attention
    ) -> None:
        """Foretell the queries of layer `index` from the residual stream that enters the one before it."""
        spec = self.spec
        if not index < len(self._ahead_q):
            return
        rows = attention.ahead_rows
        if rows is None or spec.sliding_windows[index]:
            return
        layer, x = self._weights.layers[index], hidden[rows]
        if spec.pre_norm:
            x = self._norm(x, layer.attention_norm)
        q = self._ahead_q[index](x, pool=self._pool).view(len(rows), spec.num_heads, spec.head_dim)
        if layer.q_norm is not None:
            q = self._rms_norm(q, layer.q_norm)
        if rotation is not None:
            cos, sin = rotation
            rotary_(q, q[:, :0], cos[rows], sin[rows], pool=self._pool)
        attention.ahead(index, q)

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        up = layer.up(x, pool=self._pool)
        if not self.spec.gated_mlp:
            up = self._activation(up)
        elif self.spec.activation == "silu":
            up = silu_and_mul(up, pool=self._pool)
        else:
            gate, up = up.chunk(2, dim=-1)
            up = self._activation(gate) * up
        return layer.down(up, pool=self._pool)

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        if self.spec.rms_norm:
            assert norm.weight is not None
            return self._rms_norm(x, norm.weight)
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, self.spec.norm_eps)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.spec.norm_eps, pool=self._pool)

    def _add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> Tensor:
        """Add x to `residual` in place and return the norm of the sum."""
        if self.spec.rms_norm:
            assert norm.weight is not None
            return fused_add_rms_norm(x, residual, norm.weight, self.spec.norm_eps, pool=self._pool)
        residual += x
        return self._norm(residual, norm)


def _fused_layers(spec: ModelSpec, weights: Weights) -> tuple[Layer, ...]:
    """All of the layers, if each is of the kind that `kernels/layer.py` runs; otherwise none."""
    if not (spec.rms_norm and spec.gated_mlp and spec.activation == "silu"):
        return ()
    fused = []
    for layer in weights.layers:
        attention_norm, mlp_norm = layer.attention_norm.weight, layer.mlp_norm.weight
        linears = layer.qkv, layer.out, layer.up, layer.down
        if attention_norm is None or mlp_norm is None or any(linear.streamed is None for linear in linears):
            return ()
        fused.append(
            Layer(
                attention_norm=attention_norm,
                qkv=layer.qkv,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                out=layer.out,
                mlp_norm=mlp_norm,
                up=layer.up,
                down=layer.down,
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                eps=spec.norm_eps,
            )
        )
    return tuple(fused)
