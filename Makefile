# Development of noether-init-core. `make env` needs Python 3.11 or newer and pip, nothing else.

.DEFAULT_GOAL := help
.PHONY: help env browser git-tools demo test test-pythons test-noether test-real lint docs bench house faults charts pictures transcripts clean

# The first Python that is new enough; PYTHON3=... chooses another.
PYTHON3 ?= $(shell for candidate in python3 python3.13 python3.12 python3.11; do \
	"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$candidate" && break; done)
PYTHON := .venv/bin/python
STAMP := .venv/.installed
PLUGINS := $(dir $(wildcard plugins/*/pyproject.toml))

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 16

env: $(STAMP)  ## Create .venv with everything for development

# Where Python comes without ensurepip, the pip that is there installs one into the environment. antlr4, which OmegaConf
# needs, is a source archive: setuptools builds it, from release 70.1 on without the package wheel.
$(STAMP): pyproject.toml constraints.txt $(PLUGINS:%=%pyproject.toml)
	@test -n "$(PYTHON3)" || { echo "Python 3.11 or newer is needed; PYTHON3=... names it" >&2; exit 2; }
	test -x $(PYTHON) || "$(PYTHON3)" -m venv .venv || { "$(PYTHON3)" -m venv --clear --without-pip .venv \
		&& "$(PYTHON3)" -m pip --python $(PYTHON) install --quiet pip; }
	$(PYTHON) -m pip install --quiet --constraint constraints.txt hatchling editables setuptools
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --no-build-isolation --no-deps $(PLUGINS:%=--editable ./%)
	touch $(STAMP)

demo: env  ## Train, kill, resume, compare, warm-start; draws the picture
	$(PYTHON) examples/digits/demo.py

# Pages are tested in a real browser. Where it is not there and cannot be installed, those tests are skipped and say so.
browser:  ## Install Chromium where Debian's packages can be installed
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; } \
		|| echo "no Chromium, and it cannot be installed here: tests of pages are skipped" >&2

# Pointers of git are followed by the tools themselves, where they are there; else those tests are skipped and say so.
git-tools:  ## Install git-lfs and git-annex where Debian's packages can be installed
	@{ command -v git-lfs && command -v git-annex; } >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends git-lfs git-annex >/dev/null; } \
		|| echo "no git-lfs or git-annex, and they cannot be installed here: tests of pointers are skipped" >&2

# SHUFFLE=1 (any text) runs them in a random order, the same one for the same text.
test: env browser git-tools  ## Run the tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(SHUFFLE),--shuffle=$(SHUFFLE))

test-pythons: env  ## Run the tests that need no torch on other Pythons
	$(PYTHON) tools/pythons.py

test-noether: env  ## Compare with what Noether itself has written and computed
	$(PYTHON) -m pytest tests/noether tests/files/test_reader_noether_files.py

test-real: env  ## Read files that other software writes, in .venv-real (6.5 GB)
	$(PYTHON) tools/real.py

lint: env  ## Check style and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

docs: env  ## Build the site into site/; warnings are errors
	$(PYTHON) -m sphinx --fail-on-warning --keep-going --quiet -b html docs site

# What was counted stays in build/faults: a campaign that was stopped goes on; `make faults WORK=...` begins another one.
WORK := build/faults
faults: env  ## Put in faults by the thousand (33 minutes on two cores); writes table and picture
	@$(PYTHON) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[faults]' \
		|| echo "atheris cannot be installed here: headers are changed blindly" >&2
	PYTHONPATH=tests $(PYTHON) -m faults.campaign --work $(WORK) --page docs/maintain/faults.md

bench: env  ## Measure loading and saving against other ways; writes benchmarks/load.md
	$(PYTHON) benchmarks/load.py
	$(PYTHON) benchmarks/plan.py
	$(PYTHON) benchmarks/kinds.py
	$(PYTHON) benchmarks/look.py
	$(PYTHON) benchmarks/sets.py

house: env  ## Count code lines, files that a question opens, and looks at the disk
	$(PYTHON) tools/house.py

pictures: demo browser  ## Take the pictures of pages that the documentation shows
	$(PYTHON) tools/pictures.py runs/demo

transcripts: env  ## Write what the commands print into docs/transcripts/
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(PYTHON) -m support.transcripts docs/transcripts

charts:  ## Build the bundle that pages draw with (Node.js and npm)
	cd tools/charts && npm ci --no-audit --no-fund && npm run build

clean:  ## Remove what was built
	rm -rf .venv site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis tools/charts/node_modules
