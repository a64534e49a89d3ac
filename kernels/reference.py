"""Every kernel in plain PyTorch, in any float dtype: the specification that the fast ones must match."""

from collections.abc import Sequence

import torch
from torch import Tensor


def store(
    layer: int,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    query_begin: Sequence[int],
    kv_len: Sequence[int],
    block_table: Sequence[Sequence[int]],
    first_page: int = 0,
) -> None:
    """What `AttentionStep.store` does: this step's k, v [tokens, num_kv_heads, head_dim] to their slots."""
    num_pages, page_size = k_pages.shape[0], k_pages.shape[3]
    for seq, end in enumerate(kv_len):
        begin, after = query_begin[seq], query_begin[seq + 1]
        for row in range(begin, after):
            position = end - after + row
            if position < 0:
                continue
            page = block_table[seq][position // page_size] - first_page
            if 0 <= page < num_pages:
                k_pages[page, layer, :, position % page_size] = k[row]
                v_pages[page, layer, :, position % page_size] = v[row]


def attend(
    layer: int,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    query_begin: Sequence[int],
    kv_len: Sequence[int],
    block_table: Sequence[Sequence[int]],
    scale: float,
    first_page: int = 0,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """What `AttentionStep.attend` does, computed in `dtype`.

    Args:
        q: [tokens, num_heads, head_dim]

    Returns:
        out [tokens, num_heads, head_dim] and lse [tokens, num_heads], natural log, in `dtype`.
    """
    num_heads = q.shape[1]
    out = torch.zeros(q.shape, dtype=dtype)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=dtype)
    num_pages, page_size = k_pages.shape[0], k_pages.shape[3]
    for seq, num_keys in enumerate(kv_len):
        begin, end = query_begin[seq], query_begin[seq + 1]
        if begin == end or num_keys == 0 or num_pages == 0:
            continue
        pages = torch.tensor(block_table[seq][: -(-num_keys // page_size)]) - first_page
        here = ((pages >= 0) & (pages < num_pages)).repeat_interleave(page_size)[:num_keys]
        pages = torch.where((pages >= 0) & (pages < num_pages), pages, 0)
        # [keys, num_heads, head_dim]: each KV head serves a group of consecutive query heads
        group = num_heads // k_pages.shape[2]
        k, v = (
            half[pages, layer].transpose(1, 2).flatten(0, 1)[:num_keys].to(dtype)
            for half in (k_pages, v_pages)
        )
        k, v = (half.masked_fill(~here[:, None, None], 0).repeat_interleave(group, dim=1) for half in (k, v))

        logits = torch.einsum("qhd,khd->hqk", q[begin:end].to(dtype), k) * scale
        if soft_cap:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        query_position = torch.arange(num_keys - (end - begin), num_keys)[:, None]
        key_position = torch.arange(num_keys)[None, :]
        visible = (key_position <= query_position) & here
        if sliding_window:
            visible &= key_position > query_position - sliding_window
        logits = logits.masked_fill(~visible, -torch.inf)

        row_lse = torch.logsumexp(logits, dim=-1)  # [heads, queries]; -inf where nothing is visible
        weights = torch.exp(logits - torch.where(row_lse.isinf(), 0.0, row_lse)[..., None])
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v)
        lse[begin:end] = row_lse.T
    return out, lse


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine two partial attentions over disjoint sets of keys into one, exactly.

    Args:
        out_a, out_b: [tokens, heads, head_dim]; each already divided by its own sum.
        lse_a, lse_b: [tokens, heads], natural log; -inf marks a half that saw no keys.

    Returns:
        out, lse of the union, same shapes. Both halves empty gives out = 0, lse = -inf, never NaN.
    """
    # Shift by the larger lse so the larger weight is exactly 1. With both halves empty the shift
    # would be -inf - -inf = NaN, so use 0 and let both weights become exp(-inf) = 0.
    shift = torch.maximum(lse_a, lse_b)
    shift = torch.where(shift.isinf(), 0.0, shift)
    weight_a, weight_b = torch.exp(lse_a - shift), torch.exp(lse_b - shift)
    total = weight_a + weight_b
    lse = shift + torch.log(total)
    divisor = torch.where(total == 0, 1.0, total)
    out = out_a * (weight_a / divisor)[..., None] + out_b * (weight_b / divisor)[..., None]
    return out, lse


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dim in float32, round to x's dtype, multiply by weight: as Hugging Face does."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x in place; the norm of the sum is returned."""
    residual += x
    return rms_norm(residual, weight, eps)


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the halves of the first 2 * cos.shape[1] dims of every head, in place.

    Args:
        q, k: [tokens, heads, head_dim]
        cos, sin: [tokens, n], float32
    """
    n = cos.shape[1]
    for heads in (q, k):
        a, b = heads[..., : 2 * n].to(torch.float32, copy=True).chunk(2, dim=-1)
        c, s = cos[:, None, :], sin[:, None, :]
        heads[..., :n] = (a * c - b * s).to(heads.dtype)
        heads[..., n : 2 * n] = (b * c + a * s).to(heads.dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """[tokens, 2n] -> [tokens, n]: silu of the first half times the second."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.float()).to(gate.dtype) * up


# ---- the int8 index of K ----


def quantize_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of keys, a scale to 32 dims (the last of which may be missing and count as 0).

    Args:
        k: [.., head_dim]

    Returns:
        codes int8 [.., chunks, 32] and scales float16 [.., chunks], so that codes * scales is nearly k. A scale of NaN
        stands for keys that are not finite or, at 8e6, too large for a float16 scale.
    """
    dims = -k.shape[-1] % 32
    chunks = torch.nn.functional.pad(k.float(), (0, dims)).reshape(*k.shape[:-1], -1, 32)
    largest = chunks.abs().amax(-1)
    scales = (largest * torch.tensor(1 / 127, dtype=torch.float32)).to(torch.float16)
    usable = largest.isfinite() & scales.isfinite()
    scales = torch.where(usable, scales, torch.nan)
    inverse = torch.where(usable & (scales > 0), torch.tensor(1.0) / scales.float(), 0.0)
    codes = torch.where(inverse[..., None] == 0, 0.0, chunks * inverse[..., None])
    return codes.clamp(-127, 127).round().to(torch.int8), scales


def unpack_index(index: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Codes and scales as `quantize_keys` gives them for a page: [.., page_size, chunks, 32], [.., page_size, chunks].

    Args:
        index: uint8 [.., page_size / 16, group_bytes]
    """
    chunks = -(-head_dim // 32)
    shape = index.shape[:-2]
    quads = index[..., : chunks * 512].reshape(*shape, -1, chunks * 8, 16, 4).transpose(-3, -2)
    codes = (quads.to(torch.int16) - 128).to(torch.int8).reshape(*shape, -1, chunks, 32)
    scales = index[..., chunks * 512 : chunks * 544].contiguous().view(torch.float16)
    return codes, scales.reshape(*shape, -1, chunks, 16).transpose(-2, -1).reshape(*shape, -1, chunks)


def estimate(q: Tensor, codes: Tensor, scales: Tensor, scale: float, soft_cap: float = 0.0) -> Tensor:
    """Logits [group, tokens] in float64 from quantised keys; q [group, head_dim] is quantised likewise.

    Args:
        codes, scales: [tokens, chunks, 32], [tokens, chunks]
    """
    chunks = torch.nn.functional.pad(q.float(), (0, -q.shape[-1] % 32)).reshape(len(q), -1, 32)
    largest = chunks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.tensor(127.0) / largest, 0.0)
    rounded = (chunks * inverse).round().double() * (largest / 127)
    logits = torch.einsum("gcd,tcd,tc->gt", rounded, codes.double(), scales.double()) * scale
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits


def select(estimates: Tensor, mass: float, num_sinks: int = 0, always_begin: int | None = None) -> Tensor:
    """The fewest tokens, ascending, whose softmax probabilities averaged over the group add up to `mass`.

    Args:
        estimates: [group, tokens]
        num_sinks, always_begin: tokens before and from here are taken in any case.
    """
    scores = torch.softmax(estimates.double(), dim=-1).mean(0)
    wanted = scores.clone()
    wanted[:num_sinks] = torch.inf
    if always_begin is not None:
        wanted[always_begin:] = torch.inf
    order = wanted.argsort(descending=True)
    before = scores[order].cumsum(0) - scores[order]
    return order[(before < mass) | wanted[order].isinf()].sort().values


def attend_top_k(
    q: Tensor, k: Tensor, v: Tensor, top_k: int, scale: float, soft_cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention of each query head to the `top_k` keys of its largest logits alone, the earlier of equal ones first.

    Args:
        q: [heads, head_dim]
        k, v: [tokens, kv_heads, head_dim]

    Returns:
        out [heads, head_dim] and lse [heads], natural log, in float64.
    """
    k, v = (half.double().repeat_interleave(len(q) // half.shape[1], dim=1) for half in (k, v))
    logits = torch.einsum("hd,thd->ht", q.double(), k) * scale
    tokens = logits.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    chosen = logits.gather(1, tokens)
    if soft_cap:
        chosen = soft_cap * torch.tanh(chosen / soft_cap)
    values = v.transpose(0, 1).gather(1, tokens[..., None].expand(-1, -1, v.shape[-1]))
    return torch.einsum("ht,htd->hd", torch.softmax(chosen, dim=-1), values), torch.logsumexp(chosen, dim=-1)
