#!/usr/bin/env bash
# Before a Dagster server starts: write its dagster.yaml for the settings there are; the daemon also sizes the pools.
set -euo pipefail

pools=()
[[ "${1:-}" == dagster-daemon ]] && pools=(--pools)
python -m orchestration.instance "$DAGSTER_HOME" "${pools[@]}"
exec "$@"
