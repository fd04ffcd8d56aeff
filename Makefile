# make demo and make test do everything from a bare clone; the .venv is made once and again when its inputs change.
# Tests run in four processes, for a third of what they do is waiting; one has all those of Ray (tests/conftest.py).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TOOLS := .venv/.tools

# Bytecode is kept whatever the environment says: tests are rewritten as they are imported, ten seconds a process.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test pytest check format docs tinyworld clean

demo: $(READY)
	$(BIN)/longvlm demo

test: $(TOOLS)
	$(MAKE) --no-print-directory --jobs 2 check pytest

pytest: $(TOOLS)
	$(BIN)/pytest -q -n 4 --no-loadscope-reorder --durations 20

check: $(TOOLS)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

format: $(TOOLS)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(TOOLS)
	$(BIN)/python docs/generate.py

tinyworld: $(TOOLS)
	$(BIN)/python -m longvlm.tinyworld.make

# What running needs, and what developing needs on top of it.
$(READY): pyproject.toml constraints.txt
	@echo "Installing longvlm into .venv: about two minutes, and 2 GB of disk with the CPU build of PyTorch."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $(READY)
	@echo "Installed: the command is $(abspath $(BIN)/longvlm); 'source .venv/bin/activate' makes it 'longvlm'."

$(TOOLS): $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(TOOLS)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
