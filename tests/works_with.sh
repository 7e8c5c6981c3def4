#!/usr/bin/env bash
# The tests with other libraries (docs/works-with.md), in an environment of their own: the extra `works-with` takes longer
# to install than the suite has time for.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .venv-works-with
.venv-works-with/bin/pip install -q -c constraints.txt -e '.[dev,works-with]'
.venv-works-with/bin/python -m pytest tests/works_with -m "slow or not slow" "$@"
