"""Where settings come from, what is refused and in which words, and that help and docs say it."""

import argparse
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pydantic import ValidationError

from hybridgen.configs.settings import (
    EMBEDDED_MODEL,
    EngineSettings,
    Settings,
    SettingsError,
    add_arguments,
    allowed_cpus,
    api_keys,
    cgroup_cpu_quotas,
    chat_template,
    client_api_key,
    engine_settings,
    flags,
    load_settings,
    markdown,
    parse_count,
    parse_settings,
    unknown_variables,
)

ROOT = Path(__file__).resolve().parent.parent.parent
# Fields whose other values are refused in settings.py itself, and the file that it reads: nobody else's business.
SETTLED_HERE = {"tensor_parallel_size", "trust_remote_code", "device", "config"}


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in os.environ:
        if variable.startswith("HYBRIDGEN_"):
            monkeypatch.delenv(variable)


def parse(*argv: str) -> Settings:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return parse_settings(parser.parse_args(argv))


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_command_line_goes_before_the_environment_the_file_and_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parse().max_num_seqs == 256
    config = write(tmp_path / "c.toml", "max-num-seqs = 3\nport = 1003")
    assert parse("--config", config).max_num_seqs == 3
    monkeypatch.setenv("HYBRIDGEN_MAX_NUM_SEQS", "2")
    assert parse("--config", config).max_num_seqs == 2
    settings = parse("--config", config, "--max-num-seqs", "1")
    assert (settings.max_num_seqs, settings.port) == (1, 1003)


def test_the_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDGEN_CONFIG", write(tmp_path / "c.toml", "port = 5"))
    assert parse().port == 5
    assert parse("--config", write(tmp_path / "d.toml", "port = 6")).port == 6


def test_a_file_spells_keys_as_flags_or_fields(tmp_path: Path) -> None:
    text = 'page-size = 64\nmax_model_len = "auto"\nshutdown-timeout = 1.5\nserved-model-name = ["a", "b"]'
    settings = parse("--config", write(tmp_path / "c.toml", text))
    assert (settings.block_size, settings.max_model_len, settings.drain_timeout) == (64, None, 1.5)
    assert settings.served_model_name == ("a", "b")


def test_flags_of_every_kind() -> None:
    settings = parse(
        "m", "--api-key", "k1", "k2", "--no-enable-prefix-caching", "--drain-timeout", "2.5", "--dtype",
        "bfloat16", "--kv-cache-memory-bytes", "1.5GiB", "--max-model-len", "32k", "--num-gpu-blocks-override", "9",
    )  # fmt: skip
    assert settings.model == "m"
    assert settings.api_key == ("k1", "k2")
    assert settings.enable_prefix_caching is False
    assert (settings.drain_timeout, settings.dtype, settings.device_pages) == (2.5, "bfloat16", 9)
    assert (settings.kv_cache_memory_bytes, settings.max_model_len) == (3 << 29, 32_000)


def test_lists_in_the_environment_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDGEN_API_KEY", "a, b,")
    assert parse().api_key == ("a", "b")
    assert client_api_key() == "a"
    monkeypatch.delenv("HYBRIDGEN_API_KEY")
    assert client_api_key() is None


@pytest.mark.parametrize(
    ("argv", "model"),
    [([], str(EMBEDDED_MODEL)), (["m"], "m"), (["--model", "m"], "m"), (["--model-path", "m"], "m"),
     (["m", "--model", "m"], "m")],
)  # fmt: skip
def test_the_model_is_given_with_or_without_a_flag(argv: list[str], model: str) -> None:
    assert parse(*argv).model == model


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], ("hybridgen-embedded",)),
        (["org/m"], ("org/m",)),
        (["m", "--served-model-name", "a", "b"], ("a", "b")),
    ],
)
def test_a_model_is_served_under_its_own_name_unless_told_otherwise(
    argv: list[str], names: tuple[str, ...]
) -> None:
    assert parse(*argv).served_model_name == names


@pytest.mark.parametrize(
    ("text", "count"),
    [("7", 7), ("32k", 32_000), ("32K", 32_768), ("25.6k", 25_600), ("2M", 2 << 20), ("4GB", 4 * 10**9),
     ("4GiB", 4 << 30), ("4 GiB", 4 << 30), ("1B", 1), ("1T", 1 << 40)],
)  # fmt: skip
def test_counts_carry_suffixes(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "1kk", "-1", "1e3", "0.5", "1.0001k", "4gib"])
def test_other_texts_are_not_counts(text: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        parse_count(text)


@pytest.mark.parametrize("text", ["auto", "-1"])
def test_max_model_len_may_be_left_to_the_model(text: str) -> None:
    assert load_settings({"max_model_len": text}).max_model_len is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"port": "70000"}, "--port: input should be less than or equal to 65535, got '70000'"),
        ({"max_num_seqs": "0"}, "--max-num-seqs: input should be greater than or equal to 1, got '0'"),
        ({"block_size": "24"}, "--block-size: input should be a multiple of 16, got '24'"),
        ({"seed": "x"}, "--seed: input should be a valid integer, unable to parse string as an integer, got 'x'"),
        ({"drain_timeout": "inf"}, "--drain-timeout: input should be a finite number, got 'inf'"),
        ({"dtype": "int8"}, "--dtype: input should be 'auto', 'bfloat16', 'float16' or 'float32', got 'int8'"),
        ({"max_model_len": "32kk"}, "--max-model-len: not a number; write 32768, 32k (thousands)"),
        ({"model": ""}, "--model: "),
        ({"served_model_name": []}, "--served-model-name: "),
        ({"device": "cuda"}, "--device: cuda is not supported by this version, which computes on the CPU; use cpu"),
        ({"device": "cuda:1"}, "--device: cuda:1 is not supported by this version"),
        ({"tensor_parallel_size": "2"}, "--tensor-parallel-size: tensor parallelism is not supported"),
        ({"trust_remote_code": True}, "--trust-remote-code: code that comes with a checkpoint is never run"),
        ({"max_num_seq": "3"}, "unknown setting max_num_seq; did you mean max_num_seqs?"),
    ],
)  # fmt: skip
def test_a_refused_value_is_named_with_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings(arguments)
    assert str(refused.value).startswith(message)


def test_every_mistake_is_told_with_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDGEN_PORT", "x")
    config = write(tmp_path / "c.toml", "max-num-seqs = 0\ndrain_timout = 3")
    with pytest.raises(SettingsError) as refused:
        parse("--config", config, "--seed", "-1")
    lines = sorted(str(refused.value).splitlines())
    assert [line.split(":")[0] for line in lines] == [
        "--seed",
        "HYBRIDGEN_PORT",
        "max_num_seqs in the configuration file",
        "unknown setting drain_timout; did you mean drain_timeout?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [("port = ", "Invalid value"), ("page-size = 32\nblock-size = 32", "block_size is set twice"),
     ('config = "x"', "a file cannot name another")],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    config = write(tmp_path / "c.toml", text)
    with pytest.raises(SettingsError, match=rf"--config {config}: .*{message}"):
        parse("--config", config)


def test_the_variable_of_a_kubernetes_service_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDGEN_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(SettingsError, match=r"HYBRIDGEN_PORT: .*enableServiceLinks: false"):
        parse()


def test_a_misspelt_variable_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDGEN_MAX_NUM_SEQ", "1")
    monkeypatch.setenv("HYBRIDGEN_CPU_ISA", "scalar")
    monkeypatch.setenv("HYBRIDGEN_PORT", "1")
    assert unknown_variables() == (
        "HYBRIDGEN_MAX_NUM_SEQ is not a setting; did you mean HYBRIDGEN_MAX_NUM_SEQS?",
    )


def test_settings_do_not_change_and_do_not_show_keys() -> None:
    settings = Settings(api_key=("secret-key",))
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]
    assert "secret-key" not in repr(settings)


def test_keys_come_from_the_flag_and_the_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# whose\nb\n\n c \n")
    assert api_keys(Settings(api_key=("a",), api_key_file=keys)) == ("a", "b", "c")
    assert api_keys(Settings()) == ()
    keys.write_text("\n")
    with pytest.raises(SettingsError, match="holds no key"):
        api_keys(Settings(api_key_file=keys))


def test_a_chat_template_is_a_file_or_itself(tmp_path: Path) -> None:
    assert chat_template(Settings()) is None
    assert chat_template(Settings(chat_template="{{ messages }}")) == "{{ messages }}"
    file = write(tmp_path / "t.jinja", "from {{ file }}")
    assert chat_template(Settings(chat_template=file)) == "from {{ file }}"


def test_the_engines_settings_are_those_of_the_server_and_survive_the_wire() -> None:
    pages = {"device_pages": 5, "host_pages": 7, "sink_pages": 2}
    settings = Settings(model="m", block_size=64, max_model_len="2K", threads=3, seed=9, **pages)
    part = engine_settings(settings)
    assert (part.page_size, part.max_model_len, part.threads) == (64, 2048, 3)
    assert (part.num_device_pages, part.num_host_pages, part.num_sink_pages) == (5, 7, 2)
    others = {"page_size", "num_device_pages", "num_host_pages", "num_sink_pages", "device"}
    for name in set(EngineSettings.__struct_fields__) - others:
        assert getattr(part, name) == getattr(settings, name), name
    assert msgspec.json.decode(msgspec.json.encode(part), type=EngineSettings) == part


def test_no_threads_given_means_the_cpus_that_are_allowed() -> None:
    assert engine_settings(Settings()).threads == allowed_cpus()
    assert 1 <= allowed_cpus() <= len(os.sched_getaffinity(0))


def test_cgroup_limits_count_from_the_process_up_to_the_root(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/a/b\n")
    (tmp_path / "fs/a/b").mkdir(parents=True)
    write(tmp_path / "fs/a/b/cpu.max", "max 100000\n")
    write(tmp_path / "fs/a/cpu.max", "150000 100000\n")
    write(tmp_path / "fs/cpu.max", "400000 100000\n")
    write(tmp_path / "cpu.max", "1 100000\n")  # outside
    assert list(cgroup_cpu_quotas(tmp_path / "fs", own)) == [1.5, 4.0]
    assert list(cgroup_cpu_quotas(tmp_path / "fs", tmp_path / "none")) == []


def test_cgroups_of_the_first_version_limit_too(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/a\n3:cpu,cpuacct:/a/b\n0::/\n")
    (tmp_path / "fs/cpu,cpuacct/a/b").mkdir(parents=True)
    for folder, quota in (("a/b", "250000"), ("a", "-1")):
        write(tmp_path / "fs/cpu,cpuacct" / folder / "cpu.cfs_quota_us", quota)
        write(tmp_path / "fs/cpu,cpuacct" / folder / "cpu.cfs_period_us", "100000")
    assert list(cgroup_cpu_quotas(tmp_path / "fs", own)) == [2.5]


@pytest.mark.parametrize(
    "given", ["2=cxl,3=none", ["2=cxl", "3=none"], ["2=cxl, 3=none"], ["2=cxl", "3=none", "2=cxl"]]
)
def test_memory_tiers_are_given_in_one_piece_or_several(given: object) -> None:
    assert load_settings({"memory_tiers": given}).memory_tiers == {2: "cxl", 3: "none"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("2=fast", "write NODE=dram, NODE=cxl or NODE=none, got '2=fast'"),
        ("cxl", "got 'cxl'"),
        ("-1=cxl", "got '-1=cxl'"),
        (["2=cxl", "2=dram"], "node 2 is named twice: cxl and dram"),
    ],
)
def test_memory_tiers_that_name_nothing_are_refused(given: object, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^--memory-tiers: .*{message}"):
        load_settings({"memory_tiers": given})


def test_memory_tiers_come_from_the_environment_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDGEN_MEMORY_TIERS", "1=cxl,2=dram")
    assert load_settings({}).memory_tiers == {1: "cxl", 2: "dram"}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_help_and_docs_name_every_field(name: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for flag in flags(name):
        assert re.search(rf"(^|[ ,\[]){flag}[ ,\]]", text), flag
        assert f"`{flag}`" in markdown()
    description = Settings.model_fields[name].description
    assert description
    assert description[:20] in text


@pytest.mark.parametrize("name", sorted(set(Settings.model_fields) - SETTLED_HERE))
def test_every_setting_is_used(name: str) -> None:
    sources = [path.read_text() for path in (ROOT / "server").glob("*.py")]
    sources.append((ROOT / "configs" / "settings.py").read_text())
    assert any(re.search(rf"\bsettings\.{name}\b", source) for source in sources)


@pytest.mark.parametrize("name", EngineSettings.__struct_fields__)
def test_every_setting_of_the_engine_is_used(name: str) -> None:
    sources = [path.read_text() for path in (ROOT / "engine").glob("*.py")]
    assert any(re.search(rf"\bsettings\.{name}\b", source) for source in sources)


def test_the_table_in_the_docs_is_up_to_date() -> None:
    # If not: python -m hybridgen.configs.settings > docs/settings.md
    assert (ROOT / "docs" / "settings.md").read_text() == markdown()
