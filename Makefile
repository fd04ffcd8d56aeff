# make demo and make test do everything from a bare clone; the .venv is made once and again when its inputs change.
# Tests run in two processes: one begins with those of Ray, the other with the rest; tests/conftest.py says how.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test check format docs tinyworld clean

demo: $(READY)
	$(BIN)/longvlm demo

test: $(READY) check
	$(BIN)/pytest -q -n 2 --no-loadscope-reorder

check: $(READY)
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)
	$(BIN)/python docs/generate.py

tinyworld: $(READY)
	$(BIN)/python -m longvlm.tinyworld.make

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
