"""The MLflow run of a sweep, the parent of the runs of its trials: best value, status, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bigan import config as configs
from bigan.cluster.sweep import Sweep, shown_value
from bigan.cluster.sweep_folder import SweepFolder, Trial, best
from bigan.reporting.mlflow_run import exclusive, open_parent, quiet_environment


def deliver(folder: SweepFolder, files: Sequence[Path] = ()) -> str:
    """Send the best trial and `files` to the parent run; FINISHED once all trials have ended.

    Returns one line if MLflow did not take it, else "". Nothing is sent if tracking.mlflow is
    false.
    """
    base, _ = configs.read(folder.base)
    if not (base.get("tracking") or {}).get("mlflow", True):
        return ""
    quiet_environment()
    sweep, trials = folder.sweep(), folder.read_all()
    try:
        _send(folder, sweep, trials, files)
    except Exception as error:  # MLflow, its database and the network raise various types
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return f"MLflow: the result of the sweep was not delivered ({text})"
    return ""


def _send(
    folder: SweepFolder, sweep: Sweep, trials: Sequence[Trial], files: Sequence[Path]
) -> None:
    ended = [trial for trial in trials if trial.state != "running"]
    client, record = open_parent(folder.path, sweep.experiment or "bigan")
    with exclusive(folder.path):
        found = best(ended, sweep.goal)
        tags = {f"trials.{state}": "0" for state in ("complete", "pruned", "failed")}
        for trial in ended:
            tags[f"trials.{trial.state}"] = str(int(tags[f"trials.{trial.state}"]) + 1)
        if found is not None and found.value is not None:
            client.log_metric(record.run_id, f"best/{sweep.metric}", found.value, step=len(ended))
            tags["best.trial"] = folder.name(found.index)
            tags |= {f"best.{key}": shown_value(v) for key, v in found.parameters.items()}
        for key, value in tags.items():
            client.set_tag(record.run_id, key, value[:5000])
        for path in files:
            client.log_artifact(record.run_id, str(path))
        if len(ended) >= sweep.num_trials:
            client.set_terminated(record.run_id, "FINISHED")
        else:
            client.update_run(record.run_id, status="RUNNING")
