"""Tokens that do not depend on which pages lie on the device, and what is computed, found and kept on the way."""

import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from hybridgen.configs.emulation import EmulatedNode
from hybridgen.configs.settings import EngineSettings
from hybridgen.engine import build
from hybridgen.engine.build import build_engine
from hybridgen.engine.core import EngineCore
from hybridgen.engine.kv_store import NotEnoughMemory
from hybridgen.engine.request import Request, SamplingParams
from hybridgen.kernels.isa import supported_isas
from hybridgen.kernels.measurements import Measurements, NodeMeasurement
from hybridgen.kernels.numa import read_topology
from hybridgen.scheduler.step import PageMove
from tests.models import CONFIGS, VOCAB_SIZE, save_model

NUM_TOKENS = 64
PROMPT_LENS = (1, 15, 16, 33, 100, 170)
TOTAL_PAGES = sum(-(-(length + NUM_TOKENS) // 16) for length in PROMPT_LENS)  # of 16 tokens, at their ends
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


def random_tokens(length: int, *, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB_SIZE), k=length)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def folder(name: str) -> Path:
        path: Path = tmp_path_factory.mktemp(name)
        save_model(name, path)
        return path

    return folder


def engine(folder: Path, **settings: Any) -> EngineCore:
    values: dict[str, Any] = {
        "num_host_pages": 64,
        "page_size": 16,
        "threads": 1,
        "max_num_seqs": 16,
        **settings,
    }
    return build_engine(EngineSettings(model=str(folder), **values))


def run(
    core: EngineCore, requests: Mapping[str, Sequence[int]], params: SamplingParams = GREEDY
) -> dict[str, list[int]]:
    """Serve all at once and return each request's tokens, checking the books after every step."""
    for name, prompt in requests.items():
        core.add(Request(id=name, prompt=list(prompt), params=params))
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    while core.has_work():
        for output in core.step():
            assert output.error is None, output.error
            tokens[output.id] += output.tokens
        core.check_integrity()
    return tokens


def everything(core: EngineCore) -> dict[str, list[int]]:
    return run(core, {str(length): random_tokens(length, seed=length) for length in PROMPT_LENS})


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest, folders: Any) -> tuple[Path, dict[str, list[int]]]:
    """A checkpoint, and its tokens with all pages on the host."""
    folder = folders(request.param)
    return folder, everything(engine(folder))


@pytest.fixture(scope="module")
def llama(folders: Any) -> tuple[Path, dict[str, list[int]]]:
    return folders("llama"), everything(engine(folders("llama")))


@pytest.mark.parametrize("num_device_pages", [2, TOTAL_PAGES // 2], ids=lambda n: f"device={n}")
def test_the_split_changes_no_token(model: tuple[Path, dict[str, list[int]]], num_device_pages: int) -> None:
    folder, expected = model
    core = engine(folder, num_device_pages=num_device_pages)
    assert everything(core) == expected
    stats = core.stats()
    assert stats.num_demoted_pages_total > 0
    assert stats.num_host_tokens_total > 0


def test_all_pages_on_the_device_change_no_token(model: tuple[Path, dict[str, list[int]]]) -> None:
    folder, expected = model
    core = engine(folder, num_device_pages=TOTAL_PAGES, num_host_pages=0)
    assert everything(core) == expected
    assert core.stats().num_host_tokens_total == 0


@pytest.mark.parametrize("page_size", [32, 64])
def test_the_page_size_changes_no_token(llama: tuple[Path, dict[str, list[int]]], page_size: int) -> None:
    folder, expected = llama
    core = engine(folder, num_device_pages=5, page_size=page_size)
    assert everything(core) == expected
    assert core.stats().num_demoted_pages_total > 0


def test_the_number_of_threads_changes_no_token(llama: tuple[Path, dict[str, list[int]]]) -> None:
    folder, expected = llama
    core = engine(folder, num_device_pages=3, threads=2)
    assert run(core, {"100": random_tokens(100, seed=100)})["100"] == expected["100"]


@pytest.mark.parametrize("isa", supported_isas())
def test_the_instruction_set_changes_no_token(
    llama: tuple[Path, dict[str, list[int]]], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = llama
    monkeypatch.setenv("HYBRIDGEN_CPU_ISA", isa)
    assert everything(engine(folder, num_device_pages=6)) == expected


def test_the_size_of_prefill_chunks_changes_no_token(llama: tuple[Path, dict[str, list[int]]]) -> None:
    folder, expected = llama
    assert everything(engine(folder, num_device_pages=6, max_num_batched_tokens=24)) == expected


def test_a_context_of_ten_times_the_device_is_served_to_its_last_token(folders: Any) -> None:
    prompt = random_tokens(330, seed=5)
    long = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
    whole = run(engine(folders("llama"), max_model_len=480), {"x": prompt}, long)
    core = engine(folders("llama"), num_device_pages=3, num_host_pages=27, max_model_len=480)
    assert run(core, {"x": prompt}, long) == whole
    stats = core.stats()
    assert len(whole["x"]) == 150
    assert stats.num_demoted_pages_total == 30 - 3
    assert stats.num_promoted_pages_total == 0
    assert stats.num_host_tokens_total > 8 * stats.num_device_tokens_total


def test_a_preempted_sequence_goes_on_without_computing_anything_again(folders: Any) -> None:
    # Five sinks each: three sequences outgrow a device of twelve pages, and the host has room for all they have.
    core = engine(folders("llama"), num_device_pages=12, num_host_pages=40, num_sink_pages=5)
    requests = {str(seed): random_tokens(20, seed=seed) for seed in range(3)}
    long = SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True)
    parked = 0
    for name, prompt in requests.items():
        core.add(Request(id=name, prompt=prompt, params=long))
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    num_computed = 0
    while core.has_work():
        for output in core.step():
            tokens[output.id] += output.tokens
        num_computed += core.stats().last_step_tokens
        parked = max(parked, core.stats().num_parked)
        core.check_integrity()
    stats = core.stats()
    assert stats.num_preemptions_total > 0
    assert parked > 0
    # Every prompt token once, and every generated one but the last.
    assert stats.num_prompt_tokens_total == 3 * 20
    assert num_computed == 3 * (20 + 120 - 1)
    assert stats.num_promoted_pages_total > 0
    assert tokens == run(engine(folders("llama")), requests, long)


def test_sequences_that_lose_pages_for_want_of_host_memory_change_no_token(
    folders: Any,
) -> None:
    folder = folders("llama")
    # 18 of the 30 pages that these six want at their ends, and no sinks, so that all are admitted.
    core = engine(folder, num_device_pages=6, num_host_pages=12, num_sink_pages=0)
    requests = {str(seed): random_tokens(16, seed=seed) for seed in range(6)}
    assert run(core, requests) == run(engine(folder), requests)
    stats = core.stats()
    assert stats.num_preemptions_total > 0
    assert stats.num_demoted_pages_total > 0


def test_prefix_hits_on_the_host_are_attended_where_they_lie(folders: Any) -> None:
    core = engine(folders("llama"), num_device_pages=4)
    short = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    prompt = random_tokens(200, seed=9)
    first = run(core, {"x": prompt}, short)
    run(core, {"other": prompt[::-1][:60]}, short)  # takes the device pages; what they held goes to the host
    before = core.stats()
    assert run(core, {"x": prompt}, short) == first
    after = core.stats()
    assert after.num_prefix_hits_total - before.num_prefix_hits_total == 192
    assert after.num_prompt_tokens_total - before.num_prompt_tokens_total == 200 - 192
    assert after.num_promoted_pages_total == 0
    # Twelve pages of hits, read in the step that computes the rest of the prompt and in seven more.
    assert after.num_host_tokens_total - before.num_host_tokens_total == 8 * 192


def test_a_reset_prefix_cache_is_forgotten_on_both_tiers(folders: Any) -> None:
    core = engine(folders("llama"), num_device_pages=4)
    short = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    prompt = random_tokens(200, seed=9)
    first = run(core, {"x": prompt}, short)
    core._scheduler.reset_prefix_cache()
    stats = core.stats()
    assert (stats.num_free_pages, stats.num_free_device_pages) == (stats.num_pages, stats.num_device_pages)
    assert run(core, {"x": prompt}, short) == first
    assert core.stats().num_prefix_hits_total == 0


def test_a_device_too_small_for_the_sinks_is_refused_with_the_numbers(folders: Any) -> None:
    with pytest.raises(NotEnoughMemory, match=r"needs 3 device pages, the 2 of --sink-pages .* is 2"):
        engine(folders("llama"), num_device_pages=2, num_sink_pages=2)
    assert engine(folders("llama"), num_device_pages=20, num_sink_pages=30, num_host_pages=0)


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for 4096 positions: contexts below a thousand tokens are read in full by every policy."""
    folder: Path = tmp_path_factory.mktemp("longer")
    save_model("llama", folder)
    config = folder / "config.json"
    config.write_text(
        config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 4096')
    )
    return folder


@pytest.mark.parametrize("layer_ahead", [False, True])
@pytest.mark.parametrize("num_device_pages", [0, 6])
def test_reading_the_host_in_part_is_measured_and_stays_above_the_floor(
    longer: Path, num_device_pages: int, layer_ahead: bool
) -> None:
    settings = {"num_device_pages": num_device_pages, "num_host_pages": 110, "attention_mass": 0.9}
    core = engine(
        longer, host_attention="mass", layer_ahead=layer_ahead, attention_mass_floor=0.8, **settings
    )
    short = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    run(core, {"x": random_tokens(1600, seed=1)}, short)
    stats = core.stats()
    # Eleven decodes, two layers, four heads; the prompt is read in full.
    assert stats.num_measured_heads_total == 11 * 2 * 4
    assert 0.8 <= stats.retained_mass_total / stats.num_measured_heads_total <= 1
    assert 0.8 <= stats.lowest_retained_mass <= 1
    assert 0 < stats.num_selected_tokens_total < stats.num_scanned_tokens_total


@pytest.mark.parametrize("layer_ahead", [False, True])
@pytest.mark.parametrize("num_device_pages", [0, 6])
def test_a_mass_close_to_one_gives_the_tokens_of_exact_attention(
    longer: Path, num_device_pages: int, layer_ahead: bool
) -> None:
    requests = {"x": random_tokens(1500, seed=2), "y": random_tokens(40, seed=3)}
    settings = {"num_device_pages": num_device_pages, "num_host_pages": 120}
    expected = run(engine(longer, num_host_pages=120), requests)
    core = engine(longer, host_attention="mass", layer_ahead=layer_ahead, attention_mass=0.9999, **settings)
    assert run(core, requests) == expected


@pytest.mark.parametrize("num_device_pages", [0, 6])
def test_hybridgen_at_ratio_one_gives_the_tokens_of_exact_attention(
    longer: Path, num_device_pages: int
) -> None:
    requests = {"x": random_tokens(1500, seed=2), "y": random_tokens(40, seed=3)}
    settings = {"num_device_pages": num_device_pages, "num_host_pages": 120, "hybridgen_adapt": False}
    core = engine(longer, host_attention="hybridgen", hybridgen_ratio=1.0, **settings)
    assert run(core, requests) == run(engine(longer, num_host_pages=120), requests)
    assert core.stats().retained_mass_total == pytest.approx(core.stats().num_measured_heads_total, rel=1e-5)


def test_hybridgen_attends_to_the_share_of_tokens_asked_for(longer: Path) -> None:
    core = engine(
        longer, host_attention="hybridgen", hybridgen_ratio=0.1, hybridgen_adapt=False, num_host_pages=110
    )
    short = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    run(core, {"x": random_tokens(1600, seed=1)}, short)
    stats = core.stats()
    assert stats.num_measured_heads_total == 11 * 2 * 4
    assert stats.num_selected_tokens_total == sum(2 * 4 * int(0.1 * (1600 + i)) for i in range(1, 12))
    assert 0.1 <= stats.retained_mass_total / stats.num_measured_heads_total < 1


def test_what_is_measured_is_nothing_where_every_key_is_read(longer: Path) -> None:
    core = engine(longer, num_device_pages=6)
    run(core, {"x": random_tokens(100, seed=1)})
    assert core.stats().num_measured_heads_total == 0
    assert core.stats().lowest_retained_mass == 1.0


def test_exact_attention_has_nothing_to_look_ahead_for(longer: Path) -> None:
    with pytest.raises(ValueError, match="--layer-ahead is of no use to --host-attention exact"):
        engine(longer, layer_ahead=True)


def test_a_floor_above_the_mass_is_refused(longer: Path) -> None:
    with pytest.raises(ValueError, match=r"floor is 0\.95"):
        engine(longer, host_attention="mass", attention_mass=0.9, attention_mass_floor=0.95)


@pytest.fixture
def emulating(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings for two emulated nodes beside DRAM whose speed is known without measuring it."""
    measurements = Measurements("", 0.0, 0.0, (NodeMeasurement(0, (0,), ((1, 20e9),), 1e-7, 1 << 20),))
    monkeypatch.setattr(
        build, "describe_memory", lambda tiers, measured: (read_topology(tiers=tiers), measurements)
    )
    nodes = EmulatedNode("slow", 10e9), EmulatedNode("small", 10e9, capacity_bytes=256 << 10)
    return {"emulate_node": nodes, "migration_bytes": 64 << 10}


@pytest.mark.parametrize("placement", ["mapper", "paper", "interleave"])
@pytest.mark.parametrize("policy", ["exact", "mass", "hybridgen"])
@pytest.mark.parametrize("num_device_pages", [0, 6])
def test_the_nodes_that_host_pages_lie_on_change_no_token(
    longer: Path, emulating: dict[str, Any], num_device_pages: int, policy: str, placement: str
) -> None:
    requests = {"x": random_tokens(1300, seed=2), "y": random_tokens(40, seed=3)}
    settings = {
        "num_device_pages": num_device_pages,
        "num_host_pages": 110,
        "host_attention": policy,
        "hybridgen_adapt": False,  # it goes by times
    }
    plain, core = engine(longer, **settings), engine(longer, placement=placement, **settings, **emulating)
    assert run(core, requests) == run(plain, requests)
    stats = core.stats()
    assert [node.name for node in stats.nodes] == ["dram0", "slow", "small"]
    assert [node.read_bytes_total > 0 for node in stats.nodes] == [
        any(node.num_pieces) for node in stats.nodes
    ]
    assert sum(node.read_bytes_total > 0 for node in stats.nodes) > 1
    # Again, from the prefix cache, whose pages may have moved.
    assert run(core, requests) == run(plain, requests)
    assert core.stats().num_prefix_hits_total > 0


def test_the_mapper_moves_pieces_while_tokens_come(longer: Path, emulating: dict[str, Any]) -> None:
    settings = {"num_host_pages": 110, "host_attention": "mass", "attention_mass": 0.8}
    core = engine(longer, **settings, **emulating)
    requests = {"x": random_tokens(1500, seed=2)}
    assert run(core, requests) == run(engine(longer, **settings), requests)
    assert sum(move.num_total for move in core.stats().migrations) > 0


def test_a_host_page_that_is_overwritten_in_the_step_that_promotes_it_is_read_first(
    folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was placed anew, and so lost, before the step's moves had read it."""
    store = engine(folders("llama"), num_device_pages=4)._runner.store
    host, device = store.host.pages, store._device

    def forget(pages: Sequence[int], *, coming: int = 0) -> None:
        host.k[list(pages)] = float("nan")

    monkeypatch.setattr(store.host, "prepare", forget)
    device.k.copy_(torch.arange(4).view(-1, 1, 1, 1, 1).expand(device.k.shape))
    host.k[7] = 70
    store.carry_out([PageMove(4 + 7, 2), PageMove(3, 4 + 7)])
    assert device.k[2].unique().tolist() == [70]
    assert host.k[7].unique().tolist() == [3]
