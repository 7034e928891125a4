# The commands for people. `make quickstart` and `make test` need only Python 3.11 to 3.13 with venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test test-all test-gpu test-hosts torture benchmark-gpu lint format clean

install: $(VENV)/installed

# One environment for users and developers, updated when a requirements file changes.
# TORCH: pip options for torch alone, for example an index with CPU builds.
$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	@$(if $(TORCH),true,$(BIN)/python -c 'import torch' 2>/dev/null || echo "$$ABOUT_TORCH")
	$(if $(TORCH),$(BIN)/python -m pip install $(TORCH) $$(grep '^torch' requirements.txt))
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

define ABOUT_TORCH
pip now downloads about 3 GB (6 GB on disk): torch from the default index comes with CUDA.
For a CPU build of 0.2 GB stop this and give its index, which https://pytorch.org/get-started shows:
    make TORCH="--index-url URL" install
endef
export ABOUT_TORCH

# Prints each command before running it; the commands together are the tutorial.
quickstart: install
	$(BIN)/python benchmarks/quickstart.py

# Two workers that steal each other's tests.
test: install
	$(BIN)/python -m pytest -m "not gpu and not hosts and not long" -n 2 --dist worksteal

# Also the long forms of some tests.
test-all: install
	$(BIN)/python -m pytest -m "not gpu and not hosts" -n 2 --dist worksteal

# Timeouts by thread, because a signal does not interrupt a test that hangs inside CUDA or NCCL.
# Fails if all tests were skipped. DRY_RUN=1: on a CPU, with stand-ins.
GPU_TESTS := -m gpu --timeout-method=thread -n 4 --dist worksteal
# Only these files, because each worker imports what it collects. A dry run tries a few tests.
GPU_FILES := tests/test_gpu.py tests/test_unet.py $(if $(DRY_RUN),-n 0)
test-gpu: install
	DRY_RUN=$(DRY_RUN) $(BIN)/python -m pytest $(GPU_TESTS) $(GPU_FILES)

# Continues where the results end, also beyond the goals. MINUTES=600 runs it for a night.
MINUTES ?= 60
torture: install
	$(BIN)/python tests/torture/run.py --budget $(MINUTES)

# Two hosts made of network namespaces. Needs root; takes some minutes.
test-hosts: install
	$(BIN)/python -m pytest -m hosts

# For a rented machine: GPU tests, a first table and its pictures in nine minutes. All results are a
# few files in one folder, to copy off the machine. A failure is recorded there and does not end the
# command. DRY_RUN=1 does the same on a CPU, smaller, with stand-ins; its speeds mean nothing.
OUTPUT ?= runs/benchmark_gpu
TILES := runs/benchmark_tiles
DRY_RUN ?=
benchmark-gpu: install
	mkdir -p $(OUTPUT)
	test -d $(TILES)/train || $(BIN)/python rareplanes/sample.py -o $(TILES) -n 24 -j 8
	test -f $(TILES)/train/packed.json || \
	    $(BIN)/python preprocessing/preprocess.py $(TILES) -s 512 -n 8 --pack
	@# SIGINT, so that pytest still prints its summary.
	-DRY_RUN=$(DRY_RUN) timeout -s INT -k 15 180 $(BIN)/python -m pytest $(GPU_TESTS) $(GPU_FILES) -v \
	    >$(OUTPUT)/tests.txt 2>&1
	@tail -n 3 $(OUTPUT)/tests.txt
	-$(BIN)/python benchmarks/run.py $(if $(DRY_RUN),--dry-run,--quick --device cuda) --budget 5.2 \
	    --data-path $(TILES) -o $(OUTPUT) 2>&1 | tee $(OUTPUT)/run.txt
	-$(BIN)/python benchmarks/table.py --results $(OUTPUT) --into $(OUTPUT)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Not runs/ and predictions/: trained models, and what they found.
clean:
	rm -rf sample_data .pytest_cache .ruff_cache .mypy_cache
