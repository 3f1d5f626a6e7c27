# Everything runs in .venv, which `make setup` fills with the versions that pyproject.toml pins.
.DEFAULT_GOAL := help
.PHONY: help setup test drills check quickstart clean

SHELL := /bin/sh
PYTHON := .venv/bin/python
READY := .venv/.ready
# The Python that makes .venv: the first of these that is there and new enough. Set BASE=/path/to/python to choose.
BASE ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
NEW_ENOUGH := 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'
VIDEOS ?=
OUT ?= $(if $(VIDEOS),out/videos,out/quickstart)
RUN := $(PYTHON) -m pipelines
TESTS ?=
ARGS ?=

help:  ## Say what there is
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## Make .venv with all packages (uv where there is one, else pip)

$(READY): pyproject.toml
	@if [ -z "$(BASE)" ] || ! $(BASE) -c $(NEW_ENOUGH); then \
		echo "BASE is '$(BASE)': Python 3.11, 3.12 or 3.13 is needed; install one, or give make BASE=/path/to/python3.11" >&2; \
		exit 2; fi
	@# A .venv that was left half-made, or whose Python is gone or another, is made anew; a sound one is only filled.
	@$(PYTHON) -c $(NEW_ENOUGH) 2>/dev/null || $(BASE) -m venv --clear .venv >/dev/null 2>&1 \
		|| $(BASE) -m venv --clear --without-pip .venv
	@if command -v uv >/dev/null 2>&1 && uv pip install --python $(PYTHON) -e '.[dev]'; then :; \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then $(PYTHON) -m pip install --progress-bar off -q -e '.[dev]'; \
	else $(BASE) -m pip --python $(PYTHON) install --progress-bar off -q -e '.[dev]'; fi
	@touch $@

test: $(READY)  ## Run the tests; TESTS=tests/s5 for a part, ARGS="-m 'not slow'" for pytest's options
	$(PYTHON) -m pytest $(ARGS) $(TESTS)

drills: $(READY)  ## Lose workers, nodes and drivers, and have workers hang, on clusters of several nodes; 25 minutes
	$(PYTHON) -m pytest -m drill $(ARGS) tests/clusters

check: $(READY)  ## Lint, formatting, types and the rooms rule
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/test_rooms.py

ifeq ($(VIDEOS),)
quickstart: $(READY)  ## The whole line on rendered videos, about 7 minutes; VIDEOS=folder for your own
	$(RUN) sample   --preset quickstart --out $(OUT)/videos
	$(RUN) index    --preset quickstart --out $(OUT)/index --videos $(OUT)/videos
	$(RUN) pretrain --preset quickstart --out $(OUT)/pretrain --manifest $(OUT)/index
	$(RUN) finetune --preset quickstart --out $(OUT)/finetune --manifest $(OUT)/index --checkpoint $(OUT)/pretrain
	$(RUN) evaluate --preset quickstart --out $(OUT)/evaluate --manifest $(OUT)/index --checkpoint $(OUT)/finetune
	$(RUN) sweep    --preset quickstart --out $(OUT)/sweep --pretrain.manifest $(OUT)/index
	$(RUN) report   --preset quickstart --out $(OUT)/report --runs $(OUT)
else
quickstart: $(READY)
	$(RUN) index    --preset videos --out $(OUT)/index --videos "$(VIDEOS)"
	$(RUN) pretrain --preset videos --out $(OUT)/pretrain --manifest $(OUT)/index
	$(RUN) evaluate --preset videos --out $(OUT)/evaluate --manifest $(OUT)/index --checkpoint $(OUT)/pretrain
	$(RUN) report   --preset videos --out $(OUT)/report --runs $(OUT)
endif

bench-%: $(READY)  ## A benchmark: bench-NAME runs tests/bench/NAME.py, ARGS="--its options"
	$(PYTHON) -m tests.bench.$* $(ARGS)

clean:  ## Remove what quickstart and the tools made; your runs and .venv stay
	rm -rf out/quickstart out/videos .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find s5 pipelines clusters tests -name __pycache__ -type d -prune -exec rm -rf {} +
