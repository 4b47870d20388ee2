# make install | demo | libero | mt50 | test | check | bench: each creates .venv when it is missing and installs only when the lock changed.
# What an interrupted installation left, or an environment without pip, is made anew: packages may be there in part.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BEGAN := .venv.installing
export HF_HUB_OFFLINE ?= 1

.PHONY: install demo libero mt50 test test-long check format bench bench-gpu schema lock clean

install: $(STAMP)

$(STAMP): constraints.txt pyproject.toml packages/client/pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11-3.13, or name one: make PYTHON=python3.12"; exit 2; }
	@{ test ! -e $(BEGAN) && $(BIN)/python -m pip --version >/dev/null 2>&1; } || rm -rf $(VENV)
	@date +%s > $(BEGAN)
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable packages/client --editable '.[dev]'
	@echo $$(( $$(date +%s) - $$(cat $(BEGAN)) )) > $(STAMP)
	@rm $(BEGAN)

demo: $(STAMP)
	$(BIN)/paligemma-vla demo --install_seconds $$(cat $(STAMP))

# Hours; each goes on where an interrupted call stopped. SEED=1 is another seed, ARGS=--long adds what takes hours more.
libero: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[libero]'
	$(BIN)/paligemma-vla benchmark libero --seed $(or $(SEED),0) $(ARGS)

mt50: $(STAMP)
	$(BIN)/paligemma-vla benchmark mt50 --seed $(or $(SEED),0) $(ARGS)

test: $(STAMP)
	$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not long"

test-long: $(STAMP)
	$(BIN)/pytest -m long

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

# On a machine with one GPU, whose own python3 has torch: under ten minutes; benchmarks/gpu/full_size.sh says what to bring along.
bench-gpu:
	benchmarks/gpu/full_size.sh

# The JSON schema that editors use for configs/*.yaml.
schema: $(STAMP)
	$(BIN)/python -m paligemma_vla.config > configs/vla_config.schema.json

# Pin what is installed now.
lock: $(STAMP)
	$(BIN)/python -m pip freeze --exclude-editable > constraints.txt

clean:
	rm -rf $(VENV) $(BEGAN) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
