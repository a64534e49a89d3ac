"""`python -m hybridgen` is the `hybridgen` command."""

from hybridgen.server.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
