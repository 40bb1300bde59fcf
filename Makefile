# Two commands for a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Python compiles what it imports; compiling all files of all packages takes pip most of a minute.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	--constraint constraints.txt

.PHONY: demo test tests test-gpu lint docs clean

demo: $(VENV)/.installed ## match the bundled pair; writes out/matches.npz and out/matches.png
	$(BIN)/eloftr-ops demo --output-dir out

test: $(VENV)/.installed-dev ## lint, types, docs, tests; beside each other
	$(MAKE) --no-print-directory --jobs 3 --output-sync=target lint docs tests

# Two processes of two threads each would wait for one another. What a file prepares once is prepared in one process.
tests: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -q

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

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP_INSTALL) --editable '.[dev]'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) out
