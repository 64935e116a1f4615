# The README's commands. `make setup` is implied by the others and does nothing the second time.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint check slow demo-assets clean

setup: $(STAMP)

# torch first and pinned: an unbounded request for it pulls gigabytes of GPU libraries onto a laptop.
$(STAMP): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip -c constraints.txt
	$(RUN) -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(RUN) -m pip install --quiet -e ".[dev,eval]" -c constraints.txt
	touch $(STAMP)

demo: setup
	$(RUN) train.py experiment=sphinxv_stage2

test: setup
	$(RUN) -m pytest

lint: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

check: lint test

slow: setup
	$(RUN) -m pytest -m "slow and not gpu"

demo-assets: setup
	$(RUN) -m experiments.demo_assets

clean:
	rm -rf $(VENV) runs multirun .cache
