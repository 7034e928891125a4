# Everything a person types. `make quickstart` and `make test` need nothing but Python 3.11+ with venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test test-gpu test-hosts torture benchmark-gpu lint format clean

install: $(VENV)/installed

# One environment for users and developers: the stamp is renewed when a requirements file changes.
$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# With bf16 instructions, or a GPU, --amp doubles the speed; without them it would be slower.
AMP := $(shell (nvidia-smi -L || grep -E 'avx512_bf16|amx_bf16' /proc/cpuinfo) >/dev/null 2>&1 && echo --amp)
STEPS := $(if $(AMP),400,210)

# Every line make prints here is a command to type; together they are the tutorial.
quickstart: install
	$(BIN)/python rareplanes/sample.py -o sample_data -n 64 --test-fraction 0.125 -j 2
	$(BIN)/python preprocessing/preprocess.py sample_data -s 512 -n 2
	rm -rf runs/quickstart
	$(BIN)/python unet/train.py --data-path sample_data --output-dir runs/quickstart \
	    --encoder resnet18 --weights-backbone none --crop-size 256 -b 4 --lr 2e-3 \
	    --warmup-steps 20 --max-steps $(STEPS) --eval-freq 2 $(AMP) --channels-last -j 0
	$(BIN)/python unet/inference.py runs/quickstart/model_best.pth sample_data/test/images \
	    runs/quickstart/predictions -i 3
	$(BIN)/python unet/train.py --data-path sample_data --test-only \
	    --resume runs/quickstart/model_best.pth $(AMP) --channels-last -j 0
	@echo "look at runs/quickstart/test_sheet.jpg (image, truth, prediction),"
	@echo "        runs/quickstart/curves.png (loss and score) and runs/quickstart/predictions/"

# Two processes: the one that is done first takes over half of what the other has left.
test: install
	$(BIN)/python -m pytest -m "not gpu and not hosts" -n 2 --dist worksteal

# A signal would not reach a test that hangs inside CUDA or NCCL.
test-gpu: install
	$(BIN)/python -m pytest -m gpu --timeout-method=thread

# Goes on where the results end; MINUTES=600 for a night of it.
MINUTES ?= 60
torture: install
	$(BIN)/python tests/torture/run.py --budget $(MINUTES)

# Two hosts out of network namespaces, so as root; some minutes.
test-hosts: install
	$(BIN)/python -m pytest -m hosts

# On a rented machine: GPU tests, a first table and its pictures in nine minutes, and all of it as few
# files in one folder to carry home. What fails is written down there and does not end it.
OUTPUT ?= runs/benchmark_gpu
GPU_CSV := benchmarks/results/speed_cuda.csv
benchmark-gpu: install
	mkdir -p $(OUTPUT)
	test -d sample_data/train || $(BIN)/python rareplanes/sample.py -o sample_data -n 24 -j 8
	test -f sample_data/train/instances_tiled.json || \
	    $(BIN)/python preprocessing/preprocess.py sample_data -s 512 -n 8 --pack
	-timeout 230 $(BIN)/python -m pytest -m gpu --timeout-method=thread >$(OUTPUT)/tests.txt 2>&1
	@tail -n 3 $(OUTPUT)/tests.txt
	-$(BIN)/python benchmarks/run.py --quick --budget 4.5 --device cuda -o $(GPU_CSV) 2>&1 | tee $(OUTPUT)/run.txt
	-$(BIN)/python benchmarks/table.py
	-$(BIN)/python benchmarks/table.py --print >$(OUTPUT)/tables.md
	-cp $(GPU_CSV) assets/*_benchmark.png assets/scaling.png $(OUTPUT)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf sample_data runs predictions .pytest_cache .ruff_cache .mypy_cache
