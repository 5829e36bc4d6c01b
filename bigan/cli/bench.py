"""The options of `bigan bench` and its output: JSON on stdout, messages and a table on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bigan.cli.arguments import CONFIG_HELP, OVERRIDE_HELP, count, counts, fraction, positive


def add_benchmarks(bench: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Add the kinds of benchmark to the `bench` command; `common`: options of all commands."""
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="KIND")
    step = kinds.add_parser(
        "step",
        help="training step: eager and compiled, with and without R1",
        description="Measure the training step eager and compiled, with and without R1. Prints "
        "JSON: images/s, ms per phase, peak memory.",
        parents=[common],
    )
    step.add_argument(
        "config", type=Path, nargs="?", default=Path("configs/digits.yaml"), help=CONFIG_HELP
    )
    step.add_argument("overrides", nargs="*", metavar="a.b=value", help=OVERRIDE_HELP)
    step.add_argument("--runs", type=int, default=7, help="timed runs, at least 5 (default 7)")
    step.set_defaults(handler=step_command)
    data = kinds.add_parser(
        "data",
        help="input pipeline of one process, or with --simulate the traffic of many ranks",
        description="Measure the input pipeline of one process: images/s, CPU time per image. "
        "With --simulate, compute what many ranks read in an epoch: bytes, requests, memory. "
        "Prints text to stderr, JSON to stdout.",
        parents=[common],
    )
    data.set_defaults(handler=data_command)
    _add_data(data)
    scaling = kinds.add_parser(
        "scaling",
        help="several processes on this machine, and a prediction for up to 1024 GPUs",
        description="Measure a config on several processes of this machine, break down its step "
        "time, and predict it for more devices. Prints a table to stderr, JSON to stdout.",
        parents=[common],
    )
    scaling.set_defaults(handler=scaling_command)
    _add_scaling_options(scaling)
    _add_assumptions(scaling.add_argument_group("assumptions of the prediction"))


def _add_data(data: argparse.ArgumentParser) -> None:
    data.add_argument(
        "config", type=Path, nargs="?", default=Path("configs/digits.yaml"), help=CONFIG_HELP
    )
    data.add_argument("overrides", nargs="*", metavar="a.b=value", help=OVERRIDE_HELP)
    data.add_argument("--runs", type=int, default=5, help="timed runs, at least 5 (default 5)")
    data.add_argument(
        "--run-seconds", type=positive, default=1.0, help="length of a timed run (default 1)"
    )
    data.add_argument(
        "--simulate",
        action="store_true",
        help="compute what the ranks of a run read in an epoch, from manifest and index",
    )
    simulated = data.add_argument_group("with --simulate")
    simulated.add_argument(
        "--ranks",
        type=counts,
        default=[1, 8, 64],
        metavar="N,N",
        help="numbers of ranks (default 1,8,64)",
    )
    simulated.add_argument(
        "--ranks-per-node",
        type=count,
        default=8,
        metavar="N",
        help="ranks that share a node and its data.cache (default 8)",
    )
    simulated.add_argument(
        "--images-per-second",
        type=positive,
        default=1000.0,
        metavar="X",
        help="training rate of all ranks, for the requests per second (default 1000)",
    )
    simulated.add_argument(
        "--images",
        type=count,
        metavar="N",
        help="assume a data set of N images at a URL, in place of data.path",
    )
    simulated.add_argument(
        "--image-kb",
        type=positive,
        default=100.0,
        metavar="KB",
        help="with --images: size of each encoded image in kB (default 100)",
    )


def _add_scaling_options(scaling: argparse.ArgumentParser) -> None:
    scaling.add_argument("config", type=Path, help=CONFIG_HELP)
    scaling.add_argument("overrides", nargs="*", metavar="a.b=value", help=OVERRIDE_HELP)
    scaling.add_argument(
        "--ranks", type=counts, default=[1, 2], metavar="N,N", help="processes (default 1,2)"
    )
    scaling.add_argument("--engine", help="instead of that of the config: ddp, fsdp, zero1, zero2")
    scaling.add_argument(
        "--mode",
        choices=("weak", "strong", "both"),
        default="both",
        help="weak: the batch grows with the processes; strong: they share it (default both)",
    )
    scaling.add_argument("--runs", type=int, default=5, help="timed runs, at least 5 (default 5)")
    scaling.add_argument(
        "--run-seconds",
        type=positive,
        default=1.0,
        help="approximate length of a timed run (default 1)",
    )
    scaling.add_argument(
        "--synthetic", action="store_true", help="random images in memory instead of the data"
    )
    scaling.add_argument(
        "--out", type=Path, metavar="FILE", help="also write the JSON to this file"
    )


def _add_assumptions(assumed: argparse._ArgumentGroup) -> None:
    assumed.add_argument(
        "--device-images-per-second",
        type=positive,
        metavar="X",
        help="training rate of one device of another machine; nothing is measured then",
    )
    assumed.add_argument(
        "--bandwidth-gb",
        type=positive,
        default=50.0,
        metavar="GB/s",
        help="bus bandwidth per device between nodes (default 50: a 400 Gb/s port each)",
    )
    assumed.add_argument(
        "--node-bandwidth-gb",
        type=positive,
        default=300.0,
        metavar="GB/s",
        help="bus bandwidth per device within a node (default 300)",
    )
    assumed.add_argument("--ranks-per-node", type=count, default=8, help="devices (default 8)")
    assumed.add_argument(
        "--latency-us",
        type=positive,
        default=20.0,
        help="of the smallest collective, times log2 of the devices (default 20)",
    )
    assumed.add_argument(
        "--overlap",
        type=fraction,
        help="share of a phase's last micro-batch that hides the exchange of its gradients "
        "(default 0.4 for eager ddp, else 0: a compiled backward yields all gradients at its end)",
    )
    assumed.add_argument(
        "--spread",
        type=fraction,
        help="standard deviation of a phase's time over its mean (default: as measured, or 0.01)",
    )
    assumed.add_argument(
        "--fixed-ms",
        type=positive,
        help="time per training step independent of the batch (default: as measured, or 10)",
    )


def step_command(arguments: argparse.Namespace) -> int:
    from bigan.bench.step import bench_step

    result = bench_step(
        arguments.config,
        arguments.overrides,
        arguments.runs,
        _to_stderr,
    )
    _to_stdout(result)
    return 0


def data_command(arguments: argparse.Namespace) -> int:
    from bigan.bench.data import Assumed, as_table, measure_data, simulate_data

    if not arguments.simulate:
        measured = measure_data(
            arguments.config,
            arguments.overrides,
            arguments.runs,
            arguments.run_seconds,
            _to_stderr,
        )
        _to_stdout(measured)
        return 0
    assumed = None
    if arguments.images:
        assumed = Assumed(arguments.images, int(arguments.image_kb * 1000))
    result = simulate_data(
        arguments.config,
        arguments.overrides,
        arguments.ranks,
        arguments.ranks_per_node,
        arguments.images_per_second,
        assumed,
    )
    _to_stderr(as_table(result))
    _to_stdout(result)
    return 0


def scaling_command(arguments: argparse.Namespace) -> int:
    from bigan.bench.prediction import Network
    from bigan.bench.report import as_text
    from bigan.bench.scaling import Options, bench_scaling
    from bigan.bench.workload import Assumed

    kept = ("overlap", "spread", "fixed_ms", "device_images_per_second")
    options = Options(
        ranks=tuple(arguments.ranks),
        modes=("weak", "strong") if arguments.mode == "both" else (arguments.mode,),
        runs=arguments.runs,
        run_seconds=arguments.run_seconds,
        synthetic=arguments.synthetic,
        assumed=Assumed(
            network=Network(
                gb_per_second=arguments.bandwidth_gb,
                node_gb_per_second=arguments.node_bandwidth_gb,
                ranks_per_node=arguments.ranks_per_node,
                latency_us=arguments.latency_us,
            ),
            **{name: getattr(arguments, name) for name in kept},
        ),
    )
    overrides = list(arguments.overrides)
    if arguments.engine:
        overrides.append(f"engine={arguments.engine}")
    record = bench_scaling(arguments.config, overrides, options, _to_stderr)
    _to_stderr(as_text(record))
    _to_stdout(record)
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _to_stdout(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record, indent=2) + "\n")
