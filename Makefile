# The two commands of the README are `make demo` and `make test`. Each makes .venv and installs everything itself.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.installed
PYTHONS := python3 python3.13 python3.12 python3.11

.PHONY: help setup demo test check protos docs dashboard alerts release-check bench browser clean

help:  ## what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

demo: $(STAMP)  ## train a small MoE, serve it with its experts in actors, kill one, compare (under 5 minutes)
	@$(BIN)/ray-moe demo

test: $(STAMP) browser  ## the whole suite
	@$(PY) -m pytest -n 2 --dist loadgroup tests/arch tests/unit tests/sim tests/parity
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/ray --ignore tests/ray/test_deploy.py
	@$(PY) -m pytest tests/ray/test_deploy.py  # alone: its Ray is encrypted, and others that are not would disturb it

# Unit tests that open sockets, start processes, build whole models or train take longer than all others; `make test` has
# them.
SLOWER := transport service client training models cluster docs benchmarks ops/gates ops/methods ops/architectures \
  actors/test_warm.py ops/test_quantized_training.py

check: $(STAMP)  ## format, lint, types, import layers, unit tests without sockets (two minutes)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(PY) -m pytest -q -n 2 tests/arch tests/unit $(SLOWER:%=--ignore=tests/unit/%)

protos: $(STAMP)  ## the committed stubs, anew from protos/
	@$(PY) tools/protos.py

dashboard: $(STAMP)  ## the committed Grafana dashboard, anew from tools/grafana.py
	@$(PY) tools/grafana.py

# Prometheus' own checker: the installed one, or that of Debian's package, unpacked here (needs no root).
PROMTOOL := $(or $(shell command -v promtool),build/prometheus/usr/bin/promtool)

alerts: $(PROMTOOL)  ## the alert rules, checked and tested by promtool
	@$(PROMTOOL) check rules cluster/prometheus/alerts.yaml
	@$(PROMTOOL) test rules tests/prometheus/alerts_test.yaml

build/prometheus/usr/bin/promtool:
	@mkdir -p build/prometheus
	@cd build/prometheus && apt-get download -qq prometheus && dpkg-deb -x prometheus_*.deb . || { \
	  echo "make alerts: no promtool here, and apt-get cannot fetch the package prometheus; install promtool" >&2; exit 1; \
	}

release-check: $(STAMP)  ## build the wheel, and use its client alone on every Python there is here
	@$(BIN)/nox -s dist client

docs: $(STAMP)  ## the documentation site, in build/site
	@$(PY) tools/docs/walks.py
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict
	@echo "open build/site/index.html; search needs a server: $(PY) -m http.server -d build/site"

bench: $(STAMP)  ## the transports side by side; `make bench RUN=layer` is another one of `ray-moe bench`
	@$(BIN)/ray-moe bench $(or $(RUN),dispatch)

BROWSERS := chromium chromium-browser google-chrome google-chrome-stable

browser:  ## Chromium, for the tests of the dashboard; installs it with apt where root runs make
	@command -v $(BROWSERS) >/dev/null 2>&1 && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Chromium"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; \
	else \
	  echo "make browser: the dashboard's tests need one of: $(BROWSERS)" >&2; \
	  echo "  install one (on Debian: sudo apt install chromium) and run make again" >&2; exit 1; \
	fi

clean:  ## all but the sources; the demo's model stays in its cache
	rm -rf $(VENV) .nox build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup: $(STAMP)

# transformers 5.23 needs Python 3.11, so the service does; a Python without ensurepip cannot make an environment.
# torch goes first, alone, because its build depends on the machine: see constraints/*.txt.
$(STAMP): pyproject.toml $(wildcard constraints/*.txt)
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  for python in $(PYTHONS); do \
	    "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && break; \
	    python=; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "make setup: no Python >= 3.11 with venv among: $(PYTHONS)" >&2; \
	    echo "  install one (on Debian and Ubuntu: apt install python3 python3-venv) and run make again" >&2; exit 1; \
	  fi; \
	  echo "making $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV); \
	fi
	@pip="$(PY) -m pip --disable-pip-version-check install -qq --no-input"; \
	echo "installing (the first time takes some minutes)"; \
	if nvidia-smi -L >/dev/null 2>&1; then \
	  $$pip -c constraints/tested.txt -r constraints/gpu.txt; \
	else \
	  $$pip -c constraints/tested.txt -r constraints/cpu.txt 2>/dev/null || { \
	    echo "pip finds no CPU build of torch here; taking the default one (several GB)"; \
	    $$pip -c constraints/tested.txt torch==2.13.0; \
	  }; \
	fi; \
	$$pip -c constraints/tested.txt -e '.[serve,dev]'
	@touch $@
