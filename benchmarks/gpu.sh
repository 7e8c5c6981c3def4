#!/usr/bin/env bash
# Everything that only a GPU can tell, in at most eight minutes: see docs/performance.md, "On a GPU".
#
#   bash benchmarks/gpu.sh OUT [--tiny] [--budget SECONDS] [--sections NAME ...] [--wheels FOLDER]
#
# The variable PYTHON names another interpreter than python3.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m gpu.run "$@"
