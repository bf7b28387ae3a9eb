# Each target is one line of what it calls. PYTHON is the interpreter that makes the environment.
PYTHON ?= python3
BIN := .venv/bin
export DVC_NO_ANALYTICS := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test slow check serve compile submit images test-containers lock

demo: .venv/ready
	@dvc remote modify --local sample url sample-remote && dvc pull --quiet && dvc repro && raresynth report --out runs/demo

test: .venv/ready
	@pytest -m "not slow and not container"

slow: .venv/ready
	@pytest -m "slow and not container"

check: .venv/ready
	@ruff check --no-cache . && ruff format --check . && mypy && lint-imports

# The service over an approved bundle, for this machine alone, until Ctrl-C.
serve: .venv/ready
	@RARESYNTH_SERVING_BUNDLE=$(BUNDLE) RARESYNTH_SERVING_PORT=$(PORT) exec python -P -m serving
PORT := 3000
BUNDLE := runs/demo/bundle

# The packages for Kubeflow Pipelines, below pipelines/compiled.
compile: .venv/ready
	@python -P -m pipelines.compile --params params.yaml --out pipelines/compiled

# Such as: make submit HOST=http://localhost:8080 ARGS="repository=URL revision=main classes='[\"df\"]' --wait"
submit: .venv/ready
	@raresynth submit $(if $(HOST),--host $(HOST)) $(PACKAGE) $(ARGS)
PACKAGE := pipelines/compiled/augmentation-cpu.yaml

# The environment: everything from the lock, which is complete, each file checked against its hash.
.venv/ready: requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "raresynth needs Python 3.11 or later: make PYTHON=python3.11 demo")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# Container images of this version; needs a Docker engine.
images:
	@docker/build train serve

# The images, and the pipelines in them.
test-containers: .venv/ready images
	@pytest -m container

# New locks after a change of dependencies; needs uv.
lock:
	@$(COMPILE) --extra train --extra cluster --output-file requirements/train.txt
	@$(COMPILE) --extra serve --output-file requirements/serve.txt
	@$(COMPILE) --all-extras --output-file requirements/dev.txt
COMPILE := uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate
