# Two commands: `make quickstart` and `make test`. Both make .venv on first use and do only what is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LMMS   := .venv-lmms

.PHONY: quickstart test test-lmms lint docs notebooks clean

quickstart: $(VENV)/.installed
	$(BIN)/qapbench run quickstart

# A process a core, each with one thread: small tensors wait longer for a second thread than they compute. Compiled modules
# are written even where the environment forbids it, since the tests start many commands.
test: lint
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

# In an environment of its own: lmms-eval without the forty packages that its metadata asks for and its tasks do without.
test-lmms: $(LMMS)/.installed
	OMP_NUM_THREADS=1 $(LMMS)/bin/python -m pytest -m lmms $(wildcard tests/*/test_lmms_*.py)

# The site, in build/site. A link that leads nowhere, a page that is in no menu or a public name without a docstring fails.
docs: $(VENV)/.documented
	OMP_NUM_THREADS=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Every notebook, executed from its first cell to its last, two at a time.
notebooks: $(VENV)/.documented
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=120 docs/notebooks

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -e . -c constraints.txt
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet -e '.[test]' -c constraints.txt
	touch $@

$(VENV)/.documented: $(VENV)/.tested
	$(BIN)/pip install --quiet -e '.[docs]' -c constraints.txt
	touch $@

$(LMMS)/.installed: pyproject.toml constraints.txt
	test -x $(LMMS)/bin/python || $(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/pip install --quiet torch -c constraints.txt
	$(LMMS)/bin/pip install --quiet -e . 'pytest>=8.3' 'accelerate>=1' 'loguru>=0.7' 'tenacity>=8.3' -c constraints.txt
	$(LMMS)/bin/pip install --quiet --no-deps 'lmms-eval>=0.7.1,<0.8'
	touch $@

clean:
	rm -rf $(VENV) $(LMMS) build dist *.egg-info
