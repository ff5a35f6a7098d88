#!/usr/bin/env bash
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in -h | --help)
    cat <<'HELP'
usage: bash scripts/test.sh [PYTEST ARGUMENTS]

Sets up .venv where needed (needs Python 3.11 or later), then runs ruff, mypy and the tests.

  bash scripts/test.sh                       everything but the slow tests
  bash scripts/test.sh -m slow               the slow tests
  bash scripts/test.sh -m nightly            variants of tests, examples, benchmarks, sweeps, mutated files
  bash scripts/test.sh -m ''                 all of them
  bash scripts/test.sh tests/ops -k chunked  some of them

Environment: PYTHON (interpreter), VENV (folder of the environment), JOBS (tests at once, default 2).
HELP
    exit
    ;;
esac

. scripts/setup_env.sh
# What tests/harness needs of lm-evaluation-harness: all of its dependencies would be 340 MB.
python -c 'import lm_eval, pytablewriter, dominate' 2>/dev/null || python -m pip --disable-pip-version-check install --quiet \
    -c constraints.txt --no-deps lm_eval pytablewriter DataProperty mbstrdecoder msgfy pathvalidate tabledata typepy dominate Logbook six \
    chardet pytz
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
ruff check .
ruff format --check --quiet . || { echo "run: ruff format ." >&2; exit 1; }
mypy
# In the order of the files: the longest ones are not at the end. By the number of tests they would be.
exec python -m pytest -n "${JOBS:-2}" --dist loadfile --no-loadscope-reorder "$@"
