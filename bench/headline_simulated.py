"""The paper's comparison, simulated: `python -m bench.headline_simulated`.

    python -m bench.headline_simulated --json bench/results/headline_simulated.json --docs docs/simulated-headline.md

Every model preset on three described machines, each with four CXL expanders, at a few contexts, by every system of
`scheduler/cost.py`. HybridGen (arXiv 2604.18529) reports 1.41x to 3.2x on average over six KV cache managers on
eleven sizes of OPT, Llama and Qwen, three GPU platforms and CXL memory; its cells are not public, so these are
ours. Nothing runs on a GPU: the figures are those of a cost model, and its assumptions are printed with them.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.throughput import commit
from hybridgen.configs.presets import preset_folder, preset_names
from hybridgen.engine.build import load_config
from hybridgen.engine.model_spec import spec_from_config
from hybridgen.engine.planning import CannotPlan, Plan, Planner, PlanRequest

MACHINES = ("a100-80g", "h100", "rtx5090")
NUM_CXL = 4
LOADS = (
    (1920, 64),
    (32768, 8),
    (98304, 4),
)  # prompt, sequences at a time; 1920 is what InfiniGen's comparison has
OURS = ("exact", "mass", "hybridgen", "hybridgen-published")
BASELINES = ("stream", "stream-int4", "h2o", "infinigen", "cpu-exact", "device-only")
LOSSLESS = ("stream", "cpu-exact", "device-only")
PAPER = (1.41, 3.2)
STEPS = 32


def cells(models: Sequence[str]) -> Iterable[tuple[str, str, int, int]]:
    """Machine, model, context, sequences; contexts within the model's positions."""
    for machine in MACHINES:
        for model in models:
            folder = preset_folder(model)
            assert folder is not None
            limit = spec_from_config(load_config(folder)).max_positions
            for context, concurrency in LOADS:
                if context < limit:
                    yield machine, model, context, concurrency


def run(models: Sequence[str]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, str]] = []
    assumptions: tuple[str, ...] = ()
    planners: dict[tuple[str, str], Planner] = {}
    for machine, model, context, concurrency in cells(models):
        planner = planners.setdefault((machine, model), Planner(model, machine))
        request = PlanRequest(
            model, machine, (context,), num_cxl=NUM_CXL, concurrency=concurrency, num_steps=STEPS,
            systems=(*OURS, *BASELINES),
        )  # fmt: skip
        try:
            made: Plan = planner.plan(request)
        except CannotPlan as error:
            refused.append({"machine": machine, "model": model, "why": str(error)})
            continue
        assumptions = made.assumptions
        by_system = {row.system: asdict(row) for row in made.rows}
        rows.append(
            {
                "machine": machine,
                "model": model,
                "context": context,
                "concurrency": concurrency,
                "systems": by_system,
            }
        )
        shown = {name: row["tokens_per_s"] for name, row in by_system.items()}
        print(f"{machine} {model} {context} x {concurrency}: {shown}", file=sys.stderr, flush=True)
    return {
        "title": "simulated, not measured",
        "command": "python -m bench.headline_simulated",
        "commit": commit(),
        "paper": {"source": "arXiv 2604.18529, abstract", "times_as_fast": PAPER},
        "num_cxl": NUM_CXL,
        "assumptions": assumptions,
        "cells": rows,
        "does_not_fit": [
            dict(part) for part in {tuple(sorted(one.items())): one for one in refused}.values()
        ],
        "times_as_fast": {
            machine: ratios([row for row in rows if machine in ("all", row["machine"])])
            for machine in ("all", *MACHINES)
        },
        "times_as_fast_beyond_the_device": ratios([row for row in rows if beyond_device(row)]),
    }


def beyond_device(row: Mapping[str, Any]) -> bool:
    """Whether KV of all sequences does not fit the device."""
    return bool(row["systems"]["device-only"]["refused"]) or row["systems"]["device-only"]["num_waiting"] > 0


def ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """ours -> baseline -> geometric mean, least and greatest of the ratios of tokens a second."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for ours in OURS:
        result[ours] = {}
        for baseline in BASELINES:
            values = [
                row["systems"][ours]["tokens_per_s"] / row["systems"][baseline]["tokens_per_s"]
                for row in rows
                if row["systems"][ours]["tokens_per_s"] and row["systems"][baseline]["tokens_per_s"]
            ]
            if values:
                mean = math.exp(sum(map(math.log, values)) / len(values))
                result[ours][baseline] = {
                    "mean": round(mean, 3),
                    "least": round(min(values), 3),
                    "greatest": round(max(values), 3),
                    "cells": len(values),
                }
    return result


def ratio_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    lines = ["| | " + " | ".join(BASELINES) + " |", "|---|" + "--:|" * len(BASELINES)]
    for ours, against in found.items():
        texts = [
            "{mean:.2f} ({least:.2f}-{greatest:.2f})".format(**against[name]) if name in against else "-"
            for name in BASELINES
        ]  # fmt: skip
        lines.append(f"| {ours} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def cell_table(results: Mapping[str, Any]) -> str:
    names = (*OURS, *BASELINES)
    lines = [
        "| machine | model | context x sequences | " + " | ".join(names) + " |",
        "|---|---|--:|" + "--:|" * len(names),
    ]
    for row in results["cells"]:
        shown = [
            f"{row['systems'][name]['tokens_per_s']:.1f}" if row["systems"][name]["tokens_per_s"] else "-"
            for name in names
        ]
        lines.append(
            f"| {row['machine']} | {row['model']} | {row['context']:,} x {row['concurrency']} | "
            + " | ".join(shown)
            + " |"
        )
    return "\n".join(lines)


def document(results: Mapping[str, Any], plot: str) -> str:
    """The page of the docs."""
    low, high = results["paper"]["times_as_fast"]
    missing = sorted({f"{one['model']} on {one['machine']}" for one in results["does_not_fit"]})
    loads = ", ".join(f"{context:,} tokens x {count}" for context, count in LOADS)
    machines = "\n".join(
        f"### {name}\n\n{ratio_table(results['times_as_fast'][name])}\n" for name in MACHINES
    )
    losing = [name for name in BASELINES if name not in LOSSLESS]
    return f"""# The paper's comparison, simulated

**Simulated, not measured.** `{results["command"]}` runs the cost model of [docs/simulator.md](simulator.md) with
the real scheduler, controller and mapper on {", ".join(MACHINES)}, each with {results["num_cxl"]} CXL expanders, for
every model preset whose weights fit, at {loads} sequences where the model has so many positions.
No figure was measured on a GPU, and no factor was chosen with the outcome in view.

HybridGen (arXiv 2604.18529) reports {low}x to {high}x on average over six KV cache managers on eleven sizes of OPT,
Llama and Qwen, three GPU platforms and CXL memory. Its cells and batch sizes are not public, nor are all of the six, of
which two are said to be FlexGen and InfiniGen. So the ratios stand beside the paper's, they do not repeat it.

![Simulated ratios beside the paper's]({plot})

## Times as fast, all cells

Tokens a second of the row over those of the column: geometric mean (least to greatest cell).

{ratio_table(results["times_as_fast"]["all"])}

## Times as fast, cells whose KV exceeds the device

{ratio_table(results["times_as_fast_beyond_the_device"])}

{", ".join(losing)} answer differently from exact attention; so do `hybridgen` (top-k, no bound) and `mass`
(bounded). Only `exact`, {", ".join(LOSSLESS)} are the same arithmetic.

## By machine

{machines}
## Assumptions

{chr(10).join(f"- {line}" for line in results["assumptions"])}
- Data sheets and the shares of them that are reached: `configs/machines/*.toml`, a source beside each figure. One GPU
  has a whole socket for itself. The A100's and the 5090's CPUs have no CXL ports: those machines cannot be bought.
- Weights stay on the device in 16 bits. {f"They do not fit: {', '.join(missing)}." if missing else ""}
- Decode only: steps in which every running sequence makes one token. Sequences that do not fit wait.
- Baselines have what their authors describe, perfectly overlapped, without their frameworks' overheads.

## Cells

Tokens a second; "-": one sequence does not fit.

{cell_table(results)}
"""


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Bars of the geometric means, with the paper's range behind them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 4.5), sharey=True)
    parts = {
        "all cells": results["times_as_fast"]["all"],
        "KV exceeds the device": results["times_as_fast_beyond_the_device"],
    }
    for panel, (title, found) in zip(panels, parts.items(), strict=True):
        low, high = PAPER
        panel.axhspan(low, high, color="0.88", label=f"paper, measured: {low}x to {high}x on average")
        panel.axhline(1.0, color="0.4", linewidth=0.8)
        for index, ours in enumerate(OURS):
            places = [place + 0.2 * index for place in range(len(BASELINES))]
            panel.bar(
                places,
                [found[ours].get(name, {}).get("mean", 0.0) for name in BASELINES],
                width=0.19,
                label=ours,
            )
        panel.set_xticks([place + 0.3 for place in range(len(BASELINES))], BASELINES, rotation=20)
        panel.set_yscale("log")
        panel.set_title(title)
    panels[0].set_ylabel("times as fast, simulated")
    panels[1].set_ylim(top=30)  # room for the legend
    panels[1].legend(fontsize="small", loc="upper right")
    figure.suptitle("Simulated: tokens a second over each baseline's, geometric mean over cells")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.headline_simulated", description="Simulated, not measured."
    )
    parser.add_argument("--json", type=Path, default=Path("bench/results/headline_simulated.json"))
    parser.add_argument(
        "--docs",
        type=Path,
        default=Path("docs/simulated-headline.md"),
        help="page to write, with a PNG beside it",
    )
    parser.add_argument("--models", nargs="*", default=preset_names(), help="presets (default: all)")
    options = parser.parse_args()
    results = run(options.models)
    cells = ",\n".join(json.dumps(row) for row in results["cells"])  # a line each: there are many
    rest = json.dumps({name: value for name, value in results.items() if name != "cells"}, indent=1)
    options.json.write_text(f'{rest[:-2]},\n "cells": [\n{cells}\n]\n}}\n')
    plot = options.docs.with_suffix(".png")
    draw(results, plot)
    options.docs.write_text(document(results, plot.name))
    print(ratio_table(results["times_as_fast"]["all"]))


if __name__ == "__main__":
    main()
