# Two commands for a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-gpu lint docs clean

demo: $(VENV)/.installed ## match the bundled pair; writes out/matches.npz and out/matches.png
	$(BIN)/eloftr-ops demo --output-dir out

test: $(VENV)/.installed-dev lint docs ## lint, types, docs, tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q # two processes of two threads each would wait for one another

test-gpu: $(VENV)/.installed-dev ## what needs a GPU; without one, as far as a CPU goes
	$(BIN)/python -m pytest -m gpu -n auto -q

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev ## the site, in site/; a broken link or an unknown name is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out
