# `make demo` and `make test` set up all that they need in .venv.
# TORCH_INDEX=<URL of PyTorch's CPU wheel index> avoids the CUDA build on a Linux machine without a GPU.

PYTHON ?= python3
BIN := .venv/bin
CPU_TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
EXTRA_INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo test test-all test-slow test-faults format benchmark benchmark-kronfluence fidelity groups clean

demo: .venv/demo
	$(BIN)/segflow demo --out demo-output

test: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

# The same with the slow tests: many ranks, kills at random moments, whole grids.
test-all: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-slow: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m slow

# Kills at random moments, hostile stores, a full disk, contention for the lock; the counts are printed. Ten minutes.
test-faults: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests/store/test_faults.py

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: .venv/dev
	$(BIN)/python benchmarks/mlp.py --threads 1,2
	$(BIN)/python benchmarks/ranks.py --processes 1,2

benchmark-kronfluence: .venv/dev benchmarks/.venv-kronfluence/ready
	$(BIN)/python benchmarks/mlp.py --threads 1,2 --kronfluence

# docs/FIDELITY.md from nothing: downloads data, retrains, scores. Hours; goes on where it was stopped.
fidelity: .venv/dev
	$(BIN)/python -m benchmarks.fidelity all

# docs/GROUPS.md likewise; the text row needs `pip install transformers` once.
groups: .venv/dev
	$(BIN)/python -m benchmarks.groups all

clean:
	rm -rf .venv benchmarks/.venv-kronfluence demo-output build dist *.egg-info

# Torch comes first: the CPU build where no GPU is found, so that later requirements are met by it.
.venv/torch:
	$(PYTHON) -c 'import sys; sys.exit("segflow needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	if command -v nvidia-smi >/dev/null 2>&1; then $(PIP) $(CPU_TORCH); else \
	  $(PIP) $(EXTRA_INDEX) $(CPU_TORCH)+cpu 2>/dev/null || $(PIP) $(EXTRA_INDEX) $(CPU_TORCH); fi
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(PIP) --editable '.[demo]'
	touch $@

# The peers that tests compare with are installed without their requirements, which would replace torch.
.venv/dev: .venv/torch pyproject.toml tests/peers.txt
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps --requirement tests/peers.txt
	touch $@ .venv/demo

benchmarks/.venv-kronfluence/ready: .venv/torch
	$(PYTHON) -m venv benchmarks/.venv-kronfluence
	benchmarks/.venv-kronfluence/bin/python -m pip install --quiet $(EXTRA_INDEX) $(CPU_TORCH)
	benchmarks/.venv-kronfluence/bin/python -m pip install --quiet accelerate einops einconv opt-einsum safetensors tqdm
	benchmarks/.venv-kronfluence/bin/python -m pip install --quiet --no-deps kronfluence==1.0.1
	touch $@
