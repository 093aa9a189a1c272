# What a user runs: `make demo` to try it, `make test` to check it. Everything happens in .venv.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Files of tests that run at a time. A file's tests stay together, since they share fixtures.
JOBS ?= 2
PARALLEL := $(if $(filter 1,$(JOBS)),,-n $(JOBS) --dist loadfile)

.DEFAULT_GOAL := help
.PHONY: help install demo demo-finetune test test-unit fuzz wheels test-compose test-slurm test-ray check docs format clients protos lock clean

help:  ## Show this list.
	@grep -hE '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z%-]+):.*## /  make \1\t/' | expand -t 22

install: $(STAMP)  ## Make the virtual environment and install what the lock pins.

$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) was not found; install Python 3.11 or say make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m gradstream.core.kernels.preload
	@touch $@

demo: $(STAMP)  ## Train a 10 M parameter GPT on this machine: 1 coordinator, 2 parameter servers, 2 workers.
	$(BIN)/gradstream dev recipes/stdlib-gpt.yaml

demo-finetune: $(STAMP)  ## Teach the demo's model a task with LoRA (trains the model first if it is not there).
	$(BIN)/python examples/statement_kinds.py data/statement-kinds.jsonl
	@ls runs/stdlib-gpt-*/checkpoints/step-*/manifest.json >/dev/null 2>&1 || $(BIN)/gradstream dev recipes/stdlib-gpt.yaml
	$(BIN)/gradstream finetune dev recipes/stdlib-finetune.yaml \
	  -s base_model="$$(ls -t runs/stdlib-gpt-*/checkpoints/step-*/manifest.json | head -1 | xargs dirname)"

test: $(STAMP)  ## Run all tests, two files at a time (JOBS=1: one after the other).
	$(BIN)/python -m pytest $(PARALLEL) --durations 10

test-unit: $(STAMP)  ## Run the unit tests without the sweeps over all model families.
	$(BIN)/python -m pytest $(PARALLEL) --durations 10 -m "not slow" tests/unit

fuzz: $(STAMP)  ## Fuzz the parsers long: EXAMPLES=100000, or TARGET=wire SECONDS=600 by atheris.
ifdef TARGET
	PYTHONPATH=tests $(BIN)/python -m fuzz $(TARGET) $(or $(SECONDS),600)
else
	GRADSTREAM_FUZZ_EXAMPLES=$(or $(EXAMPLES),5000) $(BIN)/python -m pytest tests/fuzz --timeout 0
endif

wheels: $(STAMP)  ## Fill deploy/wheels, so that images are built without a network.
	$(BIN)/python deploy/engine.py deploy/wheels

test-compose: $(STAMP)  ## Test the docker-compose cluster for real (BASE_IMAGE=an image or debian, WHEELS=no: from the index).
	$(BIN)/python deploy/test_compose.py --base-image $(or $(BASE_IMAGE),debian) $(if $(filter no,$(WHEELS)),--no-wheels) $(ARGS)

test-slurm: $(STAMP)  ## Test training as Slurm jobs, on a real Slurm of virtual nodes on this machine.
	$(BIN)/python deploy/test_slurm.py

test-ray: $(STAMP)  ## Test training on a local Ray cluster of several nodes (installs ray into the environment).
	@$(BIN)/python -c "import ray" 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check -c requirements.lock 'ray>=2.50'
	$(BIN)/python deploy/test_ray.py

check: $(STAMP)  ## Lint, types, protos, docs.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(MAKE) --no-print-directory docs

docs: $(STAMP)  ## Build the site of the docs into site/, with the reference that follows from the code.
	@# Without --quiet, which would hide warnings from --strict.
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict

format: $(STAMP)  ## Format the code.
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clients: $(STAMP)  ## Write the blocking clients from the asyncio ones.
	$(BIN)/python client/generate.py

protos: $(STAMP)  ## Generate the stubs from the protos.
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python protos/generate.py

lock:  ## Pin the versions that a fresh resolution of pyproject.toml gives.
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet torch==2.13.0
	.venv-lock/bin/pip install --quiet hatchling '.[dev]'
	{ sed -n '/^#/p' requirements.lock; .venv-lock/bin/pip freeze --exclude gradstream --exclude-editable | grep -v '^gradstream' | sed 's/+cpu//; s/ @ .*//'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock && rm -rf .venv-lock

bench-%: $(STAMP)  ## Run one benchmark, for example `make bench-codecs`.
	$(BIN)/python benchmarks/$*.py

clean:  ## Remove the virtual environment and caches (not data/ and runs/).
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
