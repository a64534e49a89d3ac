"""The walls between the packages, read off the sources."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "engine", "kernels", "scheduler", "configs")
MAY_IMPORT = {
    "server": {"server", "engine", "configs"},
    "engine": {"engine", "scheduler", "kernels", "configs"},
    "kernels": {"kernels", "configs"},
    "scheduler": {"scheduler", "configs"},
    "configs": {"configs"},
}
# What a package must not know, whoever else may.
FORBIDDEN = {
    "scheduler": {"torch", "numpy", "time", "datetime", "asyncio", "fastapi", "starlette", "uvicorn", "zmq"},
    "kernels": {"fastapi", "starlette", "uvicorn", "zmq", "transformers"},
    "engine": {"fastapi", "starlette", "uvicorn"},
    "configs": {"torch", "transformers", "fastapi"},
    "server": {"torch"},
}
# Counters of 100,000 pages are arrays: numbers all the same, and no tensors.
EXCEPT = {("scheduler/mapper.py", "numpy"), ("scheduler/placements.py", "numpy")}
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything a module imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or ""


def test_there_are_modules_to_walk() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        parts = name.split(".")
        assert parts[0] not in PACKAGES, f"{name}: import it as hybridgen.{name}"
        if parts[0] == "hybridgen" and len(parts) > 1:
            assert parts[1] in MAY_IMPORT[package], f"{package} must not import {name}"
        if (path.relative_to(ROOT).as_posix(), parts[0]) not in EXCEPT:
            assert parts[0] not in FORBIDDEN[package], f"{package} must not import {name}"
        assert "torch.distributed" not in name


@pytest.mark.parametrize("package", PACKAGES)
def test_package_modules_hold_a_docstring_and_nothing_else(package: str) -> None:
    body = ast.parse((ROOT / package / "__init__.py").read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)
