#!/usr/bin/env bash
# Builds the wheel and the source distribution into `dist`, checks what they hold, and tries the wheel in an environment
# that has nothing but the wheel and its dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf dist .venv-build .venv-wheel
python3 -m venv .venv-build
.venv-build/bin/pip install -q -c constraints.txt build
.venv-build/bin/python -m build
.venv-build/bin/python tests/wheel/contents.py dist
python3 -m venv .venv-wheel
.venv-wheel/bin/pip install -q -c constraints.txt dist/*.whl
.venv-wheel/bin/python -I tests/wheel/installed.py
