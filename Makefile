# The targets set themselves up on a machine that has Python 3.11 to 3.13 and nothing else.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

ifndef SEARCH_NAME
SEARCH_NAME := digits-$(shell date +%Y%m%d-%H%M%S)
endif

.PHONY: search test lint quick-tests test-all faults bench bench-gpu

# A real search on scikit-learn's handwritten digits with its race, the best configuration retrained, its exits, a report.
search: $(INSTALLED)
	$(BIN)/python search/tune.py --model resnet18 --dataset digits --width 4 --epochs 6 --batch-size 32 --num-samples 16 --confirm 2 \
		--val-fraction 0.2 --name $(SEARCH_NAME)
	$(BIN)/python byot/train.py --best $(SEARCH_NAME) --val-fraction 0.2 --name $(SEARCH_NAME)
	$(BIN)/python byot/evaluate.py $(SEARCH_NAME) --exits
	$(BIN)/python analysis/report.py $(SEARCH_NAME)

# Lint and types beside the quick tests: each takes a core.
test: $(INSTALLED)
	$(MAKE) --jobs 2 lint quick-tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

quick-tests: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" --durations 15

# The slow tests too: whole searches, several processes, and each fault a few times.
test-all: test
	$(BIN)/python -m pytest -m slow --durations 15

# Each fault many times over: kills, full disks, lost nodes, damaged files.
faults: $(INSTALLED)
	BYOT_FAULTS=long $(BIN)/python -m pytest tests/faults

# Speed on what is here: training against a plain loop that works as the reference does, in turns; the overhead of a
# search; trials at once. DATA_DIR names CIFAR-100's parquet files; without it images are random. About 20 minutes on 2 cores.
DATA_DIR ?=
CIFAR := $(if $(DATA_DIR),--data-dir $(DATA_DIR))
RECORDS ?= outputs/benchmarks
TRAIN_SPEED = $(BIN)/python benchmarks/speed/train_speed.py $(CIFAR)
SEARCHES = $(BIN)/python benchmarks/speed/searches.py

bench: $(INSTALLED)
	$(TRAIN_SPEED) --models resnet18 --widths 16 --steps 10 --output $(RECORDS)/r18-w16-1-thread.json
	$(TRAIN_SPEED) --models resnet18 --widths 64 --steps 3 --output $(RECORDS)/r18-w64-1-thread.json
	$(TRAIN_SPEED) --models resnet18 --widths 64 --steps 3 --threads 2 --output $(RECORDS)/r18-w64-2-threads.json
	$(TRAIN_SPEED) --models resnet50 --widths 64 --output $(RECORDS)/r50-w64-1-thread.json
	$(SEARCHES) overhead --output $(RECORDS)/search-overhead.json
	$(SEARCHES) at-once --output $(RECORDS)/concurrent-trials.json

# The same on one CUDA GPU, after a check that it computes what the CPU does. A record that is there is not made again.
GPU := results/benchmarks/gpu
GPU_SPEED = $(TRAIN_SPEED) --steps 100 --seconds 15 --threads 8 --workers 8 --output $@

bench-gpu: $(INSTALLED)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA GPU here"; exit 2; }
	@test -n "$(DATA_DIR)" || { echo "DATA_DIR must name CIFAR-100's folder"; exit 2; }
	$(BIN)/python -m pytest tests/test_step.py
	$(MAKE) --keep-going $(foreach name,r18-graph r50-graph r18-compile r18-eager concurrent-trials,$(GPU)/$(name).json)

$(GPU)/r18-graph.json:
	$(GPU_SPEED) --models resnet18 --widths 64 16 --acceleration graph
$(GPU)/r50-graph.json:
	$(GPU_SPEED) --models resnet50 --widths 64 --acceleration graph
$(GPU)/r18-compile.json:
	$(GPU_SPEED) --models resnet18 --widths 64 --acceleration compile
$(GPU)/r18-eager.json:
	$(GPU_SPEED) --models resnet18 --widths 64 --acceleration none
$(GPU)/concurrent-trials.json:
	$(SEARCHES) at-once --most 6 --output $@

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@
