# SPDX-License-Identifier: Apache-2.0
# Every target makes what it needs first: on a fresh machine, `make demo` or `make test` is enough.
SHELL := /bin/bash
.DEFAULT_GOAL := help
RUN := scripts/run
CHECKED := src tests launch scripts/patch_ros_wheels.py $(wildcard benchmarks experiments)
export PYTHON

.PHONY: help setup build demo test lint format clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10
	@echo 'with: demo FULL=1 (the long demo), test ARGS="..." (for pytest), PYTHON=... (Python 3.10 to 3.12)'

setup: ## check the machine, create .venv
	@scripts/bootstrap setup

build: ## setup, and build the ROS packages into install/
	@scripts/bootstrap build

demo: build ## the whole loop on simulated robots, and a report
	@$(RUN) lwd demo $(if $(FULL),--full)

test: lint ## every check and every test
	@$(RUN) python -m pytest $(ARGS)

lint: build ## style, types, and which package imports which
	$(RUN) ruff check $(CHECKED)
	$(RUN) mypy
	@$(RUN) lint-imports --no-logo

format: build ## rewrite the sources in the common style
	$(RUN) ruff check --fix $(CHECKED)
	$(RUN) ruff format $(CHECKED)

clean: ## remove what was made here, runs excepted
	rm -rf .venv build install log .bootstrap.lock .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
