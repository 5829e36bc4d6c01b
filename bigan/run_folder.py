"""The paths of a run: the one place that knows the layout of a run folder.

<run_dir>/config.yaml  environment.json  metrics.jsonl  mlflow.json  curves.png  timeline.png
          checkpoints/<images_seen>/     complete state, for resuming
          snapshots/<images_seen>/       networks of the samplers, for evaluation and use
          samples/<images_seen>.png      of the first sampler; of others in samples/<sampler>/
          evaluation/<images_seen>.json  what `bigan evaluate` measured
          config_history.jsonl           settings changed during the run, one per line
          LOCK                           of the process that trains (run/lock.py)
          DONE                           written last, when all images have been seen
          REQUEUE                        stopped before its end
          STOP                           made by a user: stop at the next step boundary
          slurm/                         scripts, logs and attempts of its jobs (bigan/cluster)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SWEEP_FILE = "sweep.yaml"  # in the folder of a sweep, which contains the run folders of its trials


@dataclass(frozen=True)
class RunFolder:
    """Paths below the folder `path`; nothing is created or read."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def config_history(self) -> Path:
        return self.path / "config_history.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / "LOCK"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def mlflow(self) -> Path:
        return self.path / "mlflow.json"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def timeline(self) -> Path:
        return self.path / "timeline.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def done(self) -> Path:
        return self.path / "DONE"

    @property
    def requeue(self) -> Path:
        return self.path / "REQUEUE"

    @property
    def stop(self) -> Path:
        return self.path / "STOP"

    @property
    def slurm(self) -> Path:
        return self.path / "slurm"

    @property
    def jobs(self) -> Path:
        return self.slurm / "jobs.jsonl"

    @property
    def attempts(self) -> Path:
        return self.slurm / "attempts.tsv"

    @property
    def job_logs(self) -> Path:
        return self.slurm / "logs"

    def sample_grid(self, images_seen: int, sampler: str | None = None) -> Path:
        """The sample grid of a sampler; None: the first one of the objective."""
        folder = self.samples if sampler is None else self.samples / sampler
        return folder / f"{images_seen}.png"
