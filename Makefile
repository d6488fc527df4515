# The two commands of the README: `make demo` and `make test`. Each makes its own virtual environment.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

bin := $(VENV)/bin
pip := $(bin)/python -m pip --disable-pip-version-check --quiet install
sources := setup.py pyproject.toml $(shell find csrc kernels -type f)

.PHONY: demo test clean

demo: $(VENV)/.installed-demo
	$(bin)/fmft demo

test: $(VENV)/.installed-dev
	$(bin)/python -m pytest

$(VENV)/.installed-demo: $(VENV)/.torch $(sources)
	$(pip) -e ".[train]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch $(sources)
	$(pip) -e ".[dev]"
	@touch $@ $(VENV)/.installed-demo

# torch comes first and alone: what follows finds it and does not choose another.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(pip) "$(TORCH)"
	@touch $@

clean:
	rm -rf build dist *.egg-info fmft_fast/*.so
