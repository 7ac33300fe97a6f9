#!/usr/bin/env bash
# Annotates as run.yaml beside this file says, on the Ray cluster that it is started in.
# Status 3 without rows left (finished, some rows in errors/, no more than execution.max_error_rate of them) counts as
# done: the same command would find nothing to do. Every other failure is KubeRay's to try again.
set -euo pipefail
status=0
summary=$(python -m jobs.annotate --config "$(dirname "$0")/run.yaml" --set execution.ray_address=auto --json) || status=$?
echo "$summary"
if [[ $status -eq 3 && $summary == *'"left": 0,'* ]]; then exit 0; fi
exit "$status"
