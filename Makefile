# The two commands: `make demo` and `make test`. Each makes .venv and installs what it needs, pinned.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/demo
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PINS := requirements.txt constraints.txt pyproject.toml

# Huge pages for XLA's buffers: a quarter less CPU time on Linux (ignored elsewhere).
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: demo test test-all mutate lint clean

demo: $(VENV)/core
	$(BIN)/python -m cde_jax.main --config=configs/demo.py --workdir=$(WORKDIR)

test: $(VENV)/dev lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(VENV)/dev lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or not slow"

# Mutation testing of data, batching, training and models by cosmic-ray: hours for all, minutes for a sample.
mutate: $(VENV)/dev
	$(PIP) "cosmic-ray>=8.4,<9"
	$(BIN)/python tests/mutate.py --sample $(or $(SAMPLE),40)

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python >= 3.11 is needed, $(PYTHON) is %d.%d: call make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)

# Without bytecode, which takes half of the time: what is imported, a small part, is compiled then.
$(VENV)/core: $(PINS) | $(BIN)/python
	$(PIP) --no-compile -e ".[demo]"
	touch $@

$(VENV)/dev: $(VENV)/core
	$(PIP) --no-compile -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
