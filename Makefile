# Both targets set themselves up on a machine that has Python 3.11 to 3.13 and nothing else.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

SEARCH_NAME ?= digits-$(shell date +%Y%m%d-%H%M%S)

.PHONY: search test faults bench bench-gpu

# A real search on scikit-learn's handwritten digits, its best configuration retrained, a report.
search: $(INSTALLED)
	$(BIN)/python search/tune.py --model resnet18 --dataset digits --width 16 --epochs 30 --num-samples 20 \
		--val-fraction 0.2 --name $(SEARCH_NAME)
	$(BIN)/python byot/train.py --best $(SEARCH_NAME)
	$(BIN)/python analysis/best.py $(SEARCH_NAME)
	$(BIN)/python analysis/report.py $(SEARCH_NAME)

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --durations 15

# The fault tests of `make test` many times over: kills, full disks, lost nodes, damaged files.
faults: $(INSTALLED)
	BYOT_FAULTS=long $(BIN)/python -m pytest tests/faults

# Speed on what is here: training against a plain loop that works as the reference does, in turns; the overhead of a
# search; trials at once. DATA_DIR names CIFAR-100's parquet files; without it images are random. About 20 minutes on 2 cores.
DATA_DIR ?=
CIFAR := $(if $(DATA_DIR),--data-dir $(DATA_DIR))
RECORDS ?= outputs/benchmarks
TRAIN_SPEED = $(BIN)/python benchmarks/speed/train_speed.py $(CIFAR)

bench: $(INSTALLED)
	$(TRAIN_SPEED) --models resnet18 --widths 16 --steps 10 --output $(RECORDS)/r18-w16-1-thread.json
	$(TRAIN_SPEED) --models resnet18 --widths 64 --steps 3 --output $(RECORDS)/r18-w64-1-thread.json
	$(TRAIN_SPEED) --models resnet18 --widths 64 --steps 3 --threads 2 --output $(RECORDS)/r18-w64-2-threads.json
	$(TRAIN_SPEED) --models resnet50 --widths 64 --output $(RECORDS)/r50-w64-1-thread.json
	$(BIN)/python benchmarks/speed/search_overhead.py --output $(RECORDS)/search-overhead.json
	$(BIN)/python benchmarks/speed/concurrent_trials.py --output $(RECORDS)/concurrent-trials.json

# The same on one CUDA GPU, after a check that it computes what the CPU does; records are kept in results/benchmarks/gpu.
bench-gpu: $(INSTALLED)
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no CUDA GPU here"; exit 2; }
	@test -n "$(DATA_DIR)" || { echo "DATA_DIR must name CIFAR-100's folder"; exit 2; }
	$(BIN)/python benchmarks/tables.py speed $(CIFAR)

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@
