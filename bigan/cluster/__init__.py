"""SLURM: submit, observe and cancel runs; sweeps.

`bigan submit` renders batch scripts from `templates/` and hands them to `sbatch`. The scripts in
`slurm/` are for `sbatch` itself. Both contain or source the same two files: `templates/env.sh`
(settings of NCCL and Gloo) and `templates/job.sh` (ranks, signals, requeue).

submit    profiles: the YAML file of a cluster       words: values of options, checked
          plan: the jobs of a request                render: templates -> scripts
          freeze: copies of code and config          submit: checks, files, sbatch
          run_dir: the run folder of a config, for slurm/train.sbatch
observe   slurm: calls of commands                   queue: what squeue knows of jobs
          jobs: jobs.jsonl                           records: jobs.jsonl, attempts, failures
          facts: what the files of a run show        job_states: records joined with the queue
          verdict: the state of a run                run_status, sweep_status, status: the result
          status_text: as text and JSON              discovery: runs below a folder
          logs, cancel: the commands
sweeps    sweep: the file                            sweep_check: checks it against the config
          sweep_folder: paths and records of trials  trial: begin, watch and end of one trial
          study: the study of Optuna                 sweep_local: trials on this machine
          sweep_report, sweep_plot, sweep_mlflow: the result

Files of a run:

<run_dir>/slurm/jobs.jsonl           submitted jobs, one object per line
                001/                 one folder per `bigan submit`: scripts and the resolved config
                code/<hash>/bigan/   the code that the jobs run
                attempts.tsv         starts and ends of attempts, written by job.sh
                logs/<job>.log       output of a job; of all its attempts
                logs/<job>-<restart>/rank-<rank>.log, failure-<time>-rank-<rank>.txt
"""
