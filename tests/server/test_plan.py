import json
import sys
from pathlib import Path

import pytest

from hybridgen.engine.planning import SYSTEMS
from hybridgen.server.cli import main
from hybridgen.server.plan import parse_contexts, parse_policies

SMALL = ["plan", "opt-6.7b", "--machine", "rtx5090", "--context", "1K", "--concurrency", "2"]


def test_a_plan_is_a_table_of_every_policy_that_says_it_is_simulated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(SMALL) == 0
    shown = capsys.readouterr().out
    assert "Simulated, not measured" in shown
    for system in SYSTEMS:
        assert system in shown
    assert "assumption" in shown


def test_json_has_the_figures_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json", "--policy", "exact,stream", "--cxl", "1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["machine"].endswith("1 x CXL")
    assert plan["concurrency"] == 2
    assert [row["system"] for row in plan["rows"]] == ["exact", "stream"]
    for row in plan["rows"]:
        assert row["tokens_per_s"] == pytest.approx(2 / row["step_p50_ms"] * 1e3, rel=0.01)
        assert row["limit"]
        assert sum(row["critical"].values()) == pytest.approx(1, abs=0.01)
        assert row["device_kv_bytes"] > 0


def test_requests_can_arrive_at_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL[:-2], "--rate", "4", "--output-len", "4", "--policy", "exact", "--json"]
    assert main(arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert 0 < row["ttft_p50_s"] <= row["ttft_p99_s"]
    assert row["num_waiting"] == 0


def test_a_sweep_draws_bars_for_every_context_and_number_of_expanders(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["plan", "opt-6.7b", "--machine", "rtx5090", "--context", "1K,2000", "--concurrency", "2"]
    assert main([*arguments, "--sweep", "--policy", "exact"]) == 0
    shown = capsys.readouterr().out
    for context in ("1,024", "2,000"):
        for num_cxl in (0, 1, 4, 8):
            assert f"{context} tokens, {num_cxl} x CXL" in shown
    assert "█" in shown


def test_a_sweep_can_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs hybridgen[plot]")
    plot = tmp_path / "sweep.png"
    arguments = ["plan", "opt-6.7b", "--machine", "rtx5090", "--context", "1K,2K", "--concurrency", "1"]
    assert main([*arguments, "--sweep", "--policy", "exact", "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_plot_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*SMALL, "--sweep", "--plot", str(tmp_path / "sweep.png")]) == 1
    assert "pip install 'hybridgen[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "about"),
    [
        (["plan", "opt-6.7b", "--machine", "h300"], 1, "no machine 'h300'; known are a100-40g"),
        (["plan", "gpt-5", "--machine", "h100"], 1, "no model 'gpt-5'"),
        (["plan", "llama-3.1-70b", "--machine", "h100"], 1, "131.4 GiB"),
        (["plan", "opt-6.7b", "--machine", "h100", "--cxl", "99"], 1, "99 CXL expanders"),
        (["plan", "opt-6.7b", "--machine", "h100", "--policy", "magic"], 2, "no policy 'magic'"),
        (["plan", "opt-6.7b", "--machine", "h100", "--context", "long"], 2, "not a number"),
        (["plan", "opt-6.7b", "--machine", "h100", "--context", "0"], 2, "lengths like 32k"),
        (["plan", "opt-6.7b", "--machine", "h100", "--plot", "x.png"], 2, "add --sweep"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused_in_one_sentence(
    arguments: list[str], status: int, about: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == status
    error = capsys.readouterr().err
    assert about in error
    assert error.startswith("hybridgen plan: error: ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "contexts"),
    [("32K", (32768,)), ("32k", (32000,)), ("3*8K,100", (8192, 8192, 8192, 100)), ("1, 2", (1, 2))],
)
def test_contexts_are_lengths_with_or_without_weights(text: str, contexts: tuple[int, ...]) -> None:
    assert parse_contexts(text) == contexts


def test_policies_are_named_or_all_or_ours() -> None:
    assert parse_policies("all") == SYSTEMS
    assert parse_policies("ours") == ("exact", "mass", "hybridgen")
    assert parse_policies("stream, exact") == ("stream", "exact")
