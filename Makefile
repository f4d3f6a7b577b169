# Two commands to begin with: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PY := $(VENV)/bin/python
DEMO_CONFIG ?= examples/configs/oner_emoji.yaml
DEMO_MODEL ?= runs/demo/model
EMOJI := examples/data/emoji
# exit status of a run that a signal stopped and that can go on; `accelerate launch` would make 1 of it
STOPPED := 75
EVALUATE = OMP_NUM_THREADS=$(CORES) $(PY) examples/evaluate.py --model $(DEMO_MODEL) --id_column hexcode
# nproc obeys OMP_NUM_THREADS, so that is hidden from it.
CORES := $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
# Test processes x threads stay within the cores; each process takes about 1 GB.
JOBS ?= $(shell echo $$(( $(CORES) < 8 ? $(CORES) : 8 )))
SCENES ?= 40000
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_EVALUATE_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST = $(OFFLINE) OMP_NUM_THREADS=1 $(PY) -m pytest
PYTEST_OPTIONS ?=
PIP_OPTIONS ?= --constraint constraints/tested.txt
# Beside other work, threads that wait by spinning take the time of those that compute.
export OMP_WAIT_POLICY ?= passive
# glibc asks for huge pages: a training step on a CPU becomes 4 to 10 % faster (docs/performance.md).
demo momo compare benchmark evidence evidence-%: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help demo scenes icons momo test test-lowest test-newest test-slow test-transformers lint format compare evidence evidence-transfer evidence-simla evidence-codis evidence-momo fuzz scale benchmark kill-test wheel-test resume-matrix walk docs dist clean

help:
	@echo 'make demo               install, pretrain a small OneR on the embedded pairs, evaluate, draw (8 minutes, 2 cores)'
	@echo 'make scenes             SCENES=40000 composed pictures to train on, and what to judge by, in runs/scenes (3 minutes)'
	@echo 'make icons              200,000 named icons to train on and to judge by, fetched by npm, in runs/icons (6 minutes of one core)'
	@echo 'make momo               a small MoMo in three stages: emoji, composed scenes, glosses; in runs/momo_small (slow)'
	@echo 'make test               install, run the tests offline (15 minutes, 2 cores)'
	@echo 'make test-lowest        the tests on the oldest releases that setup.cfg admits, in an environment of their own'
	@echo 'make test-newest        the tests on the newest ones, likewise; what our code calls of the deprecated fails it'
	@echo 'make test-slow          the tests marked slow'
	@echo 'make test-transformers  the model tests of the installed transformers, from its source archive'
	@echo 'make kill-test          SIGKILLs of runs, exports, indexing, oner convert; a full disk and other losses (slow)'
	@echo 'make wheel-test         the wheel in a new environment, far from the checkout: commands, mistakes, 600 pictures (slow)'
	@echo 'make resume-matrix      120 ways to stop and resume, to the bit (slow)'
	@echo 'make lint | format      ruff, checking or mending'
	@echo 'make compare            all families and CLIP of the same pairs, and of equal time, three seeds (about 4 hours of one core)'
	@echo 'make evidence           the ablation table, with the CLIP baseline (slow)'
	@echo 'make evidence-transfer  OneR'\''s Table 4: half of the embedded pairs, with texts of the other half or without (slow)'
	@echo 'make evidence-simla     SIMLA'\''s Table 1 on the embedded pairs, five rows, re-ranked (slow)'
	@echo 'make evidence-codis     CODIS'\'' Table 4 on composed scenes, five rows, three seeds, re-ranked (slow)'
	@echo 'make evidence-momo      MoMo'\''s Tables 4 and 6 on scenes, emoji and glosses: each stage, three seeds (slow)'
	@echo 'make fuzz               mutated pictures, captions, files, archives, addresses, indexes: none may crash or hang (slow)'
	@echo 'make scale              memory of InfoNCE at 32k x 32k, memory and time of cached gradients (slow)'
	@echo 'make benchmark          docs/performance.json and the tables of docs/performance.md (6 minutes, 2 quiet cores)'
	@echo 'make walk               which files a picture and its caption go through from disk to loss, for each family'
	@echo 'make docs               this documentation as a site in build/site, with a reference of every public name'
	@echo 'make dist               source archive and wheel in dist/'

# The environment is remade only when the metadata changed; each set of extras leaves a stamp.
$(VENV)/bin/python:
	@set +e; found=; for p in $(PYTHON) python3 python3.13 python3.12 python3.11 python3.10 python; do \
	  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then found=$$p; break; fi; done; \
	if [ -z "$$found" ]; then \
	  echo "oner needs Python 3.10 or later on PATH; found: $$(python3 --version 2>&1 || true)" >&2; exit 1; fi; \
	echo "making $(VENV) with $$($$found --version)"; \
	$$found -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$$found -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(VENV)/.installed-%: setup.cfg pyproject.toml $(wildcard constraints/*.txt) | $(VENV)/bin/python
	$(PY) -m pip install --disable-pip-version-check $(PIP_OPTIONS) --editable '.[$*]'
	@touch $@

demo: $(VENV)/.installed-plots
	OMP_NUM_THREADS=$(CORES) $(PY) examples/pretrain.py --config $(DEMO_CONFIG) --resume || { status=$$?; \
	  if [ $$status = $(STOPPED) ]; then echo 'stopped; run it again to go on'; fi; exit $$status; }
	$(EVALUATE) --data $(EMOJI)/test_style.parquet --gallery $(EMOJI)/train.parquet --captions first
	$(EVALUATE) --data $(EMOJI)/test_concept.parquet --captions first
	$(EVALUATE) --data $(EMOJI)/train.parquet --gallery $(EMOJI)/test_style.parquet --tasks multimodal

scenes: $(VENV)/.installed-plots
	$(PY) examples/data/scenes.py runs/scenes --pairs $(SCENES) --tasks 20000 --workers $(CORES)
	$(PY) examples/data/scenes.py runs/scenes --pairs 1000 --queries 500 --workers $(CORES) \
	  --split seen unseen_pairs unseen_style unseen_concepts

runs/momo_small/vocabulary:
	test -f runs/scenes/train.parquet || $(MAKE) scenes
	$(PY) examples/data/vocabulary.py runs/momo_small/vocabulary --size 8000 \
	  --pairs $(EMOJI)/train.parquet runs/scenes/train.parquet --texts examples/data/glosses/train.parquet

momo: $(VENV)/.installed-plots | runs/momo_small/vocabulary
	for stage in 1 2 3; do OMP_NUM_THREADS=$(CORES) \
	  $(PY) examples/pretrain.py --config examples/configs/momo_small_stage$$stage.yaml --resume || exit $$?; done

icons: $(VENV)/.installed-icons
	$(PY) examples/data/icons.py runs/icons --workers $(CORES)

test: $(VENV)/.installed-test
	$(PYTEST) -n $(JOBS) --dist loadfile $(PYTEST_OPTIONS)

# PYTHON=python3.10 chooses one, for environments that are not there yet.
test-lowest:
	$(MAKE) test VENV=.venv-lowest PIP_OPTIONS='--constraint constraints/lowest.txt'

test-newest:
	rm -f .venv-newest/.installed-test
	$(MAKE) test VENV=.venv-newest PIP_OPTIONS='--upgrade --upgrade-strategy eager' PYTEST_OPTIONS=--fail-on-deprecations

test-slow: $(VENV)/.installed-all
	$(PYTEST) -m slow

kill-test: $(VENV)/.installed-test
	$(OFFLINE) OMP_NUM_THREADS=1 $(PY) tests/reliability/kill.py
	$(OFFLINE) OMP_NUM_THREADS=1 $(PY) tests/reliability/kill.py --beside --kills 50 --faults disk,read-only,sigterm,worker,process

wheel-test: $(VENV)/.installed-test
	$(PY) tests/reliability/installed.py --fresh

resume-matrix: $(VENV)/.installed-test
	$(PYTEST) -m "slow or not slow" tests/run/test_resume_matrix.py

test-transformers: $(VENV)/.installed-test
	$(PY) tests/model_tester/fetch.py
	$(PYTEST) -o addopts= -ra -n $(JOBS) --dist loadfile tests/model_tester

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

compare: $(VENV)/.installed-all
	$(PY) examples/evidence.py --table compare --seconds 240 --threads 1 --output runs/compare

evidence-simla: $(VENV)/.installed-all
	$(PY) examples/evidence.py --table simla --output runs/evidence_simla

evidence-transfer: $(VENV)/.installed-all
	$(PY) examples/data/halves.py runs/halves --glosses
	$(PY) examples/evidence.py --table transfer --output runs/evidence_transfer

runs/codis_scenes_start:
	test -f runs/scenes/train.parquet || $(MAKE) scenes
	test -f runs/scenes/train_twins.parquet || \
	  $(PY) examples/data/scenes.py runs/scenes --pairs 0 --twins 60000 --workers $(CORES)
	$(PY) examples/towers_from_oner.py examples/checkpoints/oner-scenes $@ --family codis

evidence-codis: $(VENV)/.installed-all | runs/codis_scenes_start
	$(PY) examples/evidence.py --table codis --output runs/evidence_codis

evidence-momo: $(VENV)/.installed-all | runs/momo_small/vocabulary
	$(PY) examples/evidence.py --table momo --output runs/evidence_momo

evidence: $(VENV)/.installed-all
	$(PY) examples/evidence.py

fuzz: $(VENV)/.installed-test
	$(OFFLINE) OMP_NUM_THREADS=1 $(PY) tests/reliability/fuzz_inputs.py

scale: $(VENV)/.installed-test
	$(OFFLINE) OMP_NUM_THREADS=1 $(PY) tests/reliability/scale.py

benchmark: $(VENV)/.installed-all
	$(OFFLINE) OMP_NUM_THREADS=$(CORES) $(PY) examples/benchmark.py

walk: $(VENV)/.installed-test
	@$(OFFLINE) OMP_NUM_THREADS=1 $(PY) tests/reliability/walk.py 2>/dev/null

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

dist: $(VENV)/.installed-test
	rm -rf dist
	$(PY) -c 'from setuptools import build_meta as b; b.build_sdist("dist")'
	$(PY) -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist dist/oner-*.tar.gz

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
