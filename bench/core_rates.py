"""How fast one core attends to keys and values in its cache: `python -m bench.core_rates`.

For `core_gflops` and `core_fixed_share` of machines that are described, not measured (configs/machines/): the best of
several rounds, for each instruction set of this CPU, in Gflop/s; multiply-adds with keys and values count two.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hybridgen.engine.this_machine import core_rate, cpu_name, fixed_share
from hybridgen.kernels.isa import supported_isas

GROUPS = (1, 2, 4, 8, 16)
HEAD_DIMS = (64, 128)
SLOW = ("scalar", "amx_model")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.core_rates", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to keep the results")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{cpu_name()}\n\n| instructions | head dim | " + " | ".join(map(str, GROUPS)) + " | fixed share |")
    print("|---|--:|" + "--:|" * (len(GROUPS) + 1))
    for isa in supported_isas():
        if isa in SLOW:
            continue
        for head_dim in HEAD_DIMS:
            rates = [
                max(core_rate(isa, head_dim, group, 0.05) for _ in range(options.rounds)) for group in GROUPS
            ]
            share = fixed_share(rates[0], rates[2], rates[3])
            gflops = [round(rate / 1e9, 1) for rate in rates]
            rows.append({"isa": isa, "head_dim": head_dim, "gflops": gflops, "fixed_share": round(share, 2)})
            print(f"| {isa} | {head_dim} | " + " | ".join(map(str, gflops)) + f" | {share:.2f} |")
    if options.json is not None:
        about = {"command": "python -m bench.core_rates", "cpu": cpu_name(), "groups": GROUPS}
        ended = datetime.now(UTC).isoformat(timespec="seconds")
        options.json.write_text(json.dumps({**about, "ended": ended, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
