# Every target sets up .venv by itself when it is missing or older than the dependency files.
.DEFAULT_GOAL := help
STUDY ?= bh_sweep
OVERRIDES = $(if $(MODEL),model=$(MODEL)) $(if $(DATA),data=$(DATA)) $(if $(LIMIT),limit=$(LIMIT))
VENV := .venv/bin
OURS := $(VENV)/python -m moe_routing
# python3 if it is new enough, else the newest that is found
FIND_PYTHON = for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done

.PHONY: venv help run week test test-all lab figures bench status publish reproduce golden check-data notebooks readme clean \
  claims book paper

help:
	@echo "make run        the main study ($(STUDY)); STUDY=smoke for a small one; MODEL=<hub id or folder> for another model"
	@echo "make test       everything CI checks: style, notebooks, package in sync, reports, pytest"
	@echo "make week       the seven-day plan; MODEL=<folder or hub id>, FLAGS=\"--only day3_4\" and its other flags"
	@echo "make status     what is done on this machine and what is published, by study"
	@echo "make check-data a small study on real WikiText-2, LAMBADA, HellaSwag and ARC-Challenge from data_dir"
	@echo "make reproduce  repeat a sample of a published study and say how far it is from the record"
	@echo "make publish    make the finished runs of STUDY its published record    make figures  write published reports again"
	@echo "make lab        JupyterLab on the book    make notebooks  export, test and clean after an edit"
	@echo "make golden     remember the smoke results anew, after a protocol was raised"
	@echo "make bench      the speed and quality claims, measured    make claims  the verdicts on the seed documents"
	@echo "make book       the book as pages: _book/index.html       make paper   report, LaTeX paper and slides"
	@echo "make clean      delete what can be made again: .venv, cache, _book"

# What is imported gets compiled then; compiling all that is installed takes a third of the time.
# Stale means other contents, not a newer date: nbdev writes pyproject.toml anew without changing it.
venv:
	@want=$$(cat pyproject.toml constraints.txt | cksum); [ "$$want" = "$$(cat .venv/ready 2>/dev/null)" ] || { \
	  python=$$($(FIND_PYTHON)); [ -n "$$python" ] || { echo "no Python 3.11 or newer was found: install one"; exit 1; }; \
	  echo "setting up .venv (a few minutes the first time)"; \
	  { [ -x $(VENV)/python ] || $$python -m venv .venv; } && \
	  $(VENV)/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev]" \
	  && echo "$$want" > .venv/ready; }

run: venv
	@$(OURS) run $(STUDY) $(OVERRIDES)

week: venv
	@$(OURS) week $(if $(MODEL),--checkpoint $(MODEL)) $(FLAGS)

check-data: venv
	@$(OURS) run check_data

publish: venv
	@$(OURS) publish $(STUDY)

reproduce: venv
	@$(OURS) reproduce $(STUDY)

status: venv
	@$(OURS) status

figures: venv
	@$(OURS) figures $(if $(filter-out file,$(origin STUDY)),$(STUDY))

claims: venv
	@$(OURS) claims

paper: venv
	@$(OURS) paper $(if $(STYLE),--style $(STYLE))

golden: venv
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(OURS) golden

bench: venv
	@$(OURS) bench

lab: venv
	@$(VENV)/jupyter lab nbs

book: venv
	@$(VENV)/python -m sphinx -q -b html docs _book && echo "book: _book/index.html"

# The tier that CI checks. `make test-all` runs every test; those that are not here yet wait for the runs of the week, of
# prediction and of the claims on the shipped model, or for the last chapters to be mended (LOG.md).
CHECKED = graph repository stats routers experts pvalue capacity metrics metrics_layers balance batch_routers patching \
  traces quality models spectra predictors prefetch corpora adapters monitor gate families collection training quantised

test: venv
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MPLBACKEND=Agg PATH="$(CURDIR)/$(VENV):$$PATH" \
	  $(VENV)/python -m pytest -n 2 --dist worksteal $(CHECKED:%=tests/test_%.py)

test-all: venv
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MPLBACKEND=Agg PATH="$(CURDIR)/$(VENV):$$PATH" \
	  $(VENV)/python -m pytest -n 2 --dist worksteal tests

notebooks: venv
	@PATH="$(CURDIR)/$(VENV):$$PATH"; export HF_HUB_OFFLINE=1; \
	  ruff format -q nbs tests && nbdev-export && nbdev-test --n-workers 2 --save --skip-folder-re runs && nbdev-clean

readme: venv
	@$(OURS) readme

clean:
	rm -rf .venv cache .snakemake _book
