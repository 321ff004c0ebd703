# Every target sets up .venv by itself when it is missing or older than the dependency files.
.DEFAULT_GOAL := help
STUDY ?= bh_sweep
OVERRIDES = $(if $(MODEL),model=$(MODEL)) $(if $(DATA),data=$(DATA)) $(if $(LIMIT),limit=$(LIMIT))
VENV := .venv/bin
# python3 if it is new enough, else the newest that is found
FIND_PYTHON = for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done

.PHONY: venv help run week test lab figures bench status confirm check check-data notebooks readme clean claims book paper

help:
	@echo "make run          the main study ($(STUDY)); STUDY=smoke for a small one; MODEL=allenai/OLMoE-1B-7B-0924 for another model; FRESH=1 redoes stale runs"
	@echo "make week         the seven-day plan; MODEL=<folder or hub id>, FLAGS=\"--only day3_4\" and the seed's other flags"
	@echo "make test         everything CI checks: notebooks, package in sync, README, pytest"
	@echo "make paper        report, LaTeX paper and slides from the finished runs; STYLE=icml2026 or neurips_2026"
	@echo "make status       runs finished, failed, stale and running, by study"
	@echo "make confirm      repeat a sample of STUDY's stale runs; where every bit agrees, its results count again"
	@echo "make check-data   a small study on real WikiText-2, LAMBADA, HellaSwag and ARC-Challenge from data_dir of settings.ini"
	@echo "make lab          JupyterLab on the book        make figures   draw every study again from its runs; STUDY=name for one"
	@echo "make book         the book as pages to read and search offline: _book/index.html"
	@echo "make bench        the speed and quality claims, measured    make notebooks  export, test and clean after an edit"
	@echo "make clean        delete what can be made again: .venv, cache, _book"

# What is imported gets compiled then; compiling all that is installed takes a third of the time.
# Stale means other contents, not a newer date: nbdev writes pyproject.toml anew without changing it.
venv:
	@want=$$(cat pyproject.toml constraints.txt | cksum); [ "$$want" = "$$(cat .venv/ready 2>/dev/null)" ] || { \
	  python=$$($(FIND_PYTHON)); [ -n "$$python" ] || { echo "no Python 3.11 or newer was found: install one"; exit 1; }; \
	  echo "setting up .venv (a few minutes the first time)"; \
	  { [ -x $(VENV)/python ] || $$python -m venv .venv; } && \
	  $(VENV)/python -m pip install -qq --disable-pip-version-check --no-compile -c constraints.txt -e ".[dev]" && echo "$$want" > .venv/ready; }

run: venv
	@$(VENV)/python -m moe_routing run $(STUDY) $(OVERRIDES) $(if $(FRESH),--fresh)

week: venv
	@$(VENV)/python -m moe_routing week $(if $(MODEL),--checkpoint $(MODEL)) $(FLAGS)

check-data: venv
	@$(VENV)/python -m moe_routing run check_data $(if $(FRESH),--fresh)

confirm: venv
	@$(VENV)/python -m moe_routing confirm $(STUDY)

status: venv
	@$(VENV)/python -m moe_routing status

figures: venv
	@$(VENV)/python -m moe_routing report $(if $(filter-out file,$(origin STUDY)),$(STUDY) $(OVERRIDES))

claims: venv
	@$(VENV)/python -m moe_routing claims

paper: venv
	@$(VENV)/python -m moe_routing paper $(if $(STYLE),--style $(STYLE))

lab: venv
	@$(VENV)/jupyter lab nbs

book: venv
	@$(VENV)/python -m moe_routing book

bench: venv
	@$(VENV)/python -m moe_routing bench

check: venv
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/python -m pytest -n 2 --dist worksteal tests

test: venv
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(VENV):$$PATH" $(VENV)/nbdev-test --n-workers 2 --pause .2
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(VENV):$$PATH" $(VENV)/python -m pytest -n 2 --dist worksteal tests

notebooks: venv
	@PATH="$(CURDIR)/$(VENV):$$PATH"; export HF_HUB_OFFLINE=1; nbdev-export && nbdev-test --n-workers 2 --save --skip-folder-re runs && nbdev-test nbs/runs && nbdev-clean && $(VENV)/python -m moe_routing readme

readme: venv
	@$(VENV)/python -m moe_routing readme

clean:
	rm -rf .venv cache .snakemake _book
