#!/usr/bin/env bash
# On a machine with a GPU and no network, in less than ten minutes: build, test, sanitize, tune,
# measure. Writes <gpu>.json to $OUT, or to bench/results/, and prints a short table last.
# `bench/gpu_suite.sh --help` lists the options; --dry-run shows on any machine that it works.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="python:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m bench.suite "$@"
