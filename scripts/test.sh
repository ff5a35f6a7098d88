#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in -h | --help)
    cat <<'HELP'
usage: bash scripts/test.sh [PYTEST ARGUMENTS]

Sets up .venv where needed (needs Python 3.11 to 3.13 and g++), then runs ruff, mypy and the tests.

  bash scripts/test.sh                       everything but the slow tests
  bash scripts/test.sh -m slow               the slow tests
  bash scripts/test.sh -m ''                 all of them
  bash scripts/test.sh tests/ops -k chunked  some of them

Environment: PYTHON (interpreter), VENV (folder of the environment), JOBS (tests at once, default 2).
HELP
    exit
    ;;
esac

. scripts/setup_env.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .
mypy
exec python -m pytest -n "${JOBS:-2}" --dist loadfile "$@"
