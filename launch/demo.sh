#!/usr/bin/env bash
# The demo: training and evaluation in parallel, as on a cluster.
# A second call resumes a stopped run, or prints the result of a finished one.
set -euo pipefail
run=runs/digits

bigan pack digits data/digits
echo "training and evaluating ${run}; sample grids are written to ${run}/samples"

# Networks of this size scale to two threads; the evaluator has a low priority.
OMP_NUM_THREADS=1 nice -n 10 bigan evaluate "$run" --watch &
evaluator=$!
trap 'kill "$evaluator" 2>/dev/null || true' EXIT

OMP_NUM_THREADS=2 bigan train configs/digits.yaml
wait "$evaluator"
trap - EXIT

cat <<END

look at    ${run}/samples/*.png    one row per class
           ${run}/timeline.png     the same latents over the course of training
           ${run}/curves.png       losses and distances
more       .venv/bin/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db
END
