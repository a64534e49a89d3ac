"""Layers that run as two calls each give what their operations give one by one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybridgen.engine.batch import BatchBuilder
from hybridgen.engine.build import load_config
from hybridgen.engine.host_memory import HostMemory
from hybridgen.engine.kv_store import KVStore, kv_layout
from hybridgen.engine.model import Decoder
from hybridgen.engine.model_spec import spec_from_config
from hybridgen.engine.weights import load_weights
from hybridgen.kernels.linear import FEW_ROWS, streams
from hybridgen.kernels.policies.exact import ExactPolicy
from hybridgen.kernels.pool import AttentionPool
from hybridgen.scheduler.step import Step, StepSequence
from tests.models import CONFIGS, save_model

CPU = torch.device("cpu")
FUSED = sorted(name for name in CONFIGS if not name.startswith("opt"))


@pytest.mark.parametrize("num_tokens", [1, 5, FEW_ROWS - 1, FEW_ROWS], ids=lambda num: f"tokens={num}")
@pytest.mark.parametrize("name", FUSED)
def test_hidden_states_are_the_same_bits_without_fusing(name: str, num_tokens: int, tmp_path: Path) -> None:
    save_model(name, tmp_path)
    spec = spec_from_config(load_config(tmp_path))
    pool = AttentionPool(num_threads=2)
    if not streams(pool, 1):
        pytest.skip("this machine's products are torch's")
    weights = load_weights(tmp_path, spec, dtype=torch.bfloat16, device=CPU)
    decoder = Decoder(spec, weights, max_model_len=128, pool=pool)
    assert len(decoder._fused) == spec.num_layers
    layout = kv_layout(spec, 16, torch.bfloat16)
    tokens = [7 * index % spec.vocab_size for index in range(num_tokens)]
    table = tuple(range(-(-num_tokens // 16)))

    def hidden() -> Tensor:
        store = KVStore(
            spec,
            layout,
            num_device_pages=0,
            host=HostMemory.on_one_node(layout, 8),
            pool=pool,
            policy=ExactPolicy(),
        )
        step = Step((StepSequence(0, 0, num_tokens, table, 0, samples=True),))
        batch = BatchBuilder(CPU).build(step, {0: tokens}, {0: num_tokens})
        rows = torch.tensor([num_tokens - 1])
        return decoder.forward(batch.tokens, batch.positions, batch.prompt_lens, store.attention(batch), rows)

    fused = hidden()
    decoder._fused = ()
    assert torch.equal(fused, hidden())
