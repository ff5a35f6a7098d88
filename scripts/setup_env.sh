# Sourced by test.sh and quickstart.sh, with bash and `set -euo pipefail`, from the repository root: makes the virtual environment
# or reuses it, and puts it first on PATH. Safe to repeat after an interruption and to run twice at once.
#   VENV     its folder (default .venv). One that exists already is used as it is, with the packages installed into it.
#   PYTHON   the interpreter to make it with, 3.11 or later (default: the first suitable one on PATH)

setup_fail() {
    echo "error: $*" >&2
    exit 2
}

setup_suitable() { # whether $1 is a Python that can make the environment
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

setup_find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || setup_fail "PYTHON=$PYTHON is not an executable"
        setup_suitable "$PYTHON" || setup_fail "PYTHON=$PYTHON: need Python 3.11 or later with the venv module" \
            "(Debian and Ubuntu: apt-get install python3-venv)"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        if setup_suitable "$candidate"; then
            PYTHON=$candidate
            return
        fi
    done
    setup_fail "found no Python 3.11 or later with the venv module; install one (Debian and Ubuntu: apt-get install" \
        "python3 python3-venv) or name it: PYTHON=/path/to/python3 bash $0"
}

setup_wanted() { # what a complete installation was made from: the stamp's content
    echo "$PWD $VENV"
    cat constraints.txt setup.py pyproject.toml scripts/setup_env.sh | "$VENV/bin/python" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest(), sys.version.split()[0])'
}

setup_complete() {
    [ -f "$VENV/.momentum_lm" ] && [ -x "$VENV/bin/python" ] && [ "$(setup_wanted 2>/dev/null)" = "$(cat "$VENV/.momentum_lm")" ]
}

setup_install() {
    local ours="$VENV/.momentum_lm.unfinished" made="$VENV/.momentum_lm.made" pip=("$VENV/bin/python" -m pip --disable-pip-version-check)
    if [ -f "$made" ] && [ "$(cat "$made")" != "$VENV" ]; then
        touch "$ours" # one that this script made, moved or copied since: its scripts still name the old place
    fi
    if [ -z "$(ls -A "$VENV" 2>/dev/null)" ] || [ -e "$ours" ]; then # a half-made environment is made anew; pip's cache still has what it downloaded
        setup_find_python
        echo "making the environment $VENV with $("$PYTHON" --version)" >&2
        mkdir -p "$VENV"
        touch "$ours"
        find "$VENV" -mindepth 1 -maxdepth 1 ! -path "$ours" -exec rm -rf {} +
        "$PYTHON" -m venv "$VENV"
        printf '%s\n' "$VENV" >"$made" # an environment without this file is somebody else's and is never emptied
    elif ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        setup_fail "VENV=$VENV is not a virtual environment with pip; name another folder, or remove it to have it made"
    elif [ -n "${PYTHON:-}" ]; then
        setup_same_python
    fi
    rm -f "$VENV/.momentum_lm"
    echo "installing torch and the other requirements (once; the largest download)" >&2
    "${pip[@]}" install --quiet -c constraints.txt pip
    "${pip[@]}" install --quiet -c constraints.txt -e '.[dev]'
    echo "installing fairseq" >&2
    # --no-deps keeps pip from fairseq's own, contradictory pins: see setup.py. READTHEDOCS=1 keeps fairseq's setup from
    # compiling; fairseq_compat has NumPy forms of what it would have compiled.
    READTHEDOCS=1 "${pip[@]}" install --quiet -c constraints.txt --no-deps fairseq==0.12.2
    setup_wanted >"$VENV/.momentum_lm.new"
    mv "$VENV/.momentum_lm.new" "$VENV/.momentum_lm"
    rm -f "$ours"
}

setup_same_python() {
    local version='import sys; print(*sys.version_info[:2], sep=".")' have want
    have=$("$VENV/bin/python" -c "$version")
    want=$("$PYTHON" -c "$version") || setup_fail "PYTHON=$PYTHON does not run"
    [ "$have" = "$want" ] || setup_fail "$VENV has Python $have, and PYTHON=$PYTHON is $want: set VENV to another folder, or remove $VENV"
}

setup_env() {
    VENV=${VENV:-.venv}
    case $VENV in /*) ;; *) VENV=$PWD/$VENV ;; esac
    if ! setup_complete; then
        mkdir -p "$(dirname "$VENV")"
        exec 9>"$VENV.lock"
        if command -v flock >/dev/null; then flock 9; fi
        setup_complete || setup_install # another run may have finished it while this one waited
        exec 9>&-
    elif [ -n "${PYTHON:-}" ]; then
        setup_same_python
    fi
    export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
    unset PYTHONHOME
}

setup_env
