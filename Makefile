# make help lists the targets. Everything runs in .venv, which each target makes and fills by itself.
PYTHON ?= python3
VENV := .venv
TORCH ?=
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
# pytest-xdist runs a worker on each core, of some 2 GB. pytest-benchmark times nothing here and would warn of them.
PYTEST := $(PY) -m pytest -n logical --maxprocesses 8 --dist worksteal -p no:benchmark
SOURCES := $(wildcard csrc/*/*.h csrc/*/*/*.h csrc/*/*.cpp csrc/*/*.cu)
FORMATTED := $(SOURCES) $(wildcard tests/*.h tests/*/*.cpp)

.DEFAULT_GOAL := help
.PHONY: demo train-clip train-timesformer train-captioning train-retrieval train-av-fusion help env test test-slow test-torch lint format bench \
	gpu-check docs clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

env: $(STAMP) ## Make .venv, install the dependencies, build the kernels

# Built against the torch that is installed: build isolation would fetch a second one.
$(STAMP): pyproject.toml setup.py $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "torch$(if $(TORCH),==$(TORCH),>=2.10)" torchvision numpy "setuptools>=77"
	$(PY) -m pip install -q --no-build-isolation -e ".[bench,dev,models]"
	touch $@

test: env ## Run the fast tests: parity, memory, compile checks, models
	$(PYTEST) tests -m "not slow"

test-slow: env ## Run the rest: every compiled form, every dtype in the interpreter
	$(PYTEST) tests -m slow

# In a clone of its own, whose environment and build stay for the next time.
test-torch: ## Run both sets on the last commit under another torch: make test-torch TORCH=2.10.0
	$(if $(TORCH),,$(error name the release: make test-torch TORCH=2.10.0))
	test -d build/torch-$(TORCH) || git clone -q . build/torch-$(TORCH)
	git -C build/torch-$(TORCH) pull -q
	$(MAKE) -C build/torch-$(TORCH) test test-slow

lint: env ## ruff, mypy and clang-format, without changing a file
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)

format: env ## Let ruff and clang-format rewrite the files
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $(FORMATTED)

demo: env ## Train CLIP on emoji in 10 minutes on two cores, evaluate it, compare the losses, draw pictures
	$(PY) -m models.clip demo

# The same command goes on where a stopped run was; more drawing styles come by npm where it is installed.
train-clip: env ## Train the larger CLIP for as long as it takes (resumable), then evaluate it
	$(PY) -m models.clip train --out runs/clip --preset small --text-encoder minilm --styles all --steps 1500 --batch-size 512 \
		--views 1 --lr 2e-3 --warmup 60 --ema 0.998 --augment 0.5 --checkpoint-every 100
	$(PY) -m models.clip eval runs/clip

# Each command goes on where a stopped run was.
train-timesformer: env ## Train TimeSformer on moving digits and on KanjiVG, evaluate both, compare attentions (resumable)
	$(PY) -m models.timesformer train --out runs/timesformer-digits --data digits --preset tiny --steps 1200 \
		--warmup 100 --ema 0.998
	$(PY) -m models.timesformer eval runs/timesformer-digits
	$(PY) -m models.timesformer train --out runs/timesformer-kanji --data kanji --preset tiny --steps 2000 \
		--warmup 100 --ema 0.998 --smoothing 0.1 --drop-path 0.1
	$(PY) -m models.timesformer eval runs/timesformer-kanji
	$(PY) -m models.timesformer ablation --out runs/timesformer-ablation --data digits --preset tiny --steps 800 \
		--warmup 80 --ema 0.998

# The same command goes on where a stopped run was.
train-captioning: env ## Train the captioner on emoji until CIDEr on a held-out style gets no better, then evaluate it
	$(PY) -m models.captioning train --out runs/captioning --styles all --validation-style fluent-flat --steps 1000 \
		--batch-size 256 --lr 2e-3 --warmup 60 --ema 0.998 --evaluate-every 100 --checkpoint-every 100
	$(PY) -m models.captioning eval runs/captioning

# Each command goes on where a stopped run was.
train-retrieval: env ## Train the retrieval model on emoji in four languages, evaluate it, compare the losses (resumable)
	$(PY) -m models.retrieval train --out runs/retrieval --styles all --validation-style fluent-flat --steps 1400 \
		--mining hardest --mining-warmup 500 --ema 0.998 --evaluate-every 100 --checkpoint-every 50
	$(PY) -m models.retrieval eval runs/retrieval
	$(PY) -m models.retrieval search "smiling cat" "lachende Katze" "chat qui sourit" "gato sonriente" \
		--run runs/retrieval --out runs/retrieval/search.png
	$(PY) -m models.retrieval compare --out runs/compare --validation-style fluent-flat --batch-size 256 --steps 300 \
		--mining-warmup 150 --ema 0.99 --keyword-share 0.15 --evaluate-every 50

# A finished run is not repeated, and a stopped one goes on where it was.
train-av-fusion: env ## Train and compare audio-visual fusions and both modalities alone, five seeds each (resumable)
	$(PY) -m models.av_fusion compare --out runs/av-fusion --seeds 5

bench: env ## Compare the kernels with what users run today, resumable by the cell; numbers into docs/figures, tables into the pages
	$(PY) -m benchmarks.report
	$(PY) -m benchmarks.report --draw --tables

gpu-check: env ## Parity, speed and memory on this machine's GPU; says so if there is none
	$(PY) -m benchmarks.gpu_check

docs: env ## Check that code blocks, links and tables of README.md and docs/ hold
	$(PY) -m pytest tests/docs

clean: ## Remove what was built
	rm -rf build mmkernels/_C*.so *.egg-info $(STAMP)
