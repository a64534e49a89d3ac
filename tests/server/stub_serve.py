"""`hybridgen serve` with the stub engine: the same arguments, the real server process around it."""

import sys
from pathlib import Path

# The server has no use for torch, which transformers would import with seconds of CPU time for each test.
sys.modules["torch"] = None  # type: ignore[assignment]

from hybridgen.server import cli, serve  # noqa: E402

STUB = Path(__file__).parent.parent / "engine" / "stub_engine.py"

if __name__ == "__main__":
    serve.serve.__kwdefaults__["engine_command"] = (sys.executable, "-P", str(STUB))
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
