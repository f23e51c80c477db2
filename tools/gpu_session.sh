#!/bin/sh
# Everything on a machine with an NVIDIA GPU, in one call, from the source tree; nothing is installed.
#
#   tools/gpu_session.sh DIR [minutes in all, 9.5] [more options of the benchmark, --full say]
#
# The benchmark gets the minutes that build and tests leave; what it measured until then is written.
# DIR gets build.log, tests.log, the rows as <gpu>.jsonl, workers.log and summary.txt.
# SUITE=longseq  the benchmark of long sequences (gpu); its rows are <gpu>_longseq.jsonl.
# PEERS=FOLDER  pure-Python wheels or unpacked packages of other libraries (liger-kernel, trl,
#               cut-cross-entropy), used where they import.
# PYTHON=...    the interpreter that has torch (python3).
# COMMIT=...    what the rows name where there is no .git.
# TEST_SECONDS  limit of the tests (180); 0 leaves them out.
set -u
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,13p' tools/gpu_session.sh; exit 2; }
suite=${SUITE:-gpu}
case $suite in
    gpu | longseq) ;;
    *) echo "SUITE must be gpu or longseq, got '$suite'" >&2; exit 2 ;;
esac
out=$1
minutes=${2:-9.5}
started=$(date +%s)
[ $# -ge 2 ] && shift 2 || shift 1
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
peers=$(mktemp -d)
trap 'rm -rf "$peers"' EXIT

if [ -n "${PEERS:-}" ]; then
    for wheel in "$PEERS"/*.whl; do
        [ -e "$wheel" ] && "$python" -m zipfile -e "$wheel" "$peers"
    done
    PYTHONPATH="$peers:$PEERS${PYTHONPATH:+:$PYTHONPATH}"
fi
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# A call that is cut off keeps what was said until then.
PYTHONUNBUFFERED=1
export PYTHONPATH PYTHONUNBUFFERED

nvidia-smi >"$out/build.log" 2>&1
timeout 240 "$python" setup.py build_ext --inplace >>"$out/build.log" 2>&1
built=$?
"$python" -m r1kernels >>"$out/build.log" 2>&1

tests=skipped
if [ "${TEST_SECONDS:-180}" != 0 ]; then
    # Only files that hold such tests: others may need packages that this machine has not.
    timeout "${TEST_SECONDS:-180}" "$python" -m pytest -m gpu --maxfail 8 -q -p no:cacheprovider \
        $(grep -rl --include='test_*.py' 'mark\.gpu' tests) >"$out/tests.log" 2>&1
    tests="exit status $?"
fi

left=$(awk "BEGIN {m = $minutes - ($(date +%s) - $started) / 60; print (m > 0.2 ? m : 0.2)}")
"$python" -m benchmarks.run --suite "$suite" --minutes "$left" --out "$out" \
    ${COMMIT:+--commit "$COMMIT"} "$@" >"$out/summary.txt" 2>&1
measured=$?

echo "build: exit status $built"
echo "tests: $tests; $(tail -n 1 "$out/tests.log" 2>/dev/null)"
echo "suite: exit status $measured"
# The table that the suite prints last.
awk '/^[0-9]+ rows in /{keep=1} keep' "$out/summary.txt" | cut -c1-180
[ "$measured" = 0 ] && { [ "$tests" = "exit status 0" ] || [ "$tests" = skipped ]; }
