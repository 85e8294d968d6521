# make install   .venv with lsquant (editable) and all extras, pinned by constraints.txt
# make demo      digits at 2 bits, integer-only: train, export, verify, report (about a minute on 2 cores)
# make test      the tests; make test-all adds the slow ones and make test-sanitizers
# make test-engines      the tests with each engine forced
# make test-sanitizers   the tests with the C++ engine built under AddressSanitizer and UndefinedBehaviorSanitizer
# make package   the wheel, built, installed elsewhere and used
# make bench     speed and memory against the float model and others: results/bench, and the tables of docs/benchmarks.md
# make long-runs DATA=... INIT=... TEACHER=...   goes on with the long CIFAR-10 runs, niced, on one core (docs/cifar10.md)
# make long-runs-commit   commits the state of the run in progress, from which another machine goes on, and the pages of results
# make fuzz      random networks, from seed FIRST to before END: FIRST=0 END=200 (CONTRIBUTING.md)
# make cases CASES=...   runs every script of a folder, each alone in an empty folder, and prints what it prints
# make lint      ruff and pyright; make docs: the documentation site in site/; make figure: docs/figures
#
# PYTHON=python3.12   the interpreter that .venv is made from (3.11 or later)
# CONSTRAINTS=        empty: take the newest versions instead of the pinned ones
# BENCH=...           arguments of benchmarks/speed.py, for instance BENCH='resnet20 --threads 1'
# FUZZ=...            more arguments of tests/fuzz/run.py, for instance FUZZ="--without late"
# TORCH=...           another way to name torch to pip, for instance the path of a wheel
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
TORCH ?= torch
EXTRAS ?= all
JOBS ?= auto
DEMO ?= runs/digits-integer
BENCH ?= --profile
DATA ?= data
INIT ?= resnet20.safetensors
TEACHER ?=
FIRST ?= 0
END ?= 200
FUZZ ?=
CASES ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# each test process computes on one thread; JOBS processes use the cores
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.PHONY: install demo test test-all test-engines test-sanitizers fuzz cases bench long-runs long-runs-commit lint docs figure package clean
.DELETE_ON_ERROR:

install: $(STAMP)

# torch comes first and alone, and the package is built without isolation: no build environment fetches a second torch
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("lsquant needs Python 3.11 or later, not %d.%d: make install PYTHON=python3.11" % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) $(TORCH)
	$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)
	$(BIN)/lsquant train digits --bits 2 --integer-only --fold-epochs 3 --out $(DEMO) --overwrite
	$(BIN)/lsquant export $(DEMO)
	$(BIN)/lsquant verify $(DEMO)
	$(BIN)/lsquant report $(DEMO)

test: $(STAMP)
	$(PYTEST)

test-all: $(STAMP)
	$(PYTEST) -m ""
	$(MAKE) test-sanitizers

# with each engine that runs on a CPU forced, and with the instructions of AVX2 only; benchmarks and pages do not depend on them
test-engines: $(STAMP)
	LSQUANT_ENGINE=eager $(PYTEST) --ignore tests/project/test_packaging.py --ignore tests/benchmarks/test_benchmarks.py
	LSQUANT_ENGINE=cpp $(PYTEST) --ignore tests/project/test_packaging.py --ignore tests/benchmarks/test_benchmarks.py
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) --ignore tests/project/test_packaging.py --ignore tests/benchmarks/test_benchmarks.py

# PyTorch itself leaks, and is loaded into an interpreter without sanitizers: their library has to come first
SANITIZED := LSQUANT_SANITIZE=1 LSQUANT_ENGINE=cpp \
	ASAN_OPTIONS=detect_leaks=0:log_path=$(CURDIR)/build/sanitizer UBSAN_OPTIONS=print_stacktrace=1:log_path=$(CURDIR)/build/sanitizer \
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so.6)"

test-sanitizers: $(STAMP)
	mkdir -p build && rm -f build/sanitizer.*
	LSQUANT_SANITIZE=1 $(BIN)/python -c 'from lsquant.kernels.cpp.build import library; library()'
	env $(SANITIZED) $(PYTEST) --ignore tests/project/test_packaging.py --ignore tests/benchmarks || { cat build/sanitizer.* || true; exit 1; }

fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py $(FIRST) $(END) $(FUZZ)

cases: $(STAMP)
	@test -n "$(CASES)" || { echo "make cases CASES=FOLDER: a folder with *.py and *.sh" >&2; exit 2; }
	@$(BIN)/python tests/run_cases.py "$(CASES)"

# takes long, and wants a machine that does nothing else
bench: $(STAMP)
	$(BIN)/python benchmarks/speed.py $(BENCH)
	$(BIN)/python benchmarks/tables.py

long-runs: $(STAMP)
	OMP_NUM_THREADS=1 nice -n 19 $(BIN)/python benchmarks/long_runs.py --data $(DATA) --init $(INIT) $(if $(TEACHER),--teacher $(TEACHER))

LONG_RUNS := results/long docs/results.md docs/pilot.md docs/figures/transition-rate.svg

long-runs-commit: $(STAMP)
	$(BIN)/python benchmarks/long_runs.py --keep-state
	$(BIN)/python benchmarks/results.py
	git add --all $(LONG_RUNS)
	git diff --cached --quiet -- $(LONG_RUNS) || git commit -m "Long runs: results and state so far" -- $(LONG_RUNS)

# the wheel, built, checked and installed into an environment of its own; the digits line run with it from elsewhere
package: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "" tests/project/test_packaging.py

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks studies examples
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

figure: $(STAMP)
	$(BIN)/lsquant figure --out docs/figures --bits 2

clean:
	rm -rf $(VENV) site build src/*.egg-info .pytest_cache .ruff_cache .hypothesis
