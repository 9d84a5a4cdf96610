# Project commands. `make demo` and `make test` set up everything they need.
VENV := .venv
BIN := $(VENV)/bin
version = $(shell $(1) -c 'import sys; print(sys.version_info[:2])' 2> /dev/null)
ifdef PYTHON  # set explicitly: replace an environment of another version
ifneq ($(call version,$(PYTHON)),$(call version,$(BIN)/python))
CLEAR := --clear
$(VENV)/.complete: FORCE
endif
else
PYTHON = $(or $(shell for python in python3 python3.12 python3.11; do \
	$$python -m longlive_serve.triton_server.python_version 2> /dev/null && echo $$python && break; done),python3)
endif

DEMO := torch,client,triton
BUILD := hatchling editables  # build requirements; hatchling asks for `editables` only when it runs
WORKERS ?= auto
.PHONY: help setup dev demo test test-portability check bench bench-engines autoscaling perf chaos fleet soak fuzz pictures quality onnx quantize evaluate serve doctor deploy-check smoke stale wheels lock clean FORCE

help:
	@echo "make demo   set up, start a server, stream an interactive session, write videos/interactive/*.mp4"
	@echo "make test   set up, run all tests, including those against a live server"
	@echo "make test-portability  run the tests as on other processors, write results/portability.json (hours)"
	@echo "make check  set up, run the linter and the type checker"
	@echo "make bench  set up, measure a server with simulated viewers, write results/serving.json and docs/serving.png"
	@echo "make bench-engines  set up, measure the backends on this machine's GPU, write results/gpu.json and docs/gpu.png"
	@echo "make autoscaling  set up, simulate a fleet of GPUs, write results/autoscaling.json and docs/autoscaling.png"
	@echo "make perf   set up, fetch NVIDIA's perf_analyzer, compare its results with the benchmark's"
	@echo "make chaos, make fleet   kill servers; test access control and draining; write results/serving.json"
	@echo "make soak, make fuzz   run for half an hour; send invalid requests; write results/serving.json"
	@echo "make pictures  run the demo, update the pictures in docs/"
	@echo "make quality  set up, measure the demo model's quality, write results/quality.json"
	@echo "make onnx   export the demo model as ONNX graphs to graphs/demo, compare each with PyTorch"
	@echo "make quantize, make evaluate   write INT8 and FP8 weights to weights/, measure their quality"
	@echo "make serve  set up, run the server in the foreground (Ctrl-C ends it)"
	@echo "make doctor set up, check whether this machine can serve, how many sessions fit, what is missing"
	@echo "make deploy-check  set up, check images, manifests, alerts and dashboards; run the image's layout"
	@echo "make smoke  set up, run every command at its smallest size, write the seconds to results/commands.json"
	@echo "make stale  set up, list the results in results/ that are older than their code"
	@echo "make wheels  download the wheels that make demo installs to wheelhouse/, for offline machines"
	@echo "make lock   update the pinned versions and hashes in requirements/"
	@echo "make clean  remove the virtual environment"
	@echo "make setup, make dev   create the virtual environment $(VENV); dev: with the test requirements"

setup: $(VENV)/.complete
dev: $(VENV)/.complete-dev

$(VENV)/.complete: pyproject.toml
	@$(PYTHON) -m longlive_serve.triton_server.python_version
	$(PYTHON) -m venv $(CLEAR) $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[$(DEMO)]'
	@touch $@

$(VENV)/.complete-dev: $(VENV)/.complete
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[$(DEMO),export,quantization,bench,deploy,dev]'
	@touch $@

demo: setup
	$(BIN)/python -m longlive_client.cli.generate --serve --prompts examples/story.jsonl --contact-sheet videos/interactive/story.png

test: dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS)

test-portability: dev
	$(BIN)/python -m tests.project.portability --json results/portability.json

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: dev
	$(BIN)/python -m benchmarks.serving --serve --viewers 1,2,3,4,6,8 --json results/serving.json --plot docs/serving.png

bench-engines: dev
	$(BIN)/python -m benchmarks.engines --device cuda --json results/gpu.json --plot docs/gpu.png

autoscaling: dev
	$(BIN)/python -m deploy.autoscaling_simulator --sweep --json results/autoscaling.json --plot docs/autoscaling.png
	$(BIN)/python -m deploy.capacity --page docs/capacity.md

perf: setup
	$(BIN)/python -m benchmarks.serving.perf_analyzer --json results/serving.json

chaos: setup
	$(BIN)/python -m stress.chaos --json results/serving.json

fleet: setup
	$(BIN)/python -m stress.mtls_fleet --json results/serving.json

soak: setup
	$(BIN)/python -m stress.soak --json results/serving.json

fuzz: setup
	$(BIN)/python -m stress.fuzz --json results/serving.json

pictures: demo
	cp videos/interactive/story.png docs/story.png
	$(BIN)/python -m longlive_client.cli.gif videos/interactive/story.mp4 docs/story.gif

quality: setup
	$(BIN)/python -m training.quality --out results/quality.json

onnx: dev
	$(BIN)/python -m export.to_onnx --out graphs/demo

quantize: dev
	$(BIN)/python -m quantization.quantize --recipe int8 --out weights/demo-int8
	$(BIN)/python -m quantization.quantize --recipe fp8 --out weights/demo-fp8

evaluate: dev
	$(BIN)/python -m quantization.evaluate --json results/quantization.json --plot docs/quantization.png

serve: setup
	$(BIN)/python -m longlive_serve.triton_server

doctor: setup
	$(BIN)/python -m longlive_serve.doctor

deploy-check: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[deploy-check]'
	$(BIN)/python -m deploy.checks

wheels:
	@$(PYTHON) -m longlive_serve.triton_server.python_version
	$(PYTHON) -m pip wheel --disable-pip-version-check --wheel-dir wheelhouse '.[$(DEMO)]' $(BUILD)

lock: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(call lock,3.11,$(DEMO))
	$(call lock,3.12,$(DEMO))
	$(call lock,3.13,client)

# $(call lock,PYTHON,EXTRAS) pins the extras and the build requirements, with the hashes of the public packages.
comma := ,
lock = printf '%s\n' $(BUILD) | UV_CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/uv pip compile --quiet --no-config --no-annotate \
	--generate-hashes --python-version $(1) --python-platform x86_64-manylinux_2_35 \
	$(addprefix --extra ,$(subst $(comma), ,$(2))) pyproject.toml - --output-file requirements/py$(subst .,,$(1)).txt

smoke: dev
	$(BIN)/python -m tests.project.smoke --json results/commands.json

stale: setup
	$(BIN)/python -m benchmarks.stale

clean:
	rm -rf $(VENV)
