# The README's commands. `make setup` is implied by the others and does nothing the second time.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PEERS := .venv-peers

.PHONY: setup demo test lint check slow bench demo-assets clean

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

# One thread a process: several processes share the cores, one more than a small machine has, as some tests wait.
test: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 3 --dist worksteal

lint: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

check: lint test

slow: setup
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m "slow and not gpu" -n 2 --dist loadfile --no-loadscope-reorder --durations=40

# The other projects' loaders live in an environment of their own: some of their requirements break ours.
$(PEERS)/.installed: experiments/throughput/peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet "$$(grep '^torch==' experiments/throughput/peers.txt)"
	$(PEERS)/bin/python -m pip install --quiet -r experiments/throughput/peers.txt
	touch $(PEERS)/.installed

bench: setup $(PEERS)/.installed
	$(RUN) -m experiments.throughput --peers $(PEERS)/bin/python --out experiments/throughput

demo-assets: setup
	$(RUN) -m experiments.demo_assets

clean:
	rm -rf $(VENV) $(PEERS) runs multirun .cache
