#!/usr/bin/env bash
# The whole suite at the oldest supported versions (constraints-oldest.txt), in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .venv-oldest
.venv-oldest/bin/pip install -q -c constraints-oldest.txt -e '.[dev]'
.venv-oldest/bin/python -m pytest "$@"
