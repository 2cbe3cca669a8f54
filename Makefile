# make demo: the main job on an embedded broker, with a live view.   make demo BROKERS=host:9092 for a real cluster
# make test: everything; integration tests need Java 17+ and Maven.  make test PYTEST_ARGS='-k ring': some of them
# make bench: speed beside a raw loop
# make chaos SEED=7 MINUTES=3: faults at random for so long; SEEDS=1-10 for several, STRATEGY=, ORDERING= for one of each
# make fuzz SECONDS=60: any bytes into everything that reads some, for so long each; TARGETS='avro ring': some of them
PYTHON ?= python3
PYTEST_ARGS ?=
# Tests mostly wait: two at a time, each with servers of its own. 0 is one at a time, in this process.
TEST_PROCESSES ?= 2
SEED ?= 1
MINUTES ?= 3
STRATEGY ?= both
SECONDS ?= 60
TARGETS ?=
VENV   := .venv
STAMP  := $(VENV)/.installed
RUN    := $(VENV)/bin

.PHONY: demo test unit lint types bench chaos fuzz clean

# setuptools warns of every editable install whose folders are not named as the package.
# The lock: of two makes at once one installs, and the other waits.
$(STAMP): export PYTHONWARNINGS = ignore:Editable installation.
$(STAMP): pyproject.toml
	flock . sh -c 'test $(STAMP) -nt pyproject.toml || { \
	    $(PYTHON) -m venv $(VENV) && \
	    $(RUN)/python -m pip install --quiet --upgrade pip && \
	    $(RUN)/python -m pip install --quiet -e ".[dev]" && \
	    touch $(STAMP); }'

demo: $(STAMP)
	$(RUN)/kafkasrcd demo $(if $(BROKERS),--brokers $(BROKERS))

test: lint types $(STAMP)
	$(RUN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

unit: $(STAMP)
	$(RUN)/python -m pytest -m 'not kafka' $(PYTEST_ARGS)

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(STAMP)
	$(RUN)/mypy
	$(RUN)/pyright

bench: $(STAMP)
	$(RUN)/python -m tests.bench

chaos: $(STAMP)
	$(RUN)/python -m tests.chaos --minutes $(MINUTES) --strategy $(STRATEGY) \
	    $(if $(SEEDS),--seeds $(SEEDS),--seed $(SEED)) $(if $(ORDERING),--ordering $(ORDERING))

fuzz: $(STAMP)
	$(RUN)/python -m tests.fuzz $(TARGETS) -max_total_time=$(SECONDS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis demo-output
