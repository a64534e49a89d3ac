"""From logits to the next token of every sequence in the batch, without a loop over the sequences.

The order is vLLM's: log-probabilities are read from the logits as they came; then the minimum length, the
bias and the penalties change them; then temperature, min_p, top_k and top_p narrow the distribution; then one
uniform number per sequence picks from what is left. That number depends on the sequence's seed and on how
many tokens it has generated, and on nothing else: neither the rest of the batch nor a preemption changes a
token.

Logits of equal value are ranked by token id, lowest first, everywhere in this file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridgen.engine.request import SamplingParams, TokenLogprob

# Below this a temperature is treated as 0, as in vLLM: dividing by it gains nothing and can overflow.
_MIN_TEMPERATURE = 1e-5

# Passes over the vocabulary reduce blocks of this many tokens, so that a search touches one block, not all.
_BLOCK = 128

# How many of the largest weights are looked at before a row's whole vocabulary is sorted.
_NARROW = 128
_WIDE = 1024

# Rows that `prompt_logprobs` works on at a time, so that its memory does not grow with the prompt.
_PROMPT_ROWS = 64

_ROW = np.dtype(
    [
        ("temperature", np.float32),  # 0: greedy
        ("top_p", np.float64),
        ("top_k", np.int64),  # 0: off
        ("min_p", np.float32),
        ("seed", np.uint64),
        ("num_generated", np.int64),
        ("min_tokens", np.int64),
        ("num_logprobs", np.int64),  # -1: none asked for
        ("penalty_slot", np.int64),  # -1: no penalty
    ]
)

_Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One step's tokens, in the order of the keys."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None]  # None where none was asked for
    invalid: tuple[int, ...]  # places in the batch without a token: NaN, +inf, or nothing left to choose


class Sampler:
    """Holds a row of parameters and counts per sequence; each `sample` gathers the rows of its batch.

    Args:
        eos_token_ids: what `min_tokens` keeps from being sampled, `ignore_eos` or not (as vLLM has it).
    """

    def __init__(self, vocab_size: int, *, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._device = device
        self._row_of: dict[int, int] = {}
        self._free: list[int] = []
        self._rows = np.zeros(0, dtype=_ROW)
        self._bias = _SparseLogits(device)
        self._min_tokens_mask = _SparseLogits(device)
        self._penalties = _Penalties(vocab_size, device)

    def add(
        self,
        key: int,
        params: SamplingParams,
        prompt: Sequence[int],
        seed: int,
        generated: Sequence[int] = (),
    ) -> None:
        """Give the sequence a row. `params` have passed `check_sampling_params`.

        Args:
            seed: any integer; `params.seed` is not read, since each of a request's `n` choices needs its own.
            generated: tokens sampled before, when a sequence comes back after `remove`.
        """
        assert key not in self._row_of, f"sequence {key} added twice"
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._row_of[key] = row
        # top_k = 1 leaves only the token that greedy would take.
        greedy = params.temperature < _MIN_TEMPERATURE or params.top_k == 1
        penalised = (
            params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1
        )
        state = self._rows[row]
        state["temperature"] = 0.0 if greedy else params.temperature
        state["top_p"] = params.top_p
        state["top_k"] = max(params.top_k, 0)
        state["min_p"] = params.min_p
        state["seed"] = seed % (1 << 64)
        state["num_generated"] = len(generated)
        state["min_tokens"] = params.min_tokens
        state["num_logprobs"] = -1 if params.logprobs is None else self._num_top(params.logprobs)
        state["penalty_slot"] = self._penalties.add(params, prompt, generated) if penalised else -1
        if params.logit_bias:
            self._bias.set(row, list(params.logit_bias), list(params.logit_bias.values()))
        if params.min_tokens > 0:
            masked = [*self._eos_token_ids, *params.stop_token_ids]
            self._min_tokens_mask.set(row, masked, [-np.inf] * len(masked))

    def remove(self, key: int) -> None:
        row = self._row_of.pop(key)
        self._bias.clear(row)
        self._min_tokens_mask.clear(row)
        slot = int(self._rows[row]["penalty_slot"])
        if slot >= 0:
            self._penalties.remove(slot)
        self._free.append(row)

    def sample(self, logits: Tensor, keys: Sequence[int]) -> Sampled:
        """Choose one token for each key and count it as generated.

        Args:
            logits: [len(keys), vocab], float32 or bfloat16; not written to.
            keys: each added before, none twice.

        Returns:
            For a place in `invalid`, token 0 and no log-probability; its row does not advance.
        """
        assert logits.shape == (len(keys), self._vocab_size), (
            f"logits {tuple(logits.shape)}, {len(keys)} keys"
        )
        if not keys:
            return Sampled([], [], ())
        rows = np.fromiter((self._row_of[key] for key in keys), np.int64, len(keys))
        state = self._rows[rows]
        scores = self._adjust(logits, rows, state)

        is_greedy = state["temperature"] == 0
        if is_greedy.all():
            tokens, valid = _greedy(scores)
        elif not is_greedy.any():
            tokens, valid = _draw(scores, state)
        else:
            tokens = torch.empty(len(keys), dtype=torch.int64, device=scores.device)
            valid = torch.empty(len(keys), dtype=torch.bool, device=scores.device)
            greedy, drawn = (self._upload(np.flatnonzero(mask)) for mask in (is_greedy, ~is_greedy))
            tokens[greedy], valid[greedy] = _greedy(scores[greedy])
            tokens[drawn], valid[drawn] = _draw(scores[drawn], state[~is_greedy])

        is_valid = valid.cpu().numpy()
        self._rows["num_generated"][rows[is_valid]] += 1
        counted = np.flatnonzero(is_valid & (state["penalty_slot"] >= 0))
        if counted.size:
            self._penalties.count(self._upload(state["penalty_slot"][counted]), tokens[self._upload(counted)])
        return Sampled(
            tokens.tolist(),
            self._logprobs(logits, tokens, np.where(is_valid, state["num_logprobs"], -1)),
            tuple(np.flatnonzero(~is_valid).tolist()),
        )

    def prompt_logprobs(self, logits: Tensor, next_tokens: Sequence[int], num_top: int) -> list[TokenLogprob]:
        """How likely each prompt token was after those before it.

        Args:
            logits: [tokens, vocab], float32 or bfloat16: row i is what the model expects to follow token i.
            next_tokens: the token that did follow, for each row.
            num_top: alternatives per position; -1 for the whole vocabulary.
        """
        assert logits.shape == (len(next_tokens), self._vocab_size)
        num_top = self._num_top(num_top)
        entries: list[TokenLogprob] = []
        for begin in range(0, len(next_tokens), _PROMPT_ROWS):
            part = next_tokens[begin : begin + _PROMPT_ROWS]
            tokens = torch.tensor(part, dtype=torch.int64, device=logits.device)
            entries += _token_logprobs(logits[begin : begin + len(part)], tokens, [num_top] * len(part))
        return entries

    def _num_top(self, num_logprobs: int) -> int:
        return self._vocab_size if num_logprobs == -1 else min(num_logprobs, self._vocab_size)

    def _grow(self) -> None:
        size = len(self._rows)
        more = max(size, 16)
        self._rows = np.concatenate([self._rows, np.zeros(more, dtype=_ROW)])
        self._free.extend(range(size + more - 1, size - 1, -1))

    def _upload(self, values: npt.NDArray[Any]) -> Tensor:
        # A field of a structured array has strides that torch refuses, even where it is one element.
        return torch.from_numpy(values.copy()).to(self._device)

    def _adjust(self, logits: Tensor, rows: _Int64, state: npt.NDArray[Any]) -> Tensor:
        """Float32 scores after minimum length, bias and penalties; the argument if nothing is to do."""
        scores = logits.float()
        too_short = state["num_generated"] < state["min_tokens"]
        penalised = np.flatnonzero(state["penalty_slot"] >= 0)
        if not (too_short.any() or penalised.size or self._bias):
            return scores
        if scores is logits:
            scores = logits.clone()
        place = np.full(len(self._rows), -1)
        if too_short.any():
            place[rows[too_short]] = np.flatnonzero(too_short)
            self._min_tokens_mask.add_to(scores, place)
        if self._bias:
            place[rows] = np.arange(len(rows))
            self._bias.add_to(scores, place)
        if penalised.size:
            at = self._upload(penalised)
            slots = self._upload(state["penalty_slot"][penalised])
            scores[at] = self._penalties.apply(scores[at], slots)
        return scores

    def _logprobs(self, logits: Tensor, tokens: Tensor, num_top: _Int64) -> list[TokenLogprob | None]:
        answer: list[TokenLogprob | None] = [None] * len(num_top)
        asked = np.flatnonzero(num_top >= 0)
        if asked.size:
            at = self._upload(asked)
            entries = _token_logprobs(logits[at], tokens[at], num_top[asked].tolist())
            for place, entry in zip(asked.tolist(), entries, strict=True):
                answer[place] = entry
        return answer


class _SparseLogits:
    """Additions to a few logits of a few rows, applied to a whole batch with one scatter."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._entries: dict[int, tuple[list[int], list[float]]] = {}
        self._row: _Int64 | None = None  # of each entry; None: must be rebuilt from `_entries`
        self._token = np.zeros(0, np.int64)
        self._value = np.zeros(0, np.float32)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def set(self, row: int, tokens: list[int], values: list[float]) -> None:
        self._entries[row] = (tokens, values)
        self._row = None

    def clear(self, row: int) -> None:
        if self._entries.pop(row, None) is not None:
            self._row = None

    def add_to(self, logits: Tensor, place: _Int64) -> None:
        """In place. `place`: [rows], where in the batch each row of state is; -1 leaves it out."""
        if self._row is None:
            self._row = np.array([row for row, entry in self._entries.items() for _ in entry[0]], np.int64)
            self._token = np.array(
                [token for tokens, _ in self._entries.values() for token in tokens], np.int64
            )
            self._value = np.array(
                [value for _, values in self._entries.values() for value in values], np.float32
            )
        at = place[self._row]
        chosen = at >= 0
        index = torch.from_numpy(np.stack([at[chosen], self._token[chosen]])).to(self._device)
        value = torch.from_numpy(self._value[chosen]).to(self._device)
        logits.index_put_((index[0], index[1]), value, accumulate=True)


class _Penalties:
    """What the penalties make of each token's logit; a slot only for sequences that have some.

    Repetition (CTRL, arXiv 1909.05858; negative logits are multiplied, as everybody does since) covers prompt
    and generated tokens; presence and frequency, as OpenAI defines them, generated tokens alone.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        # [slots, vocab], float32: what divides a positive logit and multiplies a negative one, and what is then
        # taken off. Kept up to date token by token, so that a step is a few passes over contiguous memory.
        self._factor = torch.zeros(0, vocab_size, device=device)
        self._offset = torch.zeros(0, vocab_size, device=device)
        self._is_generated = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._strength = torch.zeros(0, 3, device=device)  # [slots, (repetition, presence, frequency)]
        self._free: list[int] = []

    def add(self, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> int:
        if not self._free:
            self._grow()
        slot = self._free.pop()
        device = self._factor.device
        strength = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self._strength[slot] = torch.tensor(strength, device=device)
        self._factor[slot] = 1
        self._factor[slot, torch.tensor([*prompt, *generated], dtype=torch.int64, device=device)] = strength[
            0
        ]
        counts = torch.tensor(np.bincount(np.array(generated, np.int64), minlength=self._factor.shape[1]))
        counts = counts.to(device)
        self._is_generated[slot] = counts > 0
        self._offset[slot] = strength[1] * (counts > 0) + strength[2] * counts
        return slot

    def remove(self, slot: int) -> None:
        self._free.append(slot)

    def count(self, slots: Tensor, tokens: Tensor) -> None:
        """slots, tokens: [sequences]; no slot twice."""
        repetition, presence, frequency = self._strength[slots].unbind(-1)
        self._factor[slots, tokens] = repetition
        self._offset[slots, tokens] += frequency + presence * ~self._is_generated[slots, tokens]
        self._is_generated[slots, tokens] = True

    def apply(self, logits: Tensor, slots: Tensor) -> Tensor:
        """logits: [sequences, vocab], float32; slots: [sequences]. The penalised logits, in new memory."""
        factor = self._factor[slots]
        positive = logits.clamp(min=0).div_(factor)
        return logits.clamp(max=0).mul_(factor).add_(positive).sub_(self._offset[slots])

    def _grow(self) -> None:
        size = len(self._factor)
        more = max(size, 4)
        self._factor = torch.cat([self._factor, self._factor.new_zeros(more, self._factor.shape[1])])
        self._offset = torch.cat([self._offset, torch.zeros_like(self._factor[:more])])
        self._is_generated = torch.cat(
            [self._is_generated, torch.zeros_like(self._factor[:more], dtype=torch.bool)]
        )
        self._strength = torch.cat([self._strength, self._strength.new_zeros(more, 3)])
        self._free.extend(range(size + more - 1, size - 1, -1))


def _greedy(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and whether each is one: [rows], int64 and bool. A NaN anywhere in a row makes it invalid."""
    if scores.is_cuda:
        tokens = scores.argmax(-1)
    else:
        # On a CPU torch's argmax takes one element at a time, its amax does not: find the block, look inside.
        block = _reduce_blocks(scores, torch.amax).argmax(-1)
        index, inside = _block_index(block, scores.shape[-1])
        values = scores.gather(1, index).masked_fill_(~inside, -torch.inf)
        # Both argmax take the first of equals, and a NaN before everything.
        tokens = index.gather(1, values.argmax(-1, keepdim=True)).squeeze(1)
    valid = scores.gather(1, tokens[:, None]).squeeze(1).isfinite()
    return tokens.masked_fill_(~valid, 0), valid


def _draw(scores: Tensor, state: npt.NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Tokens by temperature, min_p, top_k and top_p, and whether each is one: [rows], int64 and bool."""
    device = scores.device
    largest = scores.amax(-1, keepdim=True)
    valid = largest.isfinite().squeeze(1)
    if not bool(valid.all()):
        scores = scores.masked_fill(~valid[:, None], 0)
        largest = scores.amax(-1, keepdim=True)
    temperature = torch.from_numpy(state["temperature"].copy()).to(device)
    # The difference first: score / temperature may overflow, difference / temperature only falls to -inf.
    # The largest weight is 1. torch.softmax would wake all threads even for a batch of one.
    weights = (scores - largest).div_(temperature[:, None]).exp_()
    if (state["min_p"] > 0).any():
        min_p = torch.from_numpy(state["min_p"].copy()).to(device)
        weights.mul_(weights >= min_p[:, None])

    top_k = np.where(state["top_k"] == 0, weights.shape[-1], np.minimum(state["top_k"], weights.shape[-1]))
    if ((top_k < weights.shape[-1]) | (state["top_p"] < 1)).any():
        _keep_top(weights, top_k, state["top_p"])
    uniform = torch.from_numpy(_uniform(state["seed"], state["num_generated"])).to(device)
    return _invert_cdf(weights, uniform).masked_fill_(~valid, 0), valid


def _uniform(seed: npt.NDArray[np.uint64], counter: _Int64) -> npt.NDArray[np.float64]:
    """In [0, 1), 53 bits, from seed and counter alone: SplitMix64 (Steele et al., 2014), mixed twice."""

    def mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    # Seeds are mixed before the counter is added, so that seeds 1 and 2 do not share a stream shifted by one.
    bits = mix(mix(seed + golden) + golden * (counter.astype(np.uint64) + np.uint64(1)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _keep_top(weights: Tensor, top_k: _Int64, top_p: npt.NDArray[np.float64]) -> None:
    """Set to 0, in place, all but each row's `top_k` largest weights, and of those all but top_p of the mass.

    A weight stays while the mass before it (largest first, then lowest id) is below top_p of the mass of the
    k. Looks at the `_NARROW` or `_WIDE` largest weights first and sorts a whole row only where that is not
    enough.
    """
    vocab_size = weights.shape[-1]
    device = weights.device
    total = _reduce_blocks(weights, torch.sum).double().sum(-1)
    k = torch.from_numpy(top_k).to(device)
    # From 1 on top_p is off, whatever rounding makes of the mass.
    p = torch.from_numpy(np.where(top_p < 1, top_p, np.inf)).to(device)
    filtered = (top_k < vocab_size) | (top_p < 1)

    threshold = weights.new_zeros(len(weights))  # the smallest weight that stays
    num_tied = torch.zeros_like(k)  # how many weights equal to the threshold stay
    has_excess = torch.zeros_like(k, dtype=torch.bool)  # whether there are more of them

    # The `width` largest settle a row when the last of them falls: no more than width - 1 may be asked for.
    limit = np.where(top_k < vocab_size, top_k, 0)
    begin = 0
    pending = np.flatnonzero(filtered)
    for width in (_NARROW, _WIDE, vocab_size):
        width = min(width, vocab_size)
        mine = (
            pending[(limit[pending] >= begin) & (limit[pending] < width)] if width < vocab_size else pending
        )
        begin = width
        if not mine.size:
            continue
        at = torch.from_numpy(mine).to(device)
        ranked = _largest(weights[at] if len(mine) < len(weights) else weights, width)
        sums = ranked.double().cumsum(-1)
        k_at = k[at, None]
        mass = torch.where(
            k_at < vocab_size, sums.gather(1, (k_at - 1).clamp(max=width - 1)), total[at, None]
        )
        stays = (
            (sums - ranked < p[at, None] * mass) & (torch.arange(width, device=device) < k_at) & (ranked > 0)
        )
        count = stays.sum(-1, keepdim=True)
        smallest = ranked.gather(1, count - 1)
        following = ranked.gather(1, count.clamp(max=width - 1))
        threshold[at] = smallest.squeeze(1)
        num_tied[at] = (stays & (ranked == smallest)).sum(-1)
        has_excess[at] = ((count < width) & (following == smallest)).squeeze(1)
        settled = (count < width).squeeze(1).cpu().numpy()
        pending = np.setdiff1d(pending, mine[settled], assume_unique=True)
    assert weights.shape[-1] == begin

    weights.mul_(weights >= threshold[:, None])
    excess = has_excess.nonzero().squeeze(1)
    if len(excess):
        part = weights[excess]
        tied = part == threshold[excess, None]
        weights[excess] = part.masked_fill_(tied & (tied.cumsum(-1) > num_tied[excess, None]), 0)


def _largest(values: Tensor, count: int) -> Tensor:
    """The `count` largest of each row, largest first: [rows, count]. `values` are not negative."""
    width = values.shape[-1]
    if count == width:
        if values.is_cuda:
            return values.sort(-1, descending=True).values
        # numpy sorts values alone; torch also permutes their indices, at four times the cost.
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)).flip(-1)
    # The largest `count` lie in the `count` blocks with the largest maxima (or equal what lies there).
    block = 32
    num_blocks = width // block
    if num_blocks < 2 * count:
        return values.topk(count, -1).values
    blocks = values[:, : num_blocks * block].view(-1, num_blocks, block)
    chosen = blocks.amax(-1).topk(count, -1, sorted=False).indices
    candidates = blocks.gather(1, chosen[:, :, None].expand(-1, -1, block)).flatten(1)
    return torch.cat([candidates, values[:, num_blocks * block :]], -1).topk(count, -1).values


def _invert_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first token at which the running sum, in order of ids, exceeds uniform * the whole sum.

    Args:
        weights: [rows, vocab], float32, not negative, not all 0.
        uniform: [rows], float64, in [0, 1).

    Returns:
        [rows], int64; never a token of weight 0.
    """
    sums = _reduce_blocks(weights, torch.sum).double().cumsum(-1)
    target = uniform[:, None] * sums[:, -1:]
    block = _first_above(sums, target)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    index, inside = _block_index(block.squeeze(1), weights.shape[-1])
    inner = (weights.gather(1, index) * inside).double().cumsum(-1)
    return index.gather(1, _first_above(inner, target - before)).squeeze(1)


def _first_above(sums: Tensor, target: Tensor) -> Tensor:
    """Index of the first sum above the target, [rows, 1]; past the end, that of the last weight > 0."""
    last = (sums < sums[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum((sums <= target).sum(-1, keepdim=True), last)


def _reduce_blocks(values: Tensor, reduce: Any) -> Tensor:
    """Reduce each block of `_BLOCK` columns, also the shorter last one: [rows, ceil(columns / _BLOCK)]."""
    num_whole = values.shape[-1] // _BLOCK
    parts = []
    if num_whole:
        parts.append(reduce(values[:, : num_whole * _BLOCK].view(-1, num_whole, _BLOCK), -1))
    if num_whole * _BLOCK < values.shape[-1]:
        parts.append(reduce(values[:, num_whole * _BLOCK :], -1, keepdim=True))
    return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


def _block_index(block: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Columns of one block per row, and which of them exist: [rows, _BLOCK]. The others repeat the last."""
    index = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=block.device)
    return index.clamp(max=num_columns - 1), index < num_columns


def _token_logprobs(logits: Tensor, tokens: Tensor, num_top: list[int]) -> list[TokenLogprob]:
    """logits: [rows, vocab]; tokens: [rows], int64; num_top: alternatives for each row."""
    logits = logits.float()
    largest = logits.amax(-1, keepdim=True)
    log_sum = (logits - largest).exp_().sum(-1, keepdim=True).log_()
    # Ranked by logit, since rounding may give two tokens one log-probability.
    chosen = logits.gather(1, tokens[:, None])
    ranks = (logits > chosen).sum(-1, keepdim=True) + 1
    equal = logits == chosen
    if int(equal.sum()) > len(logits):
        equal &= torch.arange(logits.shape[-1], device=logits.device) < tokens[:, None]
        ranks += equal.sum(-1, keepdim=True)
    ids = _ranked_ids(logits, max(num_top))
    logprobs = torch.cat([chosen, logits.gather(1, ids)], -1) - largest - log_sum
    return [
        TokenLogprob(token, logprob, rank, tuple(zip(top_ids[:count], top_values, strict=False)))
        for token, (logprob, *top_values), (rank,), top_ids, count in zip(
            tokens.tolist(), logprobs.tolist(), ranks.tolist(), ids.tolist(), num_top, strict=True
        )
    ]


def _ranked_ids(values: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest, largest first, lowest id first among equals: [rows, count], int64."""
    if count == 0:
        return torch.zeros(len(values), 0, dtype=torch.int64, device=values.device)
    values = values + 0.0  # turns -0.0 into 0.0, which is its equal
    # By id first, since topk gives equals in any order; a stable sort by value then keeps that order.
    ids = values.topk(count, -1).indices.sort(-1).values
    ranked = values.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, ranked.indices)
    # Nor does it say which of equals it leaves out. Rows where that matters are done again, with ids in the keys.
    ambiguous = ((values >= ranked.values[:, -1:]).sum(-1) > count).nonzero().squeeze(1)
    if len(ambiguous):
        ids[ambiguous] = _top_keys(values[ambiguous], count)
    return ids


def _top_keys(values: Tensor, count: int) -> Tensor:
    """As `_ranked_ids`, at several times its cost, for rows with equal values. No -0.0."""
    num_columns = values.shape[-1]
    # As integers, the bits of float32 order like the numbers once those of negative numbers are flipped; an id
    # below them makes every key different.
    bits = values.view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    keys += torch.arange(num_columns - 1, -1, -1, device=values.device)
    return num_columns - 1 - (keys.topk(count, -1).values & 0xFFFFFFFF)
