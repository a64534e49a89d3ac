"""`hybridgen plan`: what a machine would do with a model and a load. Asks engine/planning.py; prints, draws."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hybridgen.configs.settings import parse_count
from hybridgen.engine.planning import OURS, SYSTEMS, CannotPlan, Plan, Planner, PlanRequest, PlanRow, sweep

SWEEP_CONTEXTS = (8192, 16384, 32768, 65536, 131072)
SWEEP_CXL = (0, 1, 4, 8)
BAR_WIDTH = 40  # characters of the longest bar


def parse_contexts(text: str) -> tuple[int, ...]:
    """Comma-separated lengths; "4 * 8k" counts a length four times: "3*8k,32k" draws 8,000 in three of four cases.

    Raises:
        ValueError: a length is no number, or not positive.
    """
    contexts: list[int] = []
    for part in text.split(","):
        count, _, length = part.rpartition("*")
        number, times = parse_count(length), parse_count(count or "1")
        if not isinstance(number, int) or not isinstance(times, int) or number < 1 or times < 1:
            raise ValueError(f"contexts are lengths like 32k or 3*8k,32k, got {text!r}")
        contexts += [number] * times
    return tuple(contexts)


def parse_policies(text: str) -> tuple[str, ...]:
    """Comma-separated names; "all" is everything that is modelled, "ours" what `--host-attention` can choose.

    Raises:
        ValueError: a name is unknown.
    """
    if text == "all":
        return SYSTEMS
    if text == "ours":
        return tuple(str(system) for system in OURS)
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in SYSTEMS:
            raise ValueError(f"no policy {name!r}; known are all, ours, {', '.join(SYSTEMS)}")
    return names


def plan(request: PlanRequest, *, as_json: bool, with_sweep: bool, plot: Path | None) -> int:
    """Print a plan, or one for every context and number of expanders. Returns the exit status.

    Args:
        plot: where to write the sweep as PNG; None: nowhere.
    """
    console = Console(soft_wrap=as_json)
    try:
        if plot is not None:
            _pyplot()  # before the work, not after it
        planner = Planner(request.model, request.machine)
        if not with_sweep:
            made = planner.plan(request)
            if as_json:
                print(json.dumps(dataclasses.asdict(made), indent=1))
            else:
                print_plan(console, made)
            return 0
        contexts = request.contexts if len(request.contexts) > 1 else SWEEP_CONTEXTS
        cxl = SWEEP_CXL if planner.takes_cxl else (0,)
        plans = sweep(planner, request, contexts, cxl)
    except CannotPlan as error:
        print(f"hybridgen plan: error: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(_sweep_json(plans), indent=1))
    else:
        print_sweep(console, plans, request.systems)
    if plot is not None:
        draw_sweep(plans, request.systems, plot)
        if not as_json:
            console.print(f"plot: {plot}")
    return 0


def print_plan(console: Console, made: Plan) -> None:
    load = f"{made.concurrency} at a time" if made.concurrency else f"{made.rate:g} a second"
    lengths = ", ".join(f"{length:,}" for length in sorted(set(made.contexts)))
    console.print(f"[bold]{made.model}[/] on [bold]{made.machine}[/] ({made.source})")
    console.print(
        f"weights {_gib(made.weights_bytes)}, KV {made.kv_token_bytes / 1024:.1f} KiB a token; "
        f"contexts of {lengths} tokens, {load}"
    )
    table = Table(title="Simulated, not measured")
    for name in (
        "policy",
        "step p50, ms",
        "p99",
        "tokens/s",
        "first token, s",
        "run",
        "fit",
        "on device",
        "limit",
        "answers",
    ):
        table.add_column(name, justify="left" if name in ("policy", "limit", "answers") else "right")
    for row in made.rows:
        if row.refused:
            table.add_row(row.system, *[""] * 7, "does not fit", row.loses or "exact")
            continue
        table.add_row(
            row.system, f"{row.step_p50_ms:.2f}", f"{row.step_p99_ms:.2f}", f"{row.tokens_per_s:.1f}",
            f"{row.ttft_p50_s:.2f}", f"{row.num_running:.1f}", str(row.num_fitting), f"{row.device_share:.0%}",
            row.limit, row.loses or "exact",
        )  # fmt: skip
    console.print(table)
    for refused in sorted({row.refused for row in made.rows if row.refused}):
        console.print(f"does not fit: {refused}")
    console.print(_places(made.rows))
    for line in made.assumptions:
        console.print(f"- {line}")


def _places(rows: Sequence[PlanRow]) -> Table:
    """Where KV lies and who waits."""
    table = Table(title="Where KV lies, and idle shares")
    table.add_column("policy")
    table.add_column("device", justify="right")
    table.add_column("host nodes: roles")
    table.add_column("idle")
    for row in rows:
        if row.refused:
            continue
        nodes = [
            f"{node}: " + ", ".join(f"{role} {_gib(size)}" for role, size in roles.items() if size)
            for node, roles in (row.node_role_bytes or {}).items()
            if any(roles.values())
        ]
        idle = ", ".join(
            f"{name} {share:.0%}" for name, share in (row.idle or {}).items() if name != "fixed times"
        )
        table.add_row(row.system, _gib(row.device_kv_bytes), "; ".join(nodes), idle)
    return table


def print_sweep(
    console: Console, plans: Mapping[tuple[int, int], Plan | CannotPlan], systems: Sequence[str]
) -> None:
    """Bars of tokens a second: a block for each context and number of expanders, a bar for each policy."""
    best = max((row.tokens_per_s for plan in plans.values() for row in _rows(plan)), default=0.0) or 1.0
    console.print("[bold]Simulated, not measured:[/] tokens a second")
    for (context, num_cxl), made in plans.items():
        console.print(f"\n{context:,} tokens, {num_cxl} x CXL")
        if isinstance(made, CannotPlan):
            console.print(f"  {made}")
            continue
        for row in made.rows:
            bar = "█" * round(BAR_WIDTH * row.tokens_per_s / best)
            text = "does not fit" if row.refused else f"{row.tokens_per_s:.1f}  ({row.limit})"
            console.print(f"  {row.system:20} {bar or '▏'} {text}", highlight=False)


def draw_sweep(
    plans: Mapping[tuple[int, int], Plan | CannotPlan], systems: Sequence[str], path: Path
) -> None:
    """Tokens a second over contexts, a panel for each number of expanders.

    Raises:
        CannotPlan: matplotlib is not there.
    """
    pyplot = _pyplot()
    counts = sorted({num_cxl for _, num_cxl in plans})
    figure, panels = pyplot.subplots(
        1, len(counts), figsize=(4.5 * len(counts), 4), sharey=True, squeeze=False
    )
    for panel, num_cxl in zip(panels[0], counts, strict=True):
        for system in systems:
            points = [
                (context, row.tokens_per_s)
                for (context, count), made in plans.items()
                for row in _rows(made)
                if count == num_cxl and row.system == system and not row.refused
            ]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", label=system)
        panel.set_title(f"{num_cxl} x CXL")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("context, tokens")
    panels[0][0].set_ylabel("tokens a second")
    panels[0][-1].legend(fontsize="small")
    first = next((made for made in plans.values() if isinstance(made, Plan)), None)
    figure.suptitle(f"Simulated: {first.model}, {first.machine.split(', ')[0]}" if first else "Simulated")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        importlib.import_module("matplotlib").use("Agg")  # no display
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise CannotPlan("plots need matplotlib: pip install 'hybridgen[plot]'") from error


def _rows(made: Plan | CannotPlan) -> tuple[PlanRow, ...]:
    return () if isinstance(made, CannotPlan) else made.rows


def _sweep_json(plans: Mapping[tuple[int, int], Plan | CannotPlan]) -> list[dict[str, Any]]:
    return [
        {"context": context, "num_cxl": num_cxl}
        | ({"error": str(made)} if isinstance(made, CannotPlan) else dataclasses.asdict(made))
        for (context, num_cxl), made in plans.items()
    ]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
