"""How the feedback controller steers simulated processors: `python -m bench.controller`.

The processors are those of `bench/plant.py`, made of what the controller does not know. Nothing is timed.
"""

import argparse
import json
import statistics
from pathlib import Path

from bench.plant import FOURFOLD, balanced, compare, draw, is_between, settle, turns


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=400)
    parser.add_argument("--changes", type=int, default=40, help="seeds for each fourfold change")
    parser.add_argument("--json", type=Path, default=Path("bench/results/controller_simulated.json"))
    options = parser.parse_args()
    settled = {}
    for name, change in FOURFOLD.items():
        settled[name] = sorted(settle(balanced(seed), change) for seed in range(options.changes))
        near = sum(steps <= 20 for steps in settled[name])
        print(
            f"{name:16s} steps: median {statistics.median(settled[name])}, most {settled[name][-1]}; "
            f"{near} of {options.changes} within 20"
        )
    loads = []
    for seed in range(options.seeds):
        between = is_between(draw(seed))
        decisions, ratio = compare(draw(seed))
        loads.append({"seed": seed, "between": between, "ratio": round(ratio, 4), "turns": turns(decisions)})
    for count in sorted({50, options.seeds}):
        ratios = sorted(load["ratio"] for load in loads[:count])
        inside = sum(load["between"] for load in loads[:count])
        near = sum(ratio <= 1.05 for ratio in ratios)
        most_turns = max(load["turns"] for load in loads[:count])
        print(
            f"{count} workloads, {inside} with the best split between the bounds: median "
            f"{statistics.median(ratios):.3f} of the best fixed split's time, {near} within 5 %, "
            f"worst {ratios[-1]:.3f}; at most {most_turns} turns"
        )
    if options.json is not None:
        found = {
            "title": "simulated: the feedback controller against the best fixed split",
            "command": f"python -m bench.controller --seeds {options.seeds} --changes {options.changes}",
            "steps_to_settle": settled,
            "loads": loads,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
