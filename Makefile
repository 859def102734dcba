# make demo   a small run through every stage on synthetic faces, on this machine's CPU or GPUs
# make test   the test suite, but for what is slow
# make slow   the rest of it: more worlds, launchers and ways to end
# make faults every fault that a run survives or names, with a table
# make lint   ruff
# Each makes .venv first and installs the pinned requirements into it.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
RANKS ?= 2
DEMO := runs/demo
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test slow faults lint clean-demo

demo: .venv/installed | $(DEMO)/shards $(DEMO)/heldout
	rm -f $(DEMO)/summary.json
	deepspeed --num_gpus $(RANKS) --module train --config train/recipes/demo.yaml --deepspeed_config ds_configs/zero1_bf16.json \
	    data.path=$(DEMO)/shards output=$(DEMO) eval.images=$(DEMO)/heldout eval.pairs=$(DEMO)/pairs.txt
	@test -f $(DEMO)/summary.json  # the launcher's exit code is 0 even where a rank was killed

# 200 identities to train on; 60 others, drawn from the same distribution and never trained on, to verify with.
$(DEMO)/shards: | .venv/installed $(DEMO)/faces
	python -m data_pipeline pack $(DEMO)/faces $@ --shards 4

$(DEMO)/faces: | .venv/installed
	mkdir -p $(DEMO)
	python -m data_pipeline synthetic $@ --identities 200 --images 24

$(DEMO)/heldout: | .venv/installed
	mkdir -p $(DEMO)
	python -m data_pipeline synthetic $@ --identities 60 --images 8 --first-identity 1000 \
	    --pairs $(DEMO)/pairs.txt --folds 10 --pairs-per-fold 60

clean-demo:
	rm -rf $(DEMO)

test: .venv/installed-dev
	python -m pytest --numprocesses 2 -m "not slow"  # two tests at a time; many start ranks of their own

slow: .venv/installed-dev
	python -m pytest --numprocesses 2 -m slow

faults: .venv/installed-dev
	python -m pytest --numprocesses 2 tests/faults

lint: .venv/installed-dev
	ruff check .
	ruff format --check .

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch $@
