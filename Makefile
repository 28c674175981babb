# Each target sets up what it needs in .venv; the stamps there make the second time quick.

PYTHON ?= python3
CONFIG ?= config/model_config.yaml
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
CSRC := $(shell find src/amalgam/*/csrc -name '*.h' -o -name '*.cpp')
LOG := $(VENV)/setup.log
# One more than there are cores: a third of the tests' time is spent waiting for servers and browsers.
PROCESSES := $(shell $(PYTHON) -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')
RELEASE := build/release
MANIFESTS := build/manifests
SANITIZED := build/sanitize/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help setup serve test cluster check sanitize bench format clean docs manifests wheel try lowest

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## install into .venv and build the native kernels

serve: $(INSTALLED) ## serve the demo model (CONFIG=FILE for another one, ARGS="--port 9000" for flags)
	$(BIN)/python main.py --config $(CONFIG) $(ARGS)

# With bytecode kept: to rewrite the assertions of all files takes longer than to collect them.
test: $(INSTALLED_DEV) ## run the tests in up to four processes (ARGS="-k name" for some, "-n 0 --pdb" to look into one)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

# The extra alone: to install the project with it would compile the kernels once more.
cluster: $(INSTALLED_DEV) ## the tests of several replicas, with Ray, which is put into .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q "$$($(BIN)/python -c \
	  'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["ray"])')"
	$(BIN)/python -m pytest -n 0 tests/cluster $(ARGS)

check: $(INSTALLED_DEV) ## formatting, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

# In an environment of its own. The second library is there because the first one looks for its functions in it. The
# tests of the kernels go through all instruction sets themselves.
sanitize: ## the tests that run the kernels, under AddressSanitizer
	$(PYTHON) -m venv build/sanitize
	SKBUILD_CMAKE_ARGS=-DAMALGAM_SANITIZE=ON $(SANITIZED) -m pip install -q -r requirements-dev.txt
	export LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0; \
	$(SANITIZED) -m pytest -q -n $(PROCESSES) tests/kernels || exit 1; \
	for isa in $$($(SANITIZED) -c "from amalgam import _native; print(*_native.supported_isas())"); do \
	  AMALGAM_NATIVE_ISA=$$isa $(SANITIZED) -m pytest -q -n $(PROCESSES) tests/models/program \
	  tests/composition/packed_cache tests/composition/test_composition.py tests/engine/test_sampler.py || exit 1; \
	done

bench: $(INSTALLED) ## load time, memory and tokens/s of the demo model; planning and loading at scale
	$(BIN)/amalgam bench --config $(CONFIG) $(ARGS)
	$(BIN)/python benchmarks/scale.py

docs: $(INSTALLED_DEV) ## the documentation as a site, checked: build/site/index.html
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-docs.txt
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

manifests: $(MANIFESTS)/.installed ## Dockerfile, compose, Kubernetes and Prometheus files, by the tools that read them
	$(MANIFESTS)/bin/python release/manifests.py $(ARGS)

wheel: $(RELEASE)/.installed ## source archive and wheels into dist/ (ARGS=--aarch64 for ARM too, with a cross compiler)
	$(RELEASE)/bin/python release/wheels.py $(ARGS)

try: $(RELEASE)/.installed ## install dist/'s wheel where there is no compiler, and run the README's commands
	$(RELEASE)/bin/python release/try_wheel.py $(ARGS)

lowest: $(RELEASE)/.installed ## the same with the lowest versions that pyproject.toml allows
	$(RELEASE)/bin/python release/try_wheel.py --lowest $(ARGS)

format: $(INSTALLED_DEV) ## format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CSRC)

clean: ## remove .venv, caches, build output and the demo model's derived checkpoints
	rm -rf $(VENV) build dist .import_linter_cache .mypy_cache .pytest_cache .ruff_cache models/demo-*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip shows nothing of what it compiles, unless it shows all: what it says goes to a file, and the steps to the screen.
# It compiles the Python that it copies, but not what an editable install leaves in place.
define install
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing what is needed into $(VENV): 0.3 GB to download and 1.3 GB on the disk with the CPU build of PyTorch, several GB with CUDA."
	@grep -hv '^-' $(1) > $(VENV)/packages.txt
	$(BIN)/python -m pip install --disable-pip-version-check -r $(VENV)/packages.txt
	@echo "Compiling the native kernels: 2 to 5 minutes on two free cores. Everything it says: $(LOG)"
	@: > $(LOG); tail -f -n +1 --pid=$$$$ $(LOG) | sed -nu 's|^ *\(\[[0-9]*/[0-9]*\]\).* -c .*/\([^/ ]*\)$$|\1 \2|p' & \
	  $(BIN)/python -m pip install --disable-pip-version-check -v --no-deps -e . > $(LOG) 2>&1 || \
	  { tail -n 40 $(LOG); echo "The installation has failed."; exit 1; }
	@$(BIN)/python -m compileall -q src
	@$(BIN)/python -c 'from amalgam.kernels.backends.cpu import extension as e; print(e.why_unavailable() or f"Native kernels: {e.isa()}")'
endef

$(RELEASE)/.installed: release/requirements.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --disable-pip-version-check -q -r release/requirements.txt
	@touch $@

$(MANIFESTS)/.installed: release/requirements-manifests.txt
	$(PYTHON) -m venv $(MANIFESTS)
	$(MANIFESTS)/bin/python -m pip install --disable-pip-version-check -q -r release/requirements-manifests.txt
	@touch $@

$(INSTALLED): requirements.txt pyproject.toml CMakeLists.txt $(CSRC)
	$(call install,requirements.txt)
	@touch $@

$(INSTALLED_DEV): requirements-dev.txt requirements.txt pyproject.toml CMakeLists.txt $(CSRC)
	$(call install,requirements.txt requirements-dev.txt)
	@touch $(INSTALLED) $@
