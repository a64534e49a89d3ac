"""The decoder's word on a layer's queries, given while the layer before it is still to be attended."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridgen.engine.batch import BatchBuilder
from hybridgen.engine.build import load_config
from hybridgen.engine.host_memory import HostMemory
from hybridgen.engine.kv_store import KVStore, kv_layout
from hybridgen.engine.model import Attention, Decoder
from hybridgen.engine.model_spec import spec_from_config
from hybridgen.engine.weights import load_weights
from hybridgen.kernels.linear import Linear
from hybridgen.kernels.policies.exact import ExactPolicy
from hybridgen.kernels.pool import AttentionPool
from hybridgen.scheduler.step import Step, StepSequence
from tests.models import CONFIGS, save_model

CPU = torch.device("cpu")
TOKENS = list(range(3, 40))


class Listener:
    """Passes everything on, and keeps what it was told of a layer's queries and what they were."""

    def __init__(self, inner: Attention, rows: Tensor | None) -> None:
        self.inner = inner
        self.ahead_rows = rows
        self.foretold: dict[int, Tensor] = {}
        self.asked: dict[int, Tensor] = {}
        self.events: list[tuple[str, int]] = []

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.inner.store(layer, k, v)

    def ahead(self, layer: int, q: Tensor) -> None:
        self.events.append(("ahead", layer))
        self.foretold[layer] = q

    def attend(self, layer: int, q: Tensor, *, sliding_window: int = 0) -> Tensor:
        self.events.append(("attend", layer))
        self.asked[layer] = q.clone()
        return self.inner.attend(layer, q, sliding_window=sliding_window)


def run(folder: Path, rows: Tensor | None, *, layer_ahead: bool = True) -> tuple[Listener, Tensor]:
    """One pass over TOKENS; the listener, and the last hidden states."""
    spec = spec_from_config(load_config(folder))
    pool = AttentionPool(num_threads=1)
    weights = load_weights(folder, spec, dtype=torch.float32, device=CPU)
    decoder = Decoder(spec, weights, max_model_len=64, pool=pool, layer_ahead=layer_ahead)
    layout = kv_layout(spec, 16, torch.float32)
    store = KVStore(
        spec,
        layout,
        num_device_pages=0,
        host=HostMemory.on_one_node(layout, 4),
        pool=pool,
        policy=ExactPolicy(),
    )
    table = (0, 1, 2)
    part = StepSequence(0, 0, len(TOKENS), table, 0, samples=True)
    batch = BatchBuilder(CPU).build(Step((part,)), {0: TOKENS}, {0: len(TOKENS)})
    listener = Listener(store.attention(batch), rows)
    everything = torch.arange(len(TOKENS))
    hidden = decoder.forward(batch.tokens, batch.positions, batch.prompt_lens, listener, everything)
    return listener, hidden


def silence_first_layer(folder: Path) -> None:
    """Let layer 0 add nothing to the residual stream, so that layer 1 sees what layer 0 saw."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in list(tensors):
        if "layers.0." in name and any(part in name for part in ("o_proj", "out_proj", "down_proj", "fc2")):
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(params=["llama", "llama-mha-biases", "llama-rope-dynamic", "qwen2", "qwen3", "opt"])
def silent(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_model(request.param, tmp_path)
    silence_first_layer(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "rows", [[0], [36], [1, 5, 36], list(range(37))], ids=lambda rows: f"rows={len(rows)}"
)
def test_queries_are_foretold_exactly_where_a_layer_adds_nothing(silent: Path, rows: list[int]) -> None:
    listener, _ = run(silent, torch.tensor(rows))
    assert listener.events == [("ahead", 1), ("attend", 0), ("attend", 1)]
    torch.testing.assert_close(listener.foretold[1], listener.asked[1][rows], rtol=1e-5, atol=1e-5)


WINDOWED = ("mistral-window", "qwen2-window-in-upper-layers")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_foretelling_changes_no_hidden_state(name: str, tmp_path: Path) -> None:
    save_model(name, tmp_path)
    listener, hidden = run(tmp_path, torch.tensor([36]))
    if name in WINDOWED:
        assert not listener.foretold  # layers with a sliding window are attended in full
    else:
        assert listener.foretold[1].shape == (1, *listener.asked[1].shape[1:])
    assert torch.equal(hidden, run(tmp_path, None)[1])


@pytest.mark.parametrize(
    "options", [{"rows": None}, {"rows": torch.tensor([1]), "layer_ahead": False}], ids=str
)
def test_nothing_is_foretold_unless_both_sides_want_it(options: dict[str, Any], tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    listener, _ = run(tmp_path, **options)
    assert listener.events == [("attend", 0), ("attend", 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs", [1, 16, 48])
def test_the_first_rows_of_a_linear_give_the_first_of_its_outputs(dtype: torch.dtype, outputs: int) -> None:
    torch.manual_seed(0)
    linear = Linear(torch.randn(48, 32, dtype=dtype), torch.randn(48, dtype=dtype))
    x = torch.randn(3, 32, dtype=dtype)
    torch.testing.assert_close(linear.first(outputs)(x), linear(x)[:, :outputs], rtol=1e-2, atol=1e-2)
