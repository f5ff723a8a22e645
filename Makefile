PYTHON ?= python3
VENV := .venv
CPU_VENV := .venv-cpu
LOWEST_VENV := .venv-lowest
DOCS_VENV := .venv-docs
BIN := $(VENV)/bin
# byte code is made of what is imported, when it is, and not of all that is installed
PIP_FLAGS := --quiet --no-compile
# what is compiled, and how: environments are installed again where it changed
COMPILED := setup.py $(wildcard autobatch/memory/*.pxd) $(patsubst %.pxd,%.py,$(wildcard autobatch/memory/*.pxd))
CORE := $(addprefix tests/,accumulate devices levers tuning workload test_public_api.py)

.PHONY: demo docs test test-cpu test-lowest lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/autobatch probe timm:resnet50 --target 256 --gpu t4 --autocast fp16
	$(BIN)/autobatch probe "hf:gpt2?seq=1024" --target 256 --gpu a100-40gb --autocast bf16 --report demo-report
	@echo
	@echo "Open demo-report/report.html in a browser."

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto

# the core alone, on the CPU build of PyTorch where the package index offers one; what takes seconds
# is for the default build, and so is what stands on the core: commands, pages, reports
test-cpu: $(CPU_VENV)/test.stamp
	$(CPU_VENV)/bin/python -m pytest -n auto -m "not slow" $(CORE)

# the same on the oldest PyTorch that pyproject.toml takes, and what its CUDA code is part of; of what
# takes seconds, operators and ceilings
test-lowest: $(LOWEST_VENV)/test.stamp
	$(LOWEST_VENV)/bin/python -m pytest -n auto -m "not slow" $(CORE) tests/bench tests/equivalence
	$(LOWEST_VENV)/bin/python -m pytest -n auto -m slow -k "operators or ceilings" tests/bench

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the site, in build/site; links and the docstrings' references are checked
docs: $(DOCS_VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --site-dir build/site

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) --upgrade pip

$(VENV)/demo.stamp: pyproject.toml $(COMPILED) | $(VENV)/bin/python
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable ".[timm,hf]"
	touch $@

$(VENV)/test.stamp: pyproject.toml $(COMPILED) | $(VENV)/bin/python
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable ".[timm,hf,lightning,lora,examples,test,lint]"
	touch $@ $(VENV)/demo.stamp

$(CPU_VENV)/torch.stamp:
	$(PYTHON) -m venv $(CPU_VENV)
	$(CPU_VENV)/bin/python -m pip install $(PIP_FLAGS) --upgrade pip
	$(CPU_VENV)/bin/python -m pip install $(PIP_FLAGS) "torch==2.13.0"
	touch $@

$(CPU_VENV)/test.stamp: pyproject.toml $(COMPILED) | $(CPU_VENV)/torch.stamp
	$(CPU_VENV)/bin/python -m pip install $(PIP_FLAGS) --editable ".[hf,examples,test]"
	touch $@

$(LOWEST_VENV)/torch.stamp:
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/python -m pip install $(PIP_FLAGS) --upgrade pip
	$(LOWEST_VENV)/bin/python -m pip install $(PIP_FLAGS) "torch==2.10.0"
	touch $@

$(LOWEST_VENV)/test.stamp: pyproject.toml $(COMPILED) | $(LOWEST_VENV)/torch.stamp
	$(LOWEST_VENV)/bin/python -m pip install $(PIP_FLAGS) --editable ".[hf,examples,test]"
	touch $@

$(DOCS_VENV)/docs.stamp: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install $(PIP_FLAGS) --upgrade pip
	$(DOCS_VENV)/bin/python -m pip install $(PIP_FLAGS) --group docs
	touch $@

clean:
	rm -rf $(VENV) $(CPU_VENV) $(LOWEST_VENV) $(DOCS_VENV) demo-report build *.egg-info autobatch/memory/*.so
