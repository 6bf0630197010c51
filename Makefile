# The commands of this repository. Each makes the .venv that it needs, once, and again when the requirements change.
PYTHON ?= python3
PIP = .venv/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt
RUN = PATH="$(CURDIR)/.venv/bin:$$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-real check docs notebooks format test test-slow test-served bench gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: .venv/ready ## make the .venv with everything for development

.venv/runs: pyproject.toml constraints.txt # enough for the demo
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[plots]'
	touch $@

.venv/ready: .venv/runs
	$(PIP) --editable '.[dev]'
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	touch $@

demo: .venv/runs ## teacher, two students, one table: about four minutes on two cores
	$(RUN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/demo.py

demo-real: .venv/runs ## a real model cut and taught to talk again: about ten minutes on two cores with bfloat16
	$(PIP) gguf
	$(RUN)/python recipes/demo_real.py

check: setup docs ## lint, types, import order, the documentation
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

docs: setup ## the documentation as a site, in build/site: links, references and examples that fail are errors
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

notebooks: setup ## run the notebooks in place: about five minutes on two cores
	$(RUN)/python notebooks/execute.py

format: setup ## mend what ruff can mend
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

test: setup ## the tests, but for the slow ones: under eight minutes on two cores
	$(RUN)/pytest -m "not slow" -n auto --maxprocesses 4 --dist worksteal

test-slow: setup ## ZeRO-3, notebooks, memory, twenty kills: some seven minutes on two cores
	$(RUN)/pytest -m slow -n auto --maxprocesses 4 --dist loadfile

.venv-vllm/ready: tests/served/vllm_env.sh
	PYTHON=$(PYTHON) tests/served/vllm_env.sh .venv-vllm
	touch $@

test-served: setup .venv-vllm/ready ## teachers behind a real vLLM and `transformers serve`, on the CPU
	$(RUN)/pytest tests/served

.venv/bench: .venv/ready
	$(PIP) --editable '.[bench]'
	touch $@

bench: .venv/bench ## the loss and the training step against their floors and their rivals: under five minutes
	$(RUN)/python benchmarks/fused_head.py --short --output runs/bench/fused_head
	$(RUN)/python benchmarks/train_step.py --short --output runs/bench/train_step

gpu: ## on a machine with a GPU, whose own python3 has torch: kernels, device-only paths, speed; under eight minutes
	$(PYTHON) benchmarks/gpu.py $(if $(wildcard runs/wheels),--wheels runs/wheels)

clean: ## remove the .venv and everything that was made
	rm -rf .venv .venv-vllm runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
