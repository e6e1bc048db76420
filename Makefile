# Each target sets up what it needs: a machine with python3, a C++ compiler and pip is enough.
PYTHON ?= python3
# An exact version: the plain name would take the newest build with several gigabytes of CUDA packages.
TORCH ?= torch==2.13.0
# The second generation of sentence-transformers under test: only what differs, laid over the main environment.
ST5 := sentence-transformers==5.1.2 transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2 datasets==4.0.0
ST5_NEEDS := requests==2.32.5 pillow==12.0.0
CUDA ?= 0
SECONDS ?= 60
BIN := .venv/bin
# What apt-get is run with.
ROOT := $(shell test "$$(id -u)" = 0 || echo sudo -n)
PYTEST := $(BIN)/pytest -p no:cacheprovider
INTERPRETED := $(addprefix tests/test_,ops.py edges.py attention.py search_ops.py encoder_steps.py cuda_encoder.py)
INTERPRETED += $(addprefix tests/test_,cuda_encoder_graphs.py loss_prefixes.py)
DROP_IN := $(addprefix tests/test_,drop_in.py switch.py drop_in_losses.py drop_in_matryoshka.py)
DROP_IN += $(addprefix tests/test_,drop_in_search.py drop_in_mining.py drop_in_evaluation.py training_stack.py)
DROP_IN += $(addprefix tests/test_,arguments.py drawn_calls.py faithful.py hidden_rows.py)

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: build  ## make .venv: pinned dependencies and the compiled libraries

.venv/ready: pyproject.toml setup.py Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q setuptools==84.2.1 wheel==0.47.0 ninja==1.13.2 pybind11==3.1.0
	SENTFAST_NO_EXT=1 $(BIN)/pip install -q --no-build-isolation -e '.[dev]'
	$(BIN)/pip install -q --no-deps --target .venv/st5 --upgrade $(ST5)
	$(BIN)/pip install -q --target .venv/st5 --upgrade $(ST5_NEEDS)
	touch $@

build: .venv/ready  ## compile what has changed in csrc/
	SENTFAST_CUDA=$(CUDA) $(BIN)/python setup.py -q build_ext --inplace

demo: build  ## stock against accelerated on a real model
	$(BIN)/python examples/demo.py

test: build  ## every test: both generations of sentence-transformers, every CPU tier, Triton interpreted
	SENTFAST_TEST_ST=6.2 $(PYTEST) -n 2
	TRITON_INTERPRET=1 $(PYTEST) -n 2 $(INTERPRETED) -k "triton_interpreted or not test_cuda_encoder"
	SENTFAST_TEST_ST=5.1 PYTHONPATH=$(CURDIR)/.venv/st5 $(PYTEST) -n 2 $(DROP_IN)

emulators:  ## qemu and the Arm cross compiler, by apt-get where they are not there
	command -v qemu-x86_64 && command -v qemu-aarch64 && command -v aarch64-linux-gnu-g++ || { \
	$(ROOT) apt-get -q -o Acquire::http::Timeout=30 -o Acquire::Retries=1 update && \
	$(ROOT) apt-get -q -o Acquire::http::Timeout=30 install -y --no-install-recommends qemu-user g++-aarch64-linux-gnu; }

emulate: .venv/ready  ## the C++ kernels on processors that are not here, under qemu; says what it cannot run
	$(BIN)/python tests/emulate.py

# Seconds or cases, a seed, a family, or one case by its number: tests/fuzz/run.py says what each means.
FUZZ = $(if $(CASE),--case=$(CASE)) $(if $(CASES),--cases=$(CASES)) $(if $(SEED),--seed=$(SEED)) $(if $(FAMILY),--family=$(FAMILY))
fuzz: build  ## draw cases and compare with stock: make fuzz SECONDS=60 SEED=7, or one: CASE=7:123
	$(BIN)/python tests/fuzz/run.py $(FUZZ) $(if $(CASE)$(CASES),,--seconds=$(SECONDS))

fuzz-native: .venv/ready  ## libFuzzer over the CPU kernels, for SECONDS (60); needs clang (`make clang`)
	$(BIN)/python tests/native_build.py build/fuzz-native
	build/fuzz-native/fuzz -max_len=256 -timeout=60 -max_total_time=$(SECONDS)

clang:  ## install clang with apt-get, where that is possible
	command -v clang++ || $(ROOT) apt-get install -y -q clang || echo "no clang: fuzz-native cannot run here"

ptx: build  ## compiled GPU code on the CPU: every Triton and CUDA kernel, for sm_80 and sm_90; PART=part: CI's part
	$(BIN)/python tests/ptx/run.py $(PART)

lint: .venv/ready  ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' | grep -E '\.(h|cpp|cu|cuh)$$')
	$(BIN)/mypy

format: .venv/ready  ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' | grep -E '\.(h|cpp|cu|cuh)$$')

installs:  ## install this checkout in every way, on the oldest and the newest PyTorch; downloads several gigabytes
	$(PYTHON) tests/installs.py

bench: build  ## measure this machine: benchmarks/results/<cpu>.json
	$(BIN)/python benchmarks/bench.py

soak: build  ## endurance: MINUTES=30 of mixed work in 8 threads, SEED=n
	PYTHONPATH=tests $(BIN)/python tests/soak.py --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED))

never-slower: build  ## every patched call beside stock, or with CELLS=--quick the short form; fails where one is slower
	$(BIN)/python benchmarks/never_slower.py $(CELLS)

report: .venv/ready  ## render the tables of README and docs from benchmarks/results
	$(BIN)/python benchmarks/report.py

gpu:  ## on a machine with a GPU and torch, with the python on PATH: both of the following, the second whatever the first says
	bash benchmarks/gpu.sh test; tested=$$?; bash benchmarks/gpu.sh bench && exit $$tested

gpu-test:  ## the tests of Triton and CUDA on a GPU, and compute-sanitizer; at most nine minutes
	bash benchmarks/gpu.sh test

gpu-bench:  ## the benchmarks on a GPU; at most nine minutes
	bash benchmarks/gpu.sh bench

clean:  ## remove everything that was made
	rm -rf .venv build dist sentfast.egg-info sentfast/*.so sentfast/_build.json

.PHONY: help setup build demo test ptx emulators emulate fuzz fuzz-native clang installs lint format bench never-slower soak report
.PHONY: gpu gpu-test gpu-bench clean
