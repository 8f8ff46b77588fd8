# Thin: everything is done by bootstrap.py, which needs nothing but Python 3.11 or newer.
# Where make is missing: python3 bootstrap.py demo, python3 bootstrap.py test.
# Variables go on to the program: make demo ONCE=1 DATA=generated, TORCH_BACKEND=cpu make setup.

PYTHON ?= python3
ARGS ?=
BOOTSTRAP = $(PYTHON) bootstrap.py

.PHONY: help setup demo test chaos cdc containers mutations soak soak-starve fuzz up down lint proto
.PHONY: lock clean
.DEFAULT_GOAL := help

help:  ## these targets
	@sed -n 's/^\([a-z][a-z%-]*\):[^#]*## /\1	/p' Makefile | expand -t 16

setup:  ## the environment in .venv, Apache Kafka's jars in the user's cache
	@$(BOOTSTRAP) setup

demo:  ## a click changes an answer; ONCE=1 ends by itself, CDC=1 has the items in PostgreSQL
	@$(BOOTSTRAP) demo $(ARGS)

test:  ## every test, in three processes; ARGS="tests/unit -x" goes to pytest
	@$(BOOTSTRAP) test $(ARGS)

chaos:  ## faults under load, then compare all state; ARGS="--faults 200 --seed 7"
	@$(BOOTSTRAP) chaos $(ARGS)

cdc:  ## PostgreSQL, Debezium, Kafka, Eddyline: a changed row changes answers; ARGS="--rounds 50"
	@$(BOOTSTRAP) cdc $(ARGS)

containers:  ## build the images, run compose, check it; ARGS="--engine podman --compose …"
	@$(BOOTSTRAP) containers $(ARGS)

mutations:  ## plant known bugs one by one, each must be caught; ARGS="forget merge" by name
	@$(BOOTSTRAP) mutations $(ARGS)

soak:  ## long tests: races and simulated runs, a minute each, lost logs; SOAK_S=600 for ten
	@$(BOOTSTRAP) soak $(ARGS)

soak-starve:  ## a worker with waiting callers, open streams and a dead Redis node; SOAK_S=600
	@$(BOOTSTRAP) bench starve $(ARGS)

fuzz:  ## coverage-guided fuzzing of ingest; ARGS="-max_total_time=600"
	@$(BOOTSTRAP) fuzz $(ARGS)

up:  ## the local Kafka and Valkey, in the background
	@$(BOOTSTRAP) up

down:  ## stop them; the data stay
	@$(BOOTSTRAP) down

lint:  ## ruff, mypy, import-linter
	@$(BOOTSTRAP) lint

# The oldest supported grpcio-tools: its code runs under every newer grpcio and protobuf. From the
# repository root: only then the generated import reads `from serving.proto import …`.
proto: setup  ## generate serving/proto/*_pb2*
	.venv/bin/uv venv --quiet --clear --python .venv/bin/python .cache/proto
	.venv/bin/uv pip install --quiet --python .cache/proto/bin/python \
		"grpcio-tools==1.66.2" "setuptools<81"
	.cache/proto/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. \
		--grpc_python_out=. serving/proto/*.proto

bench-%:  ## one benchmark: make bench-visible
	@$(BOOTSTRAP) bench $* $(ARGS)

evaluate-%:  ## eddyline evaluate on a data set: make evaluate-ml-100k; others: --data FOLDER
	@$(BOOTSTRAP) bench evaluate $* $(ARGS)

COMPILE = .venv/bin/uv pip compile --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-header --no-annotate --quiet

lock: setup  ## write requirements.lock and those of the build and of `make cdc` anew
	$(COMPILE) pyproject.toml --extra dev -o requirements.lock
	$(COMPILE) pyproject.toml --extra cdc --constraint requirements.lock -o requirements-cdc.lock
	$(COMPILE) --group build --constraint requirements.lock -o requirements-build.lock

clean:  ## remove the environment, all local data and caches
	@if [ -x .venv/bin/eddyline ]; then .venv/bin/eddyline down; fi
	rm -rf .venv .eddyline .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache \
		.hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
