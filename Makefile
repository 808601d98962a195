# make demo   the main job on data and weights of this repository
# make test   all tests
# make lint   style
#
# What they need is set up first, in .venv, and again when requirements change.

VENV := .venv
PYTHON := $(VENV)/bin/python
# Meanwhile .created has this name. Pip takes a package that it was killed over
# for a whole one, so a set-up that did not end begins anew.
UNFINISHED := $(VENV)/.unfinished
# What is built there asks for a home folder, which not every user has.
PIP := mv $(VENV)/.created $(UNFINISHED) && HOME="$${HOME:-/nonexistent}" \
  $(PYTHON) -m pip install --quiet --disable-pip-version-check
# The first of these that is there and fits makes the virtual environment.
CANDIDATES := python3.11 python3.12 python3.13 python3

.PHONY: demo test lint
.DELETE_ON_ERROR:

# The dataset is made there, as not every user has a home folder.
demo: $(VENV)/.installed
	$(PYTHON) main.py --config configs/compare.py:task=digits,methods=linear,instant,vqt,data_dir=runs/data --workdir runs/demo

test: $(VENV)/.installed-test
	$(PYTHON) -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder

lint: $(VENV)/.installed-test
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check --quiet

$(VENV)/.installed-test: requirements-test.txt requirements-serve.txt $(VENV)/.installed
	$(PIP) --requirement requirements-test.txt --requirement requirements-serve.txt \
	  --constraint constraints.txt
	@mv $(UNFINISHED) $(VENV)/.created && touch $@

$(VENV)/.installed: requirements.txt constraints.txt $(VENV)/.created
	$(PIP) --requirement requirements.txt --constraint constraints.txt
	@mv $(UNFINISHED) $(VENV)/.created && touch $@

$(VENV)/.created:
	@for python in $(CANDIDATES); do \
	  if $$python -c "import sys, ensurepip, venv; sys.exit(not (3, 11) <= \
	      sys.version_info[:2] <= (3, 13))" 2>/dev/null; then \
	    echo "$$python -m venv $(VENV)"; \
	    if [ -e $(UNFINISHED) ]; then rm -rf $(VENV)/*; fi; \
	    mkdir -p $(VENV) && touch $(UNFINISHED) && \
	    $$python -m venv $(VENV) && mv $(UNFINISHED) $@; exit; \
	  fi; \
	done; \
	echo "error: needs Python 3.11, 3.12 or 3.13 with its venv module" \
	  "(python3-venv on Debian). Or: make CANDIDATES=/path/to/python3" >&2; \
	exit 1
