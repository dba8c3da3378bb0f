# Thin front of the repository: everything real is CMakePresets.json, pyproject.toml and tools/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules

BUILD := build/dev
JOBS ?= $(shell nproc)
VENV := $(CURDIR)/.venv/bin
# The package of the build tree; nothing is installed.
ENV := PATH="$(VENV):$(CURDIR)/$(BUILD)/bin:$$PATH" PYTHONPATH="$(CURDIR)/$(BUILD)/python"

.PHONY: help deps build demo test bench bench-gpu lint sanitize wheel clean

help:
	@echo "make deps      packages and .venv (asked for by the targets below)"
	@echo "make build     C++ and the Python package, into $(BUILD)"
	@echo "make demo      reinforcement learning with refits, kills and a control run, on this machine"
	@echo "make test      every C++ and Python test; ends with one summary line"
	@echo "make bench     measure, into bench/results/"
	@echo "make bench-gpu the same on the GPUs of this machine, into bench/results/"
	@echo "make lint      formatting, clang-tidy, thread safety, ruff, mypy, rules of the house"
	@echo "make sanitize  the tests under ASan + UBSan, and under TSan without gRPC"
	@echo "make wheel     a wheel, into build/wheel"
	@echo "make clean     remove build/ (the .venv stays)"

deps:
	@tools/deps.sh

$(BUILD)/build.ninja: | deps
	@cmake --preset dev -DTRANSFUSE_PYTHON=ON -DPython_EXECUTABLE="$(VENV)/python"

build: deps $(BUILD)/build.ninja
	@cmake --build $(BUILD) --parallel $(JOBS)

demo: build
	@$(ENV) transfuse demo $(ARGS)

test: build
	@$(ENV) python tools/test.py --build $(BUILD) --jobs $(JOBS)

bench: build
	@$(ENV) python bench/run.py --build $(BUILD) $(ARGS)

bench-gpu: build
	@$(ENV) TRANSFUSE_GPU_JSON=$(BUILD)/gpu_copies.json transfuse_gpu_bench
	@$(ENV) python bench/gpu/refit.py --json bench/results/gpu_refit.json $(ARGS)

lint: deps
	@$(ENV) tools/lint.sh

sanitize: deps
	@for preset in asan tsan; do \
	  cmake --preset $$preset && cmake --build --preset $$preset --parallel $(JOBS); \
	  $(ENV) python tools/test.py --build build/$$preset --jobs $(JOBS) --no-python; \
	done

wheel: deps
	@$(VENV)/python -m pip wheel --quiet --no-deps --no-build-isolation -w build/wheel .

clean:
	@rm -rf build
