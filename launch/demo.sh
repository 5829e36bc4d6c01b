#!/usr/bin/env bash
# The demo: training and its evaluator side by side, as they would run on a cluster.
# A second call goes on where a first one was stopped, or shows the result again.
set -euo pipefail
run=runs/digits

bigan pack digits data/digits
echo "training ${run} with the evaluator beside it; the pictures appear in ${run}/samples"

# Networks this small make use of two threads, not of more; the evaluator takes what is left over.
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
