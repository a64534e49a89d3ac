# `make serve`, `make test`, `make check`: each sets up .venv first, on a machine with python3.11, venv, g++ and make.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# A build of torch for CPUs alone. Tried where there is no NVIDIA driver, and only if it answers: a
# constraint alone would still take the build that brings CUDA along from the default index.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ARGS ?=

CMAKE ?= $(firstword $(wildcard $(BIN)/cmake) $(shell command -v cmake))
# What the sanitizers are after needs luck: each runs the test again and again for so long.
SANITIZE_SECONDS ?= 10

.PHONY: serve test test-numa test-wheel sanitize check format wheel clean distclean help

help:
	@echo "make serve [ARGS='--port 8001 ...']  serve the embedded model on 127.0.0.1:8000"
	@echo "make test                            the whole suite"
	@echo "make check                           ruff, mypy, pyright"
	@echo "make format                          rewrite the sources as ruff formats them"
	@echo "make sanitize                        the C++ tests of pool and attention under two sanitizers"
	@echo "make test-numa                       memory placement, in a QEMU guest with CPU-less nodes"
	@echo "make test-wheel                      build the wheel, serve from a fresh environment"
	@echo "make wheel                           sdist and wheel in dist/"

serve: $(VENV)/.installed
	$(BIN)/hybridgen serve $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/pytest $(ARGS)

# One build for each: neither works beside the other.
sanitize: CMAKE := $(or $(CMAKE),$(BIN)/cmake)
sanitize: $(if $(CMAKE),,$(VENV)/.installed-dev)
	for sanitizer in thread address,undefined; do \
		build=build/sanitize-$$sanitizer && \
		$(CMAKE) -S . -B $$build -DCMAKE_BUILD_TYPE=None -DHYBRIDGEN_SANITIZE=$$sanitizer && \
		$(CMAKE) --build $$build --target pool_test attend_test --parallel && \
		$$build/pool_test $(SANITIZE_SECONDS) && $$build/attend_test $(SANITIZE_SECONDS) || exit 1; \
	done

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases bench
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-numa: $(VENV)/.installed-dev
	$(BIN)/python tests/numa/boot.py

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build

test-wheel: $(VENV)/.installed-dev
	TORCH_CPU_INDEX="$(TORCH_CPU_INDEX)" scripts/test-wheel $(BIN)/python

# torch first: everything else then finds it installed and never asks an index for it.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	TORCH_CPU_INDEX="$(TORCH_CPU_INDEX)" scripts/install-torch $(BIN)/python
	touch $@

# Where Python's headers are not installed, they are unpacked into the environment (scripts/python-headers).
INSTALL = headers=$$(scripts/python-headers $(BIN)/python $(VENV)/headers) && \
	if [ -n "$$headers" ]; then \
		export CPATH="$$PWD/$${headers%/*}" SKBUILD_CMAKE_ARGS="-DPython_INCLUDE_DIR=$$PWD/$$headers"; \
	fi && \
	$(BIN)/pip install --quiet --constraint constraints.txt

SOURCES := pyproject.toml CMakeLists.txt $(wildcard kernels/csrc/*)

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch $(SOURCES)
	$(INSTALL) -e '.[test,dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf $(VENV)
