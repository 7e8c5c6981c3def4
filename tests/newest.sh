#!/usr/bin/env bash
# The whole suite with the newest release of everything: no constraints, and beyond the bound on transformers in
# pyproject.toml. Run it when transformers, peft or torch has a release. Where it passes, raise the bound.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .venv-newest
.venv-newest/bin/pip install -q -e '.[dev]'
# pip keeps to the bound above. Here it says that the bound is broken, and goes on.
.venv-newest/bin/pip install -q --upgrade torch transformers peft accelerate datasets safetensors huggingface_hub
.venv-newest/bin/pip list 2>/dev/null | grep -iE '^(torch|transformers|peft|accelerate|datasets|safetensors|huggingface.hub) '
.venv-newest/bin/python -m pytest "$@"
