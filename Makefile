# Both targets set themselves up on a machine that has Python 3.11 to 3.13 and nothing else.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

SEARCH_NAME ?= digits-$(shell date +%Y%m%d-%H%M%S)

.PHONY: search test faults bench

# A real search on scikit-learn's handwritten digits, its best configuration retrained, a report.
search: $(INSTALLED)
	$(BIN)/python search/tune.py --model resnet18 --dataset digits --width 16 --epochs 30 --num-samples 32 \
		--val-fraction 0.2 --name $(SEARCH_NAME)
	$(BIN)/python byot/train.py --best $(SEARCH_NAME)
	$(BIN)/python analysis/best.py $(SEARCH_NAME)
	$(BIN)/python analysis/report.py $(SEARCH_NAME)

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# The fault tests of `make test` many times over: kills, full disks, lost nodes, damaged files.
faults: $(INSTALLED)
	BYOT_FAULTS=long $(BIN)/python -m pytest tests/faults

# Training speed and memory against a plain loop that works as the reference does, in turns; on what is here.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/train_speed.py --output outputs/benchmarks/train-speed.json

$(INSTALLED): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@
