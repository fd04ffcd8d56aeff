# make demo and make test do everything from a bare clone; the .venv is made once and again when its inputs change.
# Tests run in four processes, which two cores are busy with; one has all those of Ray (tests/conftest.py). A few
# that join nodes, which others in their way would let time out, run first, beside the checks.
PYTHON ?= python3
BIN := .venv/bin
VENV := .venv/.made
READY := .venv/.ready
TOOLS := .venv/.tools

# Bytecode is kept whatever the environment says: tests are rewritten as they are imported, ten seconds a process.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test alone check format docs tinyworld clean

demo: $(READY)
	$(BIN)/longvlm demo

test: $(TOOLS)
	$(MAKE) --no-print-directory --jobs 2 check alone
	$(BIN)/pytest -q -n 4 --no-loadscope-reorder --durations 20 -m "not alone"

# It imports all tests, so that their bytecode is there when four processes ask for it at once.
alone: $(TOOLS)
	$(BIN)/pytest -q -m alone

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

# Bytecode comes with the first import: to compile all that is installed took half of the time.
INSTALL := PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable

$(VENV): pyproject.toml constraints.txt
	@echo "Installing longvlm into .venv: about a minute, and 2 GB of disk with the CPU build of PyTorch."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	@touch $(VENV)

# What running needs, or at once what developing needs, running among it.
$(READY): $(VENV)
	$(INSTALL) '.[serve]'
	@echo "Installed: the command is $(abspath $(BIN)/longvlm); 'source .venv/bin/activate' makes it 'longvlm'."
	@touch $(READY)

$(TOOLS): $(VENV)
	$(INSTALL) '.[dev]'
	@touch $(READY) $(TOOLS)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
