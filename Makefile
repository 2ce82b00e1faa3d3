# make demo   install and run the main jobs on the shipped models
# make test   install and run the tests
# make lint   ruff, mypy, import-linter
# make bench  speed and memory against what a user would run otherwise
# make compat every causal-LM family of the installed transformers; writes docs/compatibility.md
# make testbed-vlm  train the shipped vision-language model again (one GPU); testbed/lm/README.md has the other one's way

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= results/demo

# One thread a process: the tests run one process a core, and tiny models gain nothing from threads.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# A machine without an NVIDIA GPU gets the CPU build, which is this exact version.
TORCH := $(if $(shell command -v nvidia-smi),torch,torch==2.13.0)

.PHONY: demo test lint bench compat testbed-vlm clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[eval]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable ".[eval,dev]"
	touch $@

demo: $(VENV)/.installed results/scenes/demo/manifest.json
	OMP_NUM_THREADS=$$(nproc) $(BIN)/attn-hooks run recipes/testbed-lm/demo.yaml --out $(OUT)
	OMP_NUM_THREADS=$$(nproc) $(BIN)/attn-hooks run recipes/testbed-vlm/demo.yaml --out $(OUT)-vlm

results/scenes/demo/manifest.json: $(VENV)/.installed
	rm -rf $(@D)
	$(BIN)/python -m testbed.vlm.scenes --split test --scenes 100 --out $(@D)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto -m "not compat" $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python -m bench.run

compat: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto tests/compat $(ARGS)

testbed-vlm: $(VENV)/.installed
	$(BIN)/python -m testbed.vlm.train --out out/testbed_vlm/run --minutes 8.2 --save-at 0.25,0.5,0.75
	$(BIN)/python -m testbed.vlm.export out/testbed_vlm/run/at_75.safetensors
	cp out/testbed_vlm/run/curve.json models/testbed-vlm/training/run_1.json
	$(BIN)/python -m testbed.vlm.evaluate models/testbed-vlm
	$(BIN)/python -m testbed.vlm.card

clean:
	rm -rf $(VENV) results
