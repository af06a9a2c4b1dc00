# make train   install, then the main job on the embedded text          make lint    ruff, mypy
# make test    install, then every test                                 make bench   benchmarks
# make soak    the long campaigns                                       make clean   remove caches
PYTHON := $(shell command -v python3.11 || command -v python3)
PY     := .venv/bin/python
STAMP  := .venv/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
PIP    := $(PY) -m pip install --disable-pip-version-check --no-warn-script-location --quiet --progress-bar off -c constraints.txt

.PHONY: train test soak lint bench clean install
train: install
	$(PY) train.py experiment=smoke eval.sample="The country"

test: install
	$(PY) -m pytest --ignore tests/distributed -q -n logical --dist worksteal
	$(PY) -m pytest tests/distributed -q -n logical --dist loadscope

soak: install
	NANOMUON_SOAK=1 $(PY) -m pytest -q --timeout 7200

bench: install
	$(PIP) -e '.[bench]'
	$(PY) scripts/benchmark_polar.py
	$(PY) scripts/benchmark_data.py
	$(PY) scripts/benchmark_traffic.py
	$(PY) scripts/benchmark_checkpoint.py
	$(PY) -m torch.distributed.run --nproc-per-node 2 scripts/benchmark_optim.py
	@echo "against nanoGPT: python scripts/benchmark_step.py --nanogpt FOLDER, a checkout of karpathy/nanoGPT"

lint: install
	$(PY) -m ruff check .
	$(PY) -m mypy --strict optim
	$(PY) -m mypy common.py data trainer train.py examples

install: $(STAMP)

# torch comes first and alone, so that no other package draws in a build for other hardware.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(PY) || { echo "creating .venv with $(PYTHON)"; $(PYTHON) -m venv .venv; }
	@echo "installing torch"
	@$(PIP) torch
	@echo "installing what the trainer and the tests need"
	@$(PIP) -e '.[dev]'
	@rm -f .venv/.installed-* && touch $(STAMP)

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
