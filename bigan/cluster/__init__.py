"""SLURM: submit, observe and cancel runs; sweeps.

`bigan submit` renders batch scripts from `templates/` and hands them to `sbatch`. The scripts in
`slurm/` are for `sbatch` itself. Both contain or source the same two files: `templates/env.sh`
(settings of NCCL and Gloo) and `templates/job.sh` (ranks, signals, requeue). Files of a run:

<run_dir>/slurm/jobs.jsonl           submitted jobs, one object per line
                001/                 one folder per `bigan submit`: scripts and the resolved config
                code/<hash>/bigan/   the code that the jobs run
                attempts.tsv         starts and ends of attempts, written by job.sh
                logs/<job>.log       output of a job; of all its attempts
                logs/<job>-<restart>/rank-<rank>.log, failure-<time>-rank-<rank>.txt
"""
