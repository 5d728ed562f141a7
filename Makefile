# make demo    the main job on the shipped tiny model, from nothing: environment, installation, training, verified adapter
# make test    all tests, with their own set-up         make style    what exceeds the project's size budgets
# make gpu     the tests that need a GPU, which the others hide from themselves: autograd's threads for it do not survive forks
# make faults  recipes on several processes, launched and killed ones, faults of every kind: some four minutes
# make torture all faults that the table promises, three quarters of an hour; writes docs/TORTURE.md
# make mutants every planted bug is seen to be caught   make clean    removes the environment and the demo's output

VENV := .venv
BIN := $(VENV)/bin
LOG := $(VENV)/install.log
# The interpreter itself and not a link to it, which may go away before the environment does.
FIND_PYTHON := for p in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import os, sys; sys.version_info >= (3, 11) or sys.exit(1); print(os.path.realpath(sys.executable))' \
	2>/dev/null && break; done
# At most 8 workers: beyond that they wait for each other's start-up more than they work.
WORKERS := n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ "$$n" -le 8 ] || n=8; echo $$n

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Runs of several processes, launched and killed ones, disks that fill: they wait more than they compute, and are not among
# the tests of every edit.
FAULTS := tests/torture tests/recipes/test_faults.py tests/recipes/test_torchtune_commands.py \
	$(sort $(wildcard tests/recipes/test_*distributed.py tests/recipes/test_dpo_full.py tests/recipes/test_full_*.py)) \
	tests/test_launch.py tests/test_atomic.py tests/test_resume.py
# Each worker begins with one half of the files, in their order: what a file sets up is set up once.
PYTEST := CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -q --dist worksteal -n "$$($(WORKERS))"

.PHONY: demo help test gpu faults torture style mutants clean
.SILENT:

demo: $(VENV)/.installed
	echo "[3/3] tune run lora_single_device --config tiny/lora"
	$(BIN)/tune run lora_single_device --config tiny/lora

help:
	sed -n '/^#/!q; s/^# //p' Makefile

test: $(VENV)/.installed-test
	$(PYTEST) $(addprefix --ignore ,$(FAULTS))

gpu: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -m gpu --dist worksteal -n 4

faults: $(VENV)/.installed-test
	$(PYTEST) $(FAULTS)

torture: $(VENV)/.installed-test
	TORTURE=all $(PYTEST) tests/torture

style: $(VENV)/.installed
	$(BIN)/python scripts/style.py

mutants: $(VENV)/.installed-test
	$(BIN)/python scripts/mutants.py

clean:
	rm -rf $(VENV) build dist *.egg-info out

$(VENV)/bin/python:
	python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then \
		echo "error: no Python 3.11 or newer was found; install one, or name it: make PYTHON=/path/to/python3 demo" >&2; exit 1; \
	fi; \
	echo "[1/3] creating $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: $$python cannot make environments; its venv module is missing (on Debian: apt install python3-venv)" >&2; exit 1; }

# The stamp is newer than pyproject.toml: a second call installs nothing.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	echo "[2/3] installing torchft-recipes and PyTorch into $(VENV) (minutes the first time; log in $(LOG))"
	$(BIN)/python -m pip install -e . > $(LOG) 2>&1 || { tail -n 20 $(LOG); echo "error: the installation failed, see above" >&2; exit 1; }
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	echo "installing what the tests compare with (log in $(LOG))"
	$(BIN)/python -m pip install -e '.[test]' > $(LOG) 2>&1 || { tail -n 20 $(LOG); echo "error: the installation failed, see above" >&2; exit 1; }
	touch $@
