# make setup | train | test | bench | clean
# PYTHON=... the interpreter to make .venv with; LOCK=cpu|gpu the lock file, in place of what the machine has.
PYTHON ?= python3.11 python3.12 python3.13 python3
export LOCK

.PHONY: setup train test bench clean

setup:
	@for python in $(PYTHON); do \
		$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
			&& exec $$python tools/setup_env.py; \
	done; \
	echo 'make setup: none of "$(PYTHON)" is Python 3.11 or newer with venv; name one with PYTHON=' >&2; \
	exit 1

train: setup
	.venv/bin/r1 run recipes/toy.toml

test: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile

bench: setup
	mkdir -p benchmarks/results
	.venv/bin/python -m benchmarks.run --suite cpu --json benchmarks/results/cpu.jsonl

clean:
	rm -rf .venv build dist *.egg-info r1kernels/_C*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
