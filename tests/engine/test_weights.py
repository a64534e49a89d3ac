"""Checkpoints that load, and what is said of those that do not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridgen.configs.presets import preset_folder, preset_names
from hybridgen.engine.build import load_config
from hybridgen.engine.model_spec import UnsupportedModel, spec_from_config
from hybridgen.engine.weights import WeightError, dummy_weights, load_weights, resolve_model
from tests.models import CONFIGS, save_model

CPU = torch.device("cpu")
# Parameters as the makers' own checkpoints count them.
PUBLISHED_PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_model("llama", tmp_path)
    return tmp_path


def load(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    load_weights(folder, spec_from_config(load_config(folder)), dtype=dtype, device=CPU)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_parameter_count_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    model = save_model(name, tmp_path)
    assert spec_from_config(load_config(tmp_path)).num_parameters() == model.num_parameters()


def test_presets_have_the_published_numbers_of_parameters() -> None:
    for name, expected in PUBLISHED_PARAMETERS.items():
        folder = preset_folder(name)
        assert folder is not None
        assert spec_from_config(load_config(folder)).num_parameters() == expected, name
    # The two larger OPTs: their published names round to these.
    for name, billions in (("opt-30b", 30.0), ("opt-66b", 65.7)):
        folder = preset_folder(name)
        assert folder is not None
        count = spec_from_config(load_config(folder)).num_parameters()
        assert round(count / 1e9, 1) == billions
    assert set(preset_names()) == {*PUBLISHED_PARAMETERS, "opt-30b", "opt-66b"}


def test_a_preset_resolves_by_its_name() -> None:
    assert resolve_model("opt-13b") == preset_folder("opt-13b")


def test_dummy_weights_have_the_shapes_of_loaded_ones(llama: Path) -> None:
    spec = spec_from_config(load_config(llama))
    loaded = load_weights(llama, spec, dtype=torch.bfloat16, device=CPU)
    dummy = dummy_weights(spec, dtype=torch.bfloat16, device=CPU)
    assert dummy.lm_head.shape == loaded.lm_head.shape
    assert dummy.layers[0].qkv.shape == loaded.layers[0].qkv.shape
    assert dummy.layers[0].up.shape == loaded.layers[0].up.shape
    assert dummy.embedding.dtype == loaded.embedding.dtype == torch.bfloat16


def test_a_sharded_checkpoint_equals_a_whole_one(tmp_path: Path) -> None:
    model = save_model("qwen2", tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    spec = spec_from_config(load_config(tmp_path / "whole"))
    whole = load_weights(tmp_path / "whole", spec, dtype=torch.float32, device=CPU)
    sharded = load_weights(tmp_path / "sharded", spec, dtype=torch.float32, device=CPU)
    assert torch.equal(whole.layers[1].qkv.weight, sharded.layers[1].qkv.weight)
    assert torch.equal(whole.lm_head.weight, sharded.lm_head.weight)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    victim = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(WeightError, match=victim.name):
        load(tmp_path / "sharded")


def test_missing_and_misshaped_tensors_are_named_with_both_shapes(llama: Path) -> None:
    path = llama / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.zeros(63)
    save_file(tensors, path)
    with pytest.raises(WeightError) as info:
        load(llama)
    assert "model.layers.1.mlp.up_proj.weight [96, 64] is missing" in str(info.value)
    assert "model.norm.weight has shape [63] in model.safetensors; the config implies [64]" in str(info.value)


def test_a_checkpoint_without_the_model_prefix_loads(tmp_path: Path) -> None:
    save_model("opt", tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}, path)
    load(tmp_path)


def test_pickles_are_named_and_not_read(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(WeightError, match=r"pytorch_model\.bin are pickles, which are not read"):
        load(llama)


def test_a_truncated_file_is_named(llama: Path) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightError, match=r"cannot read .*model\.safetensors"):
        load(llama)


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="does not exist"):
        resolve_model(str(tmp_path / "nothing"))
    with pytest.raises(WeightError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


def test_a_hub_id_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightError, match=r"'nobody/nothing' is no local folder"):
        resolve_model("nobody/nothing", download_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('"model_type": "gpt2"', "model_type 'gpt2' is not supported; supported: llama, mistral, opt"),
        ('"model_type": "unheard-of"', "unheard-of"),
    ],
)
def test_an_unsupported_architecture_is_named(llama: Path, change: str, message: str) -> None:
    path = llama / "config.json"
    path.write_text(path.read_text().replace('"model_type": "llama"', change))
    with pytest.raises(UnsupportedModel, match=message):
        spec_from_config(load_config(llama))


def test_an_unsupported_rope_scaling_is_named(llama: Path) -> None:
    path = llama / "config.json"
    path.write_text(path.read_text().replace('"rope_type": "default"', '"rope_type": "longrope"'))
    with pytest.raises(UnsupportedModel, match="longrope"):
        spec_from_config(load_config(llama))
