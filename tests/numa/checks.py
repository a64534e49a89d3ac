"""Runs a guest script's checks in order and tells how each went; a check returns its figures as text."""

import sys
import time
import traceback
from collections.abc import Callable, Sequence


def run(checks: Sequence[Callable[[], str]]) -> None:
    """Ends the process: with status 0 if all checks hold."""
    failed = 0
    for check in checks:
        name, begin = check.__name__.replace("_", " "), time.monotonic()
        try:
            figures = check()
        except BaseException:
            failed += 1
            print(f"FAILED  {name}\n{traceback.format_exc()}", flush=True)
        else:
            print(f"ok      {name}: {figures} [{time.monotonic() - begin:.1f} s]", flush=True)
    print(f"guest: {len(checks) - failed} of {len(checks)} checks hold", flush=True)
    sys.exit(1 if failed else 0)
