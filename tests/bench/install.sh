#!/usr/bin/env bash
# Does `make` install on a machine that is not ours? In an empty folder, with pip's configuration set aside; minutes.
#   bash tests/bench/install.sh           torch's CPU build from PyTorch's own index
#   bash tests/bench/install.sh WHEEL     the same wheel, or a folder that has it, where that index cannot be reached
set -euo pipefail
wheel=${1:+--find-links $(realpath "$1")}
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp Makefile requirements-cpu.txt "$folder"
cd "$folder"
export PIP_CONFIG_FILE=/dev/null
unset PIP_FIND_LINKS PIP_EXTRA_INDEX_URL PIP_CONSTRAINT
torch=$(sed -n 's/^torch = //p' Makefile)
index=${wheel:-$(sed -n 's/^torch_index = //p' Makefile)}
python3 --version

# torch alone, then what the rest would be. The folder's .venv has no mark that it is ready: `make` builds it anew.
SECONDS=0
python3 -m venv .venv
.venv/bin/python -m pip install --quiet --no-deps $index "$torch"
would=$(.venv/bin/python -m pip install --dry-run -r requirements-cpu.txt | sed -n 's/^Would install //p')
echo "resolves: $torch, then $(wc -w <<< "$would") packages from the registry alone, $SECONDS s"

SECONDS=0
make .venv/ready torch_index="$index"
echo "installs: $SECONDS s, $(du -sh .venv | cut -f 1)"
.venv/bin/python -W ignore -c "import torch, transformers, vllm
print('imports: torch', torch.__version__, 'transformers', transformers.__version__, 'vllm', vllm.__version__)"
