import pytest
import torch
from transformers import LlamaConfig, OPTConfig, PreTrainedConfig

from hybridgen.engine import this_machine
from hybridgen.engine.kv_store import kv_layout
from hybridgen.engine.model_spec import spec_from_config
from hybridgen.engine.planning import CannotPlan, Planner, PlanRequest, find_shape
from hybridgen.engine.shape import shape_of
from hybridgen.engine.this_machine import measure_machine
from hybridgen.kernels.index import allocate_index
from hybridgen.scheduler.cost import ModelShape
from hybridgen.scheduler.machine import MemoryNode, Tier

CONFIGS = [
    LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24,
    ),
    OPTConfig(
        vocab_size=100, hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=64,
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: str(config.model_type))
@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_a_shape_counts_the_bytes_that_pages_take(config: PreTrainedConfig, page_size: int) -> None:
    spec = spec_from_config(config)
    layout = kv_layout(spec, page_size, torch.bfloat16)
    pages = shape_of(spec, "x").page_shape(page_size, with_index=True)
    assert pages.k_bytes + pages.v_bytes == layout.page_bytes
    assert pages.index_bytes + pages.v_sums_bytes == allocate_index(layout, 1).page_bytes


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_the_index_of_any_head_has_the_size_that_is_planned(head_dim: int) -> None:
    spec = spec_from_config(LlamaConfig(num_hidden_layers=2, num_attention_heads=2, head_dim=head_dim))
    pages = shape_of(spec, "x").page_shape(32, with_index=True)
    index = allocate_index(kv_layout(spec, 32, torch.bfloat16), 1)
    assert pages.index_bytes + pages.v_sums_bytes == index.page_bytes


def test_linear_parameters_are_all_but_embeddings_norms_and_biases() -> None:
    spec = spec_from_config(CONFIGS[0])
    shape = shape_of(spec, "x")
    norms = (2 * 3 + 1) * 64
    assert shape.parameters == shape.linear_parameters + shape.head_parameters + 100 * 64 + norms


def test_every_preset_has_a_shape() -> None:
    shape = find_shape("llama-3.1-8b")
    assert shape.token_bytes == 128 * 1024
    assert 8.0e9 < shape.parameters < 8.1e9


def test_an_unknown_model_lists_the_presets() -> None:
    with pytest.raises(CannotPlan, match=r"no model 'llama'.*llama-3.1-8b, opt-13b"):
        find_shape("llama")


def test_an_unknown_machine_lists_the_known_ones() -> None:
    with pytest.raises(CannotPlan, match=r"known are a100-40g.*`this`"):
        Planner("opt-6.7b", "h300")


def test_weights_that_do_not_fit_are_refused_with_the_numbers() -> None:
    request = PlanRequest("llama-3.1-70b", "rtx5090", (4096,))
    with pytest.raises(
        CannotPlan, match=r"weights of llama-3\.1-70b take 131\.4 GiB .* RTX 5090 has 28\.8 GiB"
    ):
        Planner("llama-3.1-70b", "rtx5090").plan(request)


def test_what_does_not_fit_is_said_beside_what_does() -> None:
    request = PlanRequest(
        "llama-3.1-8b", "rtx5090", (131072,), concurrency=1, systems=("exact", "device-only"), num_steps=4
    )
    exact, device_only = Planner(request.model, request.machine).plan(request).rows
    assert exact.tokens_per_s > 0
    assert "pages" in device_only.refused


def test_this_machine_is_measured_quickly_and_runs_what_needs_no_device() -> None:
    shape = ModelShape("x", 2, 256, 4, 2, 64, 10**6, 10**6, 10**5)
    machine, factors = measure_machine(shape, num_threads=1, num_bytes=1 << 22, turn_s=0.01)
    assert machine.device is None
    assert machine.nodes[0].read_bandwidth > 1e8
    assert machine.core_flops > 1e7
    assert factors.cores_matmul_flops > 1e8
    assert 0 <= factors.core_fixed_share <= 1


def test_a_machine_with_several_memory_nodes_is_planned_with_each_as_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = (
        MemoryNode(0, "dram0", Tier.DRAM, 2e10, 1e-7, 1 << 30),
        MemoryNode(2, "cxl2", Tier.CXL, 5e9, 3e-7, 4 << 30),
    )
    monkeypatch.setattr(this_machine, "_several_nodes", lambda tiers: nodes)
    shape = ModelShape("x", 2, 256, 4, 2, 64, 10**6, 10**6, 10**5)
    machine, _ = measure_machine(shape, num_threads=1, num_bytes=1 << 22, turn_s=0.01)
    assert machine.nodes == nodes
