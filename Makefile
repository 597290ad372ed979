# make demo · make test · make check · make bench · make stop · make clean: each sets up what it needs by itself.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STORAGE := $(CURDIR)/runs/demo
LOCK := requirements/$(if $(shell command -v nvidia-smi),gpu,cpu).lock
TORCH := $(shell sed -n 's/^torch==//p' $(LOCK))
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps
TESTS ?=

.PHONY: setup demo test test-long test-fast check bench stop clean lock
.DELETE_ON_ERROR:

setup: .venv/ready

# The CPU build of torch is on PyTorch's own index only. Where pip finds none, PyPI's CUDA build serves as well (3 GB more).
.venv/ready: $(LOCK) requirements/quantization.lock requirements/autoawq.lock requirements/float8.lock pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "error: Python 3.11 is needed; make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing $$(grep -c == $(LOCK)) pinned packages from $(LOCK) into .venv (about 3 GB, some minutes) …"
	@if [ $(LOCK) = requirements/cpu.lock ]; then \
	  $(PIP) torch==$(TORCH)+cpu 2>/dev/null || { \
	    echo "No CPU build of torch $(TORCH) in your package index: installing the CUDA build, which runs on the CPU too."; \
	    $(BIN)/python -m pip install -qq -c requirements/gpu.lock torch==$(TORCH); }; fi
	@$(PIP) -r $(LOCK)
	@echo "Installing llm-compressor beside them, which needs another compressed-tensors than vLLM, AutoAWQ and torchao …"
	@rm -rf .venv/overlays
	@for name in quantization autoawq float8; do \
	  $(PIP) --no-build-isolation --target .venv/overlays/$$name -r requirements/$$name.lock || exit 1; done
	@$(PIP) --no-build-isolation -e .
	@touch $@

demo: setup
	@$(BIN)/python jobs/fetch_demo_corpus.py --storage_uri $(STORAGE)
	@$(BIN)/python jobs/start_cluster.py
	@source .cluster/env && url=$${OPENAI_BASE_URL%/v1} && $(BIN)/ray job submit --working-dir . -- \
	  python jobs/run_pipeline.py --config jobs/configs/demo/run_pipeline.yaml --storage_uri $(STORAGE) \
	  --deploy_model.port $${url##*:}
	@source .cluster/env && $(BIN)/python jobs/ask_model.py
	@cat $(STORAGE)/summary.txt
	@source .cluster/env && printf '%s\n' \
	  "Ray dashboard    $$RAY_DASHBOARD_ADDRESS   (asks for the token in .cluster/token)" \
	  "OpenAI endpoint  $$OPENAI_BASE_URL   (key in .cluster/api_key)" \
	  "Report           $(STORAGE)/report.html" \
	  "Ask again        source .cluster/env; $(BIN)/python jobs/ask_model.py --question '你好'" \
	  "Stop             make stop"

test: setup
	@$(BIN)/python -m pytest -m "not long" $(TESTS)

test-long: setup
	@$(BIN)/python -m pytest -m long $(TESTS)

test-fast: setup
	@$(BIN)/python -m pytest -m "not ray and not slow and not gpu" $(TESTS)

check: setup
	@$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/mypy

bench: setup
	@$(BIN)/python jobs/fetch_demo_corpus.py --storage_uri $(STORAGE)
	@for benchmark in benchmarks/*.py; do echo "== $$benchmark"; $(BIN)/python $$benchmark || exit 1; done

stop:
	@if [ -x $(BIN)/python ]; then $(BIN)/python jobs/stop_cluster.py; fi

clean: stop
	rm -rf .venv .cluster runs

# New pins; needs uv on the PATH. The overlay keeps only what differs from the main lock.
UV := uv pip compile -q --no-header --no-annotate --python-version 3.11 --python-platform x86_64-unknown-linux-gnu
lock:
	cd requirements && $(UV) --override cpu.overrides cpu.in dev.in -o cpu.lock
	cd requirements && $(UV) gpu.in dev.in -o gpu.lock
	cd requirements && $(UV) --override cpu.overrides -c <(grep -v compressed-tensors cpu.lock) quantization.in \
	  | grep -vxFf cpu.lock > quantization.lock
