"""The command `bigan submit`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigan.cli.arguments import CONFIG_HELP, OVERRIDE_HELP, count
from bigan.cluster import words

EPILOG = """\
examples:
  bigan submit configs/biggan-128.yaml --nodes 4 --gpus 8 --time 24:00:00 --evaluate during
      trains on 32 GPUs, requeues itself at the time limit and after a preemption, and measures
      new snapshots in a second job on one GPU
  bigan submit configs/biggan-128.yaml train.seed=1 run_dir=runs/seed1 --gpus 8 --dry-run
      prints scripts and commands; needs no SLURM and writes nothing
  bigan submit CONFIG --gpus 8 --time 12:00:00 --chain 4
      four jobs, one after the other, where the cluster does not requeue jobs
  bigan submit CONFIG --gpus 1 --time 4:00:00 --sweep sweep.yaml --parallel 8
      a job array, one element per trial
  bigan submit CONFIG --gpus 8 --profile ~/cluster.yaml
      partition, account, modules, environment and container are in the profile of the cluster:
      copy one of slurm/profiles/{generic,pyxis,apptainer}.yaml; BIGAN_SLURM_PROFILE names the
      file that is used without --profile

afterwards: bigan status RUN, bigan logs RUN, bigan cancel RUN
The jobs run a frozen copy of config and code in RUN/slurm/. To continue a run that has stopped,
submit the same command again. docs/cluster.md has the details.
"""


class _Once(argparse.Action):
    """Stores a value; an option that is given twice is refused."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = vars(namespace).setdefault("_given", set())
        if self.dest in given:
            raise argparse.ArgumentError(self, "is given twice")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


def submit_command(arguments: argparse.Namespace) -> int:
    from bigan.cluster.plan import Request
    from bigan.cluster.profiles import load_profile
    from bigan.cluster.submit import dry_run, submit, test_only

    fields = Request.__dataclass_fields__
    given = {name: value for name, value in vars(arguments).items() if name in fields}
    request = Request(**given | {"overrides": tuple(arguments.overrides)})
    names = ("partition", "account", "qos", "constraint", "launcher")
    replaced = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    profile = load_profile(arguments.profile).model_copy(update=replaced)
    action = dry_run if arguments.dry_run else test_only if arguments.test_only else submit
    action(request, profile, print)
    return 0


def add_submit_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `bigan submit`."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument("config", type=Path, help=CONFIG_HELP)
    command.add_argument("overrides", nargs="*", metavar="a.b=value", help=OVERRIDE_HELP)
    _add_resources(command.add_argument_group("resources"))
    _add_cluster(command.add_argument_group("cluster (each replaces the value of the profile)"))
    _add_jobs(command.add_argument_group("further jobs"))
    test = command.add_mutually_exclusive_group()
    test.add_argument(
        "--dry-run", action="store_true", help="print scripts and commands; submit nothing"
    )
    test.add_argument(
        "--test-only",
        action="store_true",
        help="ask SLURM whether and when the jobs would start; submit nothing",
    )


def _add_resources(group: argparse._ArgumentGroup) -> None:
    _add(group, "--nodes", count, "N", "nodes (default 1)", default=1)
    _add(group, "--gpus", _amount, "N", "GPUs per node (default 0: CPUs)", default=0)
    _add(
        group,
        "--time",
        _checked(words.time),
        "LIMIT",
        "time limit of each attempt: 90 (minutes), 24:00:00, 2-00:00:00 (default: that of the "
        "partition)",
    )
    _add(
        group,
        "--cpus",
        count,
        "N",
        "CPU cores per node (default: one per process without GPUs, else that of the cluster)",
    )
    _add(
        group, "--mem", _checked(words.memory), "SIZE", "memory per node, like 200G", dest="memory"
    )
    _add(
        group,
        "--processes",
        count,
        "N",
        "processes per node (default: one per GPU, or 1 without GPUs)",
    )


def _add_cluster(group: argparse._ArgumentGroup) -> None:
    _add(group, "--profile", Path, "FILE", "profile of the cluster (slurm/profiles/)")
    for option in ("--partition", "--account", "--qos"):
        _add(group, option, _checked(words.name), "NAME", None)
    _add(group, "--constraint", _checked(words.constraint), "FEATURES", None)
    group.add_argument(
        "--launcher",
        action=_Once,
        choices=("accelerate", "srun"),
        help="accelerate: one launcher per node (default); srun: one task per process",
    )
    _add(group, "--name", _checked(words.name), "NAME", "name of the job (default: run folder)")


def _add_jobs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--evaluate",
        action=_Once,
        choices=("during", "after"),
        help="add a job that measures the snapshots: beside training, or when it is complete",
    )
    _add(group, "--evaluate-nodes", count, "N", "nodes of that job (default 1)")
    _add(
        group, "--evaluate-gpus", _amount, "N", "its GPUs per node (default 1, or 0 without --gpus)"
    )
    _add(
        group, "--evaluate-time", _checked(words.time), "LIMIT", "its time limit (default: --time)"
    )
    _add(
        group, "--chain", count, "N", "N jobs, each continues the one before; in place of requeues"
    )
    _add(group, "--sweep", Path, "FILE", "hyperparameter search: a job array of trials")
    _add(group, "--parallel", count, "N", "trials that run at once (default: as in the file)")


def _add(
    group: argparse._ArgumentGroup,
    option: str,
    kind: Callable[[str], Any],
    metavar: str,
    text: str | None,
    **more: Any,
) -> None:
    group.add_argument(option, action=_Once, type=kind, metavar=metavar, help=text, **more)


def _amount(text: str) -> int:
    return 0 if text == "0" else count(text)


def _checked(parse: Callable[[str], str]) -> Callable[[str], str]:
    """A function of `words`, whose ValueError argparse would not show."""

    def parsed(text: str) -> str:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed
