# Two commands do everything, on a machine with nothing but Python 3.11 or newer:
#   make demo    sets up, trains stage 1 and stage 2 on the embedded sample, describes images it never saw
#   make test    sets up, lints, runs the default test suite
# PYTHON=python3.12 picks another interpreter for a VENV that is new, VENV=DIR another place for what is installed.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# CI adds to this set-up; the stamps below are newer than what they were made from, so a second call is quick.
SET_UP := $(VENV)/.set-up
SET_UP_DEV := $(VENV)/.set-up-dev

# A half-written file must not count as made
.DELETE_ON_ERROR:
.PHONY: demo test slow faults lint clean

demo: $(SET_UP)
	$(PY) -m mmrstraj_jax.train --config stage1
	$(PY) -m mmrstraj_jax.train --config stage2 --init-from runs/stage1 --steps 130
	$(PY) -m mmrstraj_jax.generate --run runs/stage2 --held-out 2
	@echo "The trained run lies in $(CURDIR)/runs/stage2"

test: lint
	$(PY) -m pytest -q -n $(WORKERS)

slow: $(SET_UP_DEV)
	$(PY) -m pytest -q -m slow

# One at a time: the faults of two tests must not meet
faults: $(SET_UP_DEV)
	$(PY) -m pytest -q -m 'faults and not slow' --durations=10

lint: $(SET_UP_DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# The pins of pyproject.toml ([tool.uv]) as a pip constraints file: pip alone is enough.
$(VENV)/constraints.txt: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name it: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["tool"]["uv"]["constraint-dependencies"], sep="\n")' > $@

$(SET_UP): $(VENV)/constraints.txt
	@echo "Installing into $(VENV): a few minutes, once"
	$(PIP) --constraint $< --editable .
	@touch $@

$(SET_UP_DEV): $(VENV)/constraints.txt
	@echo "Installing into $(VENV): a few minutes, once"
	$(PIP) --constraint $< --editable '.[dev]'
	@touch $(SET_UP) $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
