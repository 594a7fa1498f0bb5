# Everything a contributor or CI runs. `make` alone says what there is.
.DEFAULT_GOAL := help
SHELL := /bin/bash
# Idle OpenMP threads must not spin: the machines are shared.
export OMP_WAIT_POLICY := PASSIVE
BIN := .venv/bin
LEVEL ?= node
PYTEST := $(BIN)/python -m pytest

.PHONY: help setup demo demo-down test check lint unit integration e2e cluster-up cluster-images cluster-down generate bench docs lock clean

help: ## say what there is
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/.ready ## the environment in .venv; the other targets call it

.venv/.ready: requirements/setup.txt requirements/dev.txt agent/pyproject.toml operator/pyproject.toml scripts/setup
	@scripts/setup
	@touch $@

demo: setup ## from nothing to a served model on a local Kubernetes, and a residual restart watched live
	@$(BIN)/python -m demo

demo-down: setup ## take the demo's cluster away
	@$(BIN)/python -m demo --down

check: setup lint unit ## format, lint, types, architecture, generated files, unit tests: under 2 minutes

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy agent/src operator/src tests demo bench handbook
	$(BIN)/lint-imports --no-logo
	$(MAKE) --no-print-directory docs

unit: setup
	$(PYTEST) tests/unit

# Built outside of the tests: minutes on an empty cache, no time after that.
.PHONY: programs images
programs: setup
	@$(BIN)/python -m tests.cluster build

images: programs
	@$(BIN)/python -m tests.support.project_images

integration: programs ## runtimes, agents and the operator on a real control plane (no root needed)
	$(PYTEST) tests/models tests/conformance tests/gpu tests/chart tests/integration tests/examples tests/cluster -m 'not node'

e2e: images ## the whole system on a local node (root)
	$(PYTEST) tests/cluster tests/e2e -m node

test: check programs images ## all that CI runs
	$(PYTEST) tests/models tests/conformance tests/gpu tests/chart tests/integration tests/examples tests/cluster tests/e2e

cluster-up: setup ## a local Kubernetes; writes .cluster/kubeconfig (LEVEL=control-plane|node)
	@$(BIN)/python -m tests.cluster up --level $(LEVEL) --dir .cluster

cluster-images: programs ## the project's images in that Kubernetes; writes .cluster/values.yaml and .cluster/bin
	@$(BIN)/python -m tests.support.project_images --load .cluster

cluster-down: setup ## take the local Kubernetes away
	@$(BIN)/python -m tests.cluster down --dir .cluster

generate: setup ## write the CRDs, the reference of the runtimes, what is made from the code
	$(BIN)/python -m vram_operator.crds
	$(BIN)/python -m vram_agent.runtimes.reference
	$(BIN)/python -m handbook
	$(BIN)/python -m tests.chart.kustomize

docs: setup ## the documentation site, in site/; a link that leads nowhere is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: setup ## measure; writes bench/results/
	$(BIN)/python -m bench

lock: setup ## lock the requirements anew
	scripts/lock

clean: ## remove the environment and caches of this checkout
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
