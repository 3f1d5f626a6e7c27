# Everything runs in .venv, which `make setup` fills with the versions that constraints.txt pins.
.DEFAULT_GOAL := help
.PHONY: help setup test drills check quickstart simulate study clean

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
INSTALL := -c constraints.txt -e '.[pipelines,dev]'
# As uv does, modules are compiled once they are imported: most never are.
BY_PIP := install --no-compile --progress-bar off $(INSTALL)
TESTS ?=
ARGS ?=

help:  ## Say what there is
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## Make .venv with all packages (uv where there is one, else pip)

$(READY): pyproject.toml constraints.txt
	@if [ -z "$(BASE)" ] || ! $(BASE) -c $(NEW_ENOUGH); then \
		echo "BASE is '$(BASE)': Python 3.11, 3.12 or 3.13 is needed; install one, or give make BASE=/path/to/python3.11" >&2; \
		exit 2; fi
	@echo "Installing torch, Ray, MLflow and what they need into .venv: about 3 GB of downloads, 1 to 10 minutes."
	@# A .venv that was left half-made, or whose Python is gone or another, is recreated; a sound one is only filled.
	@$(PYTHON) -c $(NEW_ENOUGH) 2>/dev/null || $(BASE) -m venv --clear .venv >/dev/null 2>&1 \
		|| $(BASE) -m venv --clear --without-pip .venv
	@if command -v uv >/dev/null 2>&1 && uv pip install --python $(PYTHON) $(INSTALL); then :; \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then $(PYTHON) -m pip $(BY_PIP); \
	else $(BASE) -m pip --python $(PYTHON) $(BY_PIP); fi
	@touch $@

test: $(READY)  ## Run the tests; TESTS=tests/s5 for a part, ARGS="-m 'not slow'" for pytest's options
	$(PYTHON) -m pytest $(ARGS) $(TESTS)

drills: $(READY)  ## Lose workers, nodes and drivers, and have workers hang, on clusters of several nodes; 45 minutes
	$(PYTHON) -m pytest -m drill $(ARGS) $(TESTS)

check: $(READY)  ## Lint, formatting, types and the rooms rule
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m pytest -q tests/test_rooms.py

# $(call step,WHAT COMES,A STAGE AND ITS SETTINGS): one line before a stage, one with its seconds after it.
define step
@printf '\n==> %s\n' "$(1)"; began=$$(date +%s); $(RUN) $(2) && printf '==> %s s\n' "$$(($$(date +%s) - began))"
endef

ifeq ($(VIDEOS),)
quickstart: $(READY)  ## The whole line on rendered videos, 7 to 12 minutes; VIDEOS=folder for your own
	$(call step,1/7 sample: render 240 videos of ten activities (10 s),sample --preset quickstart --out $(OUT)/videos)
	$(call step,2/7 index: probe them into a manifest (15 s),index --preset quickstart --out $(OUT)/index --videos $(OUT)/videos)
	$(call step,3/7 pretrain: LSMCL on 2 workers (2 min),pretrain --preset quickstart --out $(OUT)/pretrain --manifest $(OUT)/index)
	$(call step,4/7 finetune: S5 from that checkpoint (80 s),finetune --preset quickstart --out $(OUT)/finetune --manifest $(OUT)/index --checkpoint $(OUT)/pretrain)
	$(call step,5/7 evaluate: accuracy on the test split (15 s),evaluate --preset quickstart --out $(OUT)/evaluate --manifest $(OUT)/index --checkpoint $(OUT)/finetune)
	$(call step,6/7 sweep: clips of 16 s against 64 s with three seeds (3 min),sweep --preset quickstart --out $(OUT)/sweep --finetune.manifest $(OUT)/index)
	$(call step,7/7 report: tables and figures of the above (10 s),report --preset quickstart --out $(OUT)/report --runs $(OUT))
else
quickstart: $(READY)
	$(call step,1/4 index: probe your videos into a manifest,index --preset videos --out $(OUT)/index --videos "$(VIDEOS)")
	$(call step,2/4 pretrain: LSMCL on 2 workers (2 min),pretrain --preset videos --out $(OUT)/pretrain --manifest $(OUT)/index)
	$(call step,3/4 evaluate: a picture of nearest clips (20 s),evaluate --preset videos --out $(OUT)/evaluate --manifest $(OUT)/index --checkpoint $(OUT)/pretrain)
	$(call step,4/4 report: tables and figures of the above (10 s),report --preset videos --out $(OUT)/report --runs $(OUT))
endif

bench-%: $(READY)  ## A benchmark: bench-NAME runs tests/bench/NAME.py, ARGS="--its options"
	$(PYTHON) -m tests.bench.$* $(ARGS)

simulate: $(READY)  ## What 8 to 1,024 workers would reach, by tests/bench/simulate.py, beside 1 to 8 processes here (3 min)
	$(PYTHON) -m tests.bench.simulate $(ARGS)

study: $(READY)  ## What the method does of what it claims, on rendered videos, in an hour; ARGS=--quick for less
	$(PYTHON) -m tests.bench.study $(ARGS)

clean:  ## Remove what quickstart and the tools made; your runs and .venv stay
	rm -rf out/quickstart out/videos .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find s5 pipelines clusters tests -name __pycache__ -type d -prune -exec rm -rf {} +
