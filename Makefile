# make venv | demo | study | test | lint | clean.  PYTHON chooses the interpreter that .venv is made from (3.11 or later).
PYTHON ?= python3

.PHONY: venv demo study test lint clean

venv: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv (torch is large: a minute or more)"
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: venv
	./runs/demo.sh

study: venv
	./runs/study.sh

test: venv
	.venv/bin/python -m pytest -n 2 --dist loadfile

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf .venv out .pytest_cache .ruff_cache __pycache__ */__pycache__
