#!/usr/bin/env bash
# What every launch file runs, once on each host: one process that uses all of the host's devices.
# CONFIG and WORKDIR come from the launch file; arguments are more flags, e.g. --config.train.steps=1000.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec python -m cde_jax.main --config="$CONFIG" --workdir="$WORKDIR" --distributed "$@"
