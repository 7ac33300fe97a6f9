#!/usr/bin/env bash
# Shows what the project does on one GPU: doctor, benchmark, GPU suite; ends within ten minutes, with results in one folder.
#
#   infra/gpu_check.sh [FOLDER]        default folder: out/gpu_check
#
# PYTHON names the interpreter (.venv/bin/python where it is there). SHAPE, ROWS and SERIAL_ROWS size the benchmark.
# Without a GPU, SELFRAG_GPU_REHEARSAL=1 SHAPE=tiny ROWS=8 rehearses it.
set -u
folder=${1:+$(realpath -m "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
folder=${folder:-out/gpu_check}
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
end=$((SECONDS + 590))
export HF_HUB_OFFLINE=1
[[ -z ${SELFRAG_GPU_REHEARSAL:-} ]] && export SELFRAG_GPU_REQUIRED=1
mkdir -p "$folder" || exit 1
: > "$folder/summary.txt"
failed=0

# Runs one step for at most so many seconds, and never beyond the ten minutes; notes how it ended and how long it took.
run() {
    local name=$1 limit=$2 begun=$SECONDS status=0
    shift 2
    [[ $limit -gt $((end - SECONDS)) ]] && limit=$((end - SECONDS))
    timeout --signal=INT --kill-after=10 "$limit" "$@" > "$folder/$name.out" 2> "$folder/$name.log" || status=$?
    [[ $status -ne 0 ]] && failed=1
    echo "$name: status $status after $((SECONDS - begun)) s$([[ $status -eq 124 ]] && echo ' (out of time)')" |
        tee -a "$folder/summary.txt"
}

nvidia-smi > "$folder/card.txt" 2>&1 || echo "nvidia-smi shows no card: see $folder/card.txt" | tee -a "$folder/summary.txt"
"$PYTHON" -m jobs.cli --version > "$folder/versions.txt" 2>&1
run doctor 150 "$PYTHON" -m jobs.doctor
run benchmark 300 "$PYTHON" -m jobs.benchmark --shape "${SHAPE:-7b}" --only "short form, 50" --rows "${ROWS:-300}" \
    --serial-rows "${SERIAL_ROWS:-1}" --repeats 1 --passages 5 --without naive --json "$folder/benchmark.json"
# Last: what it has shown before it runs out of time stays.
run suite 590 "$PYTHON" -m pytest -m gpu tests/gpu -v -rA --junitxml "$folder/suite.xml"
exit $failed
