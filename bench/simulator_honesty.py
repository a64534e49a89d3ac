"""How far the simulator is off on this machine: `python -m bench.simulator_honesty`.

    python -m bench.simulator_honesty --json bench/results/simulator_honesty.json

A Llama of about 150 million random weights decodes on `--device cpu`, in this process, without a server; 20
configurations of policy, context, batch and device pages. Their pages are filled with random keys and values
instead of computing prompts, scaled so that logits have a standard deviation of about 3: policies that select can.

The prediction is the simulator's, with the real scheduler, on what `engine/this_machine.py` measures before and
after the configuration (plain reading, products, attention by the same policy; a machine that others
use too is not the same a minute later), and on the fixed times of two tiny models. No configuration is used to
calibrate. A turn in which other processes took a tenth of the CPUs is made again, whatever came out.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.checkpoints import LLAMA_150M
from bench.throughput import commit, machine
from hybridgen.configs.settings import engine_settings, load_settings
from hybridgen.engine.build import build_engine, load_config
from hybridgen.engine.core import EngineCore
from hybridgen.engine.model_spec import spec_from_config
from hybridgen.engine.request import Request, SamplingParams
from hybridgen.engine.runner import ModelRunner
from hybridgen.engine.shape import shape_of
from hybridgen.engine.this_machine import cpu_name, fill_pages, measure_machine
from hybridgen.kernels.index import build_index
from hybridgen.scheduler.cost import CostFactors, CostModel, ModelShape, System
from hybridgen.scheduler.feedback import Mode
from hybridgen.scheduler.machine import Machine
from hybridgen.scheduler.simulate import Limits, Workload, simulate
from hybridgen.scheduler.step import Step

PAGE_SIZE = 32
QUERY_DEVIATION = 0.55  # of these weights' queries: 0.02 * sqrt(768)
KEY_SCALE = 3.0 / QUERY_DEVIATION
CONFIG = {**LLAMA_150M, "max_position_embeddings": 80000}
TINY = {**LLAMA_150M, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 80000}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Configuration:
    policy: str
    context: int
    batch: int
    device_share: float = 0.0

    @property
    def name(self) -> str:
        split = f" {self.device_share:.0%} device" if self.device_share else ""
        return f"{self.policy} {self.context} x {self.batch}{split}"


CONFIGURATIONS = (
    *(Configuration("exact", context, batch)
      for context, batch in ((1024, 1), (1024, 8), (4096, 1), (4096, 8), (8192, 16), (16384, 1), (16384, 4),
                             (65536, 1))),
    *(Configuration("exact", context, batch, share) for context, batch, share in ((8192, 2, 0.5), (32768, 1, 0.25))),
    *(Configuration("mass", context, batch)
      for context, batch in ((4096, 1), (4096, 8), (16384, 1), (16384, 4), (65536, 1))),
    Configuration("mass", 32768, 1, 0.25),
    *(Configuration("hybridgen", context, batch)
      for context, batch in ((4096, 4), (16384, 1), (16384, 4), (65536, 1))),
)  # fmt: skip


class FilledPages(ModelRunner):
    """Takes chunks of prompts as computed: their pages hold random keys and values already."""

    def __init__(self, runner: ModelRunner) -> None:
        self._inner = runner
        self._store = runner._store
        self.reads = None  # of chunks of prompts, which read nothing
        self._vocab_size = runner._decoder.spec.vocab_size
        store = runner._store
        for pages in (store._device, store._host):
            if pages.num_pages:
                fill_pages(pages, KEY_SCALE)
            if pages.index is not None:
                build_index(store._pool, pages.layout, pages.k, pages.v, pages.index, range(pages.num_pages))

    def run(
        self,
        step: Step,
        known: Mapping[int, Sequence[int]],
        prompt_lens: Mapping[int, int],
        *,
        score_all: Collection[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if all(part.end - part.begin == 1 for part in step.sequences):
            answer = self._inner.run(step, known, prompt_lens, score_all=score_all)
            self.reads = self._inner.reads
            return answer
        self._store.carry_out(step.moves)
        num_samples = sum(part.samples for part in step.sequences)
        return torch.zeros(num_samples, self._vocab_size, dtype=torch.bfloat16), {}

    def forget(self, key: int) -> None:
        self._inner.forget(key)

    def prefix_salt(self, prompt_len: int) -> bytes:
        return self._inner.prefix_salt(prompt_len)


def make_engine(
    folder: Path, policy: str, num_host_pages: int, num_device_pages: int, max_model_len: int, batch: int
) -> EngineCore:
    settings = load_settings(
        {
            "model": str(folder),
            "load_format": "dummy",
            "dtype": "bfloat16",
            "host_attention": policy,
            "hybridgen_adapt": False,
            "host_pages": num_host_pages,
            "device_pages": num_device_pages,
            "max_model_len": max_model_len,
            "max_num_seqs": batch,
            "max_num_batched_tokens": 1 << 17,
            "enable_prefix_caching": False,
        }
    )
    core = build_engine(engine_settings(settings))
    core._runner = FilledPages(core._runner)
    return core


def step_seconds(core: EngineCore, context: int, batch: int, seconds: float) -> tuple[float, int]:
    """Median time of a step in which every sequence decodes; and how many there were."""
    generator = torch.Generator().manual_seed(context)
    params = SamplingParams(temperature=0.0, max_tokens=4096, ignore_eos=True)
    ids = [str(index) for index in range(batch)]
    for name in ids:
        prompt: list[int] = torch.randint(4, 100, (context,), generator=generator).tolist()
        core.add(Request(id=name, prompt=prompt, params=replace_tokens(params, core, context)))
    waiting = set(ids)
    while waiting:
        waiting -= {output.id for output in core.step() if output.tokens}
    for _ in range(3):
        core.step()
    times: list[float] = []
    end_s = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end_s and len(times) < 200):
        begin_s = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - begin_s)
    core.abort(ids)
    while core.has_work():
        core.step()
    return statistics.median(times), len(times)


def replace_tokens(params: SamplingParams, core: EngineCore, context: int) -> SamplingParams:
    room = core.ready.max_model_len - context
    return SamplingParams(
        temperature=params.temperature, max_tokens=min(params.max_tokens or room, room), ignore_eos=True
    )


def write_config(folder: Path, config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def fixed_times(work_dir: Path) -> tuple[float, float, float]:
    """Seconds of a step, of a layer and of a sequence, whatever is in them, by tiny models of two depths."""
    took: dict[tuple[int, int], list[float]] = {
        (layers, batch): [] for layers in (4, 16) for batch in (1, 16)
    }
    cores = {}
    for layers in (4, 16):
        folder = write_config(work_dir / f"tiny-{layers}", {**TINY, "num_hidden_layers": layers})
        cores[layers] = make_engine(folder, "exact", 16 * 8, 0, 256, 16)
    for _ in range(5):
        for (layers, batch), times in took.items():
            times.append(step_seconds(cores[layers], 64, batch, 0.2)[0])
    typical = {key: statistics.median(times) for key, times in took.items()}
    layer_s = max(0.0, (typical[16, 1] - typical[4, 1]) / 12)
    sequence_s = max(0.0, (typical[4, 16] - typical[4, 1]) / 15)
    return max(0.0, typical[4, 1] - 4 * layer_s - sequence_s), layer_s, sequence_s


def predict(configuration: Configuration, shape: ModelShape, host: Machine, factors: CostFactors) -> float:
    """The simulator's median step time."""
    num_pages = -(-(configuration.context + 64) // PAGE_SIZE) * configuration.batch
    limits = Limits(
        device_pages=round(num_pages * configuration.device_share),
        mode=Mode.FIXED,
        max_num_seqs=configuration.batch,
    )
    model = CostModel(host, shape, factors, System(configuration.policy))
    workload = Workload(
        (configuration.context,), concurrency=configuration.batch, num_steps=20, warmup_steps=4
    )
    return simulate(model, workload, limits).step_p50_s


class Others:
    """How much of the CPUs other processes took since it was made: a turn that they disturbed says nothing."""

    def __init__(self) -> None:
        self._begin = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle = fields[3] + fields[4]
        times = os.times()
        own = (times.user + times.system) * os.sysconf("SC_CLK_TCK")
        return float(sum(fields)), float(sum(fields) - idle), own

    def share(self) -> float:
        """Of all CPUs, 0 to 1."""
        total, busy, own = (after - before for before, after in zip(self._begin, self._now(), strict=True))
        return max(0.0, busy - own) / max(1.0, total)

    @classmethod
    def wait(cls, limit: float, seconds: float) -> None:
        """Until they take no more than `limit`, or so long."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            others = cls()
            time.sleep(0.5)
            if others.share() <= limit:
                return


def judge_undisturbed(
    configuration: Configuration,
    folder: Path,
    shape: ModelShape,
    fixed: tuple[float, float, float],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """`judge`, again while others disturb it, whatever came out; the least disturbed attempt is kept."""
    kept: dict[str, Any] | None = None
    for attempt in range(options.attempts):
        Others.wait(options.others, options.patience)
        others = Others()
        row = judge(configuration, folder, shape, fixed, options.seconds)
        row |= {"others": round(others.share(), 3), "attempts": attempt + 1}
        if kept is None or row["others"] < kept["others"]:
            kept = row
        if row["others"] <= options.others:
            break
    assert kept is not None
    return kept


def judge(
    configuration: Configuration,
    folder: Path,
    shape: ModelShape,
    fixed: tuple[float, float, float],
    seconds: float,
) -> dict[str, Any]:
    """Measure a configuration between two predictions, of which the mean counts."""
    num_pages = -(-(configuration.context + 512) // PAGE_SIZE) * configuration.batch
    num_device = round(num_pages * configuration.device_share)
    core = make_engine(
        folder, configuration.policy, num_pages - num_device, num_device,
        configuration.context + 512, configuration.batch,
    )  # fmt: skip
    policies = () if configuration.policy == "exact" else (configuration.policy,)
    step_s, layer_s, sequence_s = fixed
    predictions: list[float] = []
    calibrations: list[dict[str, Any]] = []
    measured_s, num_steps = 0.0, 0
    for turn in range(2):
        host, factors = measure_machine(shape, policies=policies, key_scale=KEY_SCALE * QUERY_DEVIATION)
        factors = replace(
            factors, step_s=step_s, layer_s=layer_s, sequence_s=sequence_s, handover_s=layer_s / 2
        )
        predictions.append(predict(configuration, shape, host, factors))
        calibrations.append(
            {
                "plain_read_gb_s": round(host.nodes[0].read_bandwidth / 1e9, 2),
                "core_gflops": round(host.core_flops / 1e9, 1),
                "factors": asdict(factors),
            }
        )
        if turn == 0:
            measured_s, num_steps = step_seconds(core, configuration.context, configuration.batch, seconds)
    predicted_s = statistics.fmean(predictions)
    return {
        **asdict(configuration),
        "predicted_ms": round(1e3 * predicted_s, 3),
        "measured_ms": round(1e3 * measured_s, 3),
        "error": round(predicted_s / measured_s - 1, 3),
        "num_steps": num_steps,
        "predictions_ms": [round(1e3 * seconds, 3) for seconds in predictions],
        "calibrations": calibrations,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        work_dir = Path(name)
        folder = write_config(work_dir / "llama-150m", CONFIG)
        shape = shape_of(spec_from_config(load_config(folder)), "llama-150m")
        Others.wait(options.others, options.patience)
        fixed = fixed_times(work_dir)
        rows: list[dict[str, Any]] = []
        for configuration in CONFIGURATIONS:
            if options.only and configuration.policy not in options.only:
                continue
            row = judge_undisturbed(configuration, folder, shape, fixed, options)
            rows.append(row)
            print(f"{configuration.name}: {json.dumps(row)}", file=sys.stderr, flush=True)
    errors = [abs(row["error"]) for row in rows]
    return {
        "command": "python -m bench.simulator_honesty",
        "cpu": cpu_name(),
        "machine": machine(),
        "commit": commit(),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "fixed_times_s": dict(zip(("step", "layer", "sequence"), fixed, strict=True)),
        "model": {"config": CONFIG},
        "rows": rows,
        "median_error": round(statistics.median(errors), 3),
        "worst_error": round(max(errors), 3),
    }


def table(results: Mapping[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| policy | context | sequences | on the device | predicted, ms | measured, ms | error | others' CPU |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['policy']} | {row['context']:,} | {row['batch']} | {row['device_share']:.0%} "
        f"| {row['predicted_ms']:.2f} | {row['measured_ms']:.2f} | {row['error']:+.0%} | {row['others']:.0%} |"
        for row in results["rows"]
    ]
    between = [abs(row["predictions_ms"][0] / row["predictions_ms"][1] - 1) for row in results["rows"]]
    return "\n".join(lines) + (
        f"\n\nMedian error {results['median_error']:.1%}, worst {results['worst_error']:.1%}."
        f" The predictions before and after a configuration differ by {statistics.median(between):.1%}"
        f"\nin the median and {max(between):.1%} at worst: so much the machine itself changed."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulator_honesty", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--json", type=Path, help="where to keep the results")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of each configuration (default: %(default)s)"
    )
    parser.add_argument(
        "--others",
        type=float,
        default=0.1,
        help="share of the CPUs that others may take (default: %(default)s)",
    )
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds to wait for them (default: %(default)s)"
    )
    parser.add_argument(
        "--attempts",
        type=int,
        default=2,
        help="of each configuration, while disturbed (default: %(default)s)",
    )
    parser.add_argument("--only", nargs="*", help="policies (default: all)")
    options = parser.parse_args()
    results = run(options)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
