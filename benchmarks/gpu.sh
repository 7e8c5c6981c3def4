#!/usr/bin/env bash
# Checks and measurements that need a GPU, in about ten minutes: see docs/performance.md, "On a GPU".
#
#   bash benchmarks/gpu.sh OUT [--tiny] [--budget SECONDS] [--sections NAME ...] [--wheels FOLDER]
#
# The variable PYTHON selects the interpreter; the default is python3.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m gpu.run "$@"
