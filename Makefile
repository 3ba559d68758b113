# Everything from a fresh clone: each target first makes .venv, once, from setup.cfg and constraints.txt.
#
#   make demo                                     a laptop without a GPU: the CPU build of torch
#   make demo                                     a machine with a GPU (nvidia-smi answers): the default CUDA build
#   make demo TORCH=torch==2.11.0 TORCH_INDEX=…   another torch; TORCH_INDEX is handed to pip as it is
#   make demo TORCH=torch VENV_FLAGS=--system-site-packages      the torch that this machine already has

PYTHON      ?= python3
VENV_FLAGS  ?=
TORCH       ?= torch==2.13.0
EXTRAS      ?= train,data,demo,report,dev
TEST_JOBS   ?= 3
KILLS       ?= 20
DEVICE      ?= cuda
ARGS        ?=

CPU_WHEELS  := https://download.pytorch.org/whl/cpu
BIN         := .venv/bin
GPU_TESTS   := tests/contracts tests/golden $(patsubst %,tests/test_%.py,aligned attention blocks budget \
               controls cost decoder devices divprune early evaluate export fastv generate glimpse grpo layers llava \
               lora losses prefix pretrain pyramiddrop qwen3_vl rollout seen steps student tower training types \
               vip visionzip waves windows)
SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo demo-plus test test-gpu test-slurm test-long test-faults bench lint format clean

# glibc gives every large activation back to the kernel and faults it in again; keeping it makes torch on a CPU up to
# ten times faster. Read when a process starts, so it cannot be set from Python.
export MALLOC_MMAP_MAX_       ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 2147483647
export MALLOC_TOP_PAD_        ?= 268435456

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: .venv/.ok ## Make .venv with everything that is needed here

demo: .venv/.ok ## Prepare data, train the glimpse on the shipped tiny model, evaluate: ten minutes on two cores
	$(BIN)/python -m src.demo $(ARGS)

demo-plus: .venv/.ok ## Reinforce the demo's model on a harder task (trains the demo first if it is not there)
	$(BIN)/python -m src.demo plus=true $(ARGS)

test: .venv/.ok ## Run the tests (ARGS="-k decoder" for some of them, TEST_JOBS for processes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist worksteal $(ARGS)

test-gpu: .venv/.ok ## Run what touches models with everything on a GPU (DEVICE=pretend: on a pretended one)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --device $(DEVICE) $(GPU_TESTS) $(ARGS)

test-slurm: .venv/.ok ## Run slurm/ on a throw-away SLURM of two nodes (as root, who may install it from Debian's packages)
	@command -v slurmctld slurmd sbatch munged > /dev/null || { apt-get -qq update; \
	apt-get -qq install -y --no-install-recommends slurm-wlm munge; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slurm tests/slurm $(ARGS)

test-long: .venv/.ok ## Run what takes minutes: every strategy resumed, reinforced and split in several processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m long tests $(ARGS)

test-faults: .venv/.ok ## Kill, interrupt and fill the disk of commands at 20 moments each (KILLS=100 for more): an hour or two
	KILLS=$(KILLS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist loadscope \
	tests/test_faults.py tests/test_any_moment.py $(ARGS)

bench: .venv/.ok ## Times beside Hugging Face's and the machine's bounds: ten minutes on two cores (GPU=1: four on a GPU)
	$(BIN)/python -m benchmarks $(if $(GPU),--gpu) $(ARGS)

lint: .venv/.ok ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.ok ## Repair style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove caches and build leftovers (neither .venv nor runs nor data)
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# torch comes first and alone: only here may another index be asked. On a machine without a GPU that is the index of
# CPU wheels, if it answers; if not, pip takes the torch that its own configuration offers.
.venv/.ok: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV_FLAGS) .venv
ifdef TORCH_INDEX
	$(BIN)/pip install -q "$(TORCH)" $(TORCH_INDEX)
else
	index=(); \
	if ! nvidia-smi > /dev/null 2>&1 \
	&& $(PYTHON) -c 'import urllib.request as u; u.urlopen("$(CPU_WHEELS)/torch/", timeout=5)' > /dev/null 2>&1; \
	then index=(--extra-index-url $(CPU_WHEELS)); fi; \
	$(BIN)/pip install -q "$(TORCH)" "$${index[@]}"
endif
	$(BIN)/pip install -q -e ".[$(EXTRAS)]" -c constraints.txt
	DS_BUILD_OPS=0 $(BIN)/pip install -q -e ".[zero]" -c constraints.txt \
	|| echo "DeepSpeed cannot be installed here: trainer.strategy=zero1 ... zero3 will not work, and their tests are skipped"
	touch $@
