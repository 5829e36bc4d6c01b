# shellcheck shell=bash
# Ranks, signals and requeue of a job.
train_job() { :; }
evaluate_job() { :; }
trial_job() { :; }
