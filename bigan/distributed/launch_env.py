"""Environment variables of launchers, read by pure functions.

Checks whether a launch can work, derives the rank of a task started by `srun`, and returns the
requested engine and the launcher settings that are not used because the config sets them.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigan.errors import LaunchError

REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")
# World size and rank of a process started by MPI: Open MPI, MPICH and Intel MPI, MVAPICH2, jsrun.
MPI = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
    "JSM_NAMESPACE_SIZE": "JSM_NAMESPACE_RANK",
}
# Of any launcher; accelerate reads them, too, and fails at an empty one.
LAUNCHER = {
    *RANKS, *ADDRESS, *MPI, *MPI.values(), "LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_RANK",
}  # fmt: skip
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # our name: Accelerate's

FIRST_PORT, NUM_PORTS = 20_000, 12_000  # below 32768, the first ephemeral port of Linux


def set_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without empty variables, which containers and scripts leave: not set."""
    return {name: value for name, value in environment.items() if value}


def check_launch(environment: Mapping[str, str]) -> None:
    """Refuse launches that would train several unconnected runs, or one rank instead of several.

    Raises `LaunchError`, also for an incomplete set of variables. `accelerate launch --cpu
    --num_processes 2` sets MASTER_ADDR and starts one process without a warning; `srun` with
    several such tasks, and `mpirun`, start unconnected processes.
    """
    for name, what in REFUSED.items():
        if _is_true(environment, name):
            raise LaunchError(
                f"launch environment: {what} is not supported; use one of the files in launch/"
            )
    if _check_ranks(environment):
        return
    _check_mpi(environment)
    if "ACCELERATE_MIXED_PRECISION" not in environment:
        _check_address(environment)
        return
    if "MASTER_ADDR" in environment:
        raise LaunchError(
            "launch environment: accelerate was asked for several processes but started one "
            "(because of --cpu or distributed_type NO); use `accelerate launch --config_file "
            "launch/cpu.yaml`, or --multi_gpu instead of --cpu"
        )
    if _num_tasks(environment) > 1:
        raise LaunchError(
            f"launch environment: srun started {_num_tasks(environment)} launchers of one process "
            "each, which are not connected; use srun without `accelerate launch` (one task per "
            "GPU), or one task per node with launch/cluster.yaml"
        )


def _check_ranks(environment: Mapping[str, str]) -> bool:
    """Whether a launcher has set the ranks; raises `LaunchError` unless they are complete."""
    given = _given(environment)
    if not given:
        return False
    missing = [name for name in (*RANKS, *ADDRESS) if not environment.get(name)]
    if missing:
        here = ", ".join(f"{name} = {environment[name]}" for name in given)
        raise _incomplete(
            f"{here}, but {_names(missing)} not set; start the processes with `accelerate launch` "
            "or `torchrun`, or set all of RANK, WORLD_SIZE, LOCAL_RANK (the rank within the "
            "machine), MASTER_ADDR and MASTER_PORT; for one process unset them"
        )
    size = _number(environment, "WORLD_SIZE", 1)
    _number(environment, "RANK", 0, size - 1)
    _number(environment, "LOCAL_RANK", 0, size - 1)
    _number(environment, "MASTER_PORT", 1, 65_535)
    if environment.get("LOCAL_WORLD_SIZE"):
        _number(environment, "LOCAL_WORLD_SIZE", 1, size)
    return True


def _given(environment: Mapping[str, str]) -> list[str]:
    """The variables of ranks that are set; a world size of 1 alone means no launcher."""
    given = [name for name in RANKS if environment.get(name)]
    return [] if given == ["WORLD_SIZE"] and environment["WORLD_SIZE"] == "1" else given


def _check_mpi(environment: Mapping[str, str]) -> None:
    for name, rank in MPI.items():
        size = _number(environment, name, 1) if environment.get(name) else 1
        if size > 1 and size != _num_tasks(environment):  # srun sets PMI_SIZE as well
            raise LaunchError(
                f"launch environment: {name} = {size}: MPI started {size} processes, which bigan "
                "does not connect; use `accelerate launch`, `torchrun` or `srun`, or set "
                f"RANK=${rank}, WORLD_SIZE=${name}, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in "
                "each process"
            )


def _check_address(environment: Mapping[str, str]) -> None:
    """Refuse an address without ranks; scripts of SLURM may export it before `srun`."""
    if environment.get("MASTER_ADDR") and "SLURM_JOB_ID" not in environment:
        raise _incomplete(
            f"MASTER_ADDR = {environment['MASTER_ADDR']}, but {_names(RANKS)} not set, so that "
            "this would be an unconnected process; start it with `accelerate launch` or "
            "`torchrun`, or unset MASTER_ADDR"
        )


def check_devices(environment: Mapping[str, str], num_devices: int) -> None:
    """Refuse more processes than GPUs on this node (NCCL's error is unclear). `LaunchError`."""
    here = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if here > num_devices:
        raise LaunchError(
            f"launch environment: {here} processes were started on {socket.gethostname()}, which "
            f"has {num_devices} GPU(s); use --num_processes {num_devices} (times the nodes)"
        )


def from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a task started by `srun`.

    Returns {} if a launcher has set them or there is one task. Rank 0 is on the first node of the
    job step; an exported MASTER_ADDR or MASTER_PORT is kept. Raises `LaunchError` if a SLURM
    variable is missing.
    """
    if _given(environment) or _num_tasks(environment) == 1:
        return {}
    try:
        if environment.get("SLURM_STEP_NUM_NODES") == "1":
            first = "127.0.0.1"  # the name of a node may not resolve
        else:
            nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
            first = first_host(nodes)
        job, step = (_number(environment, f"SLURM_{name}_ID", 0) for name in ("JOB", "STEP"))
        joined = {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
            "LOCAL_RANK": environment["SLURM_LOCALID"],
            "MASTER_ADDR": environment.get("MASTER_ADDR") or first,
            # Different ports for jobs and steps that share a node.
            "MASTER_PORT": environment.get("MASTER_PORT")
            or str(FIRST_PORT + (31 * job + step) % NUM_PORTS),
        }
        _check_ranks(joined)
        return joined
    except KeyError as error:
        raise LaunchError(
            f"launch environment: srun started {_num_tasks(environment)} tasks but {error} is not "
            "set; start them with `accelerate launch` instead"
        ) from None


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: n[01-03,7] -> n01; raises `LaunchError`."""
    match = re.fullmatch(r"((?:[\w.-]|\[[\w,-]+\])+)(?:,.*)?", nodes)
    if not match:
        raise LaunchError(
            f"launch environment: cannot read the node list {nodes!r}; export MASTER_ADDR, the "
            "address of the first node, before srun"
        )
    return re.sub(r"\[([^,-]+)[^\]]*\]", r"\1", match[1])


def requested_engine(environment: Mapping[str, str]) -> str | None:
    """The engine that the launch file requests, or None; raises `LaunchError` if unsupported.

    FSDP means FSDP2 for any `fsdp_version`: version 1 shards flattened parameters, which cannot be
    differentiated twice, as gradient penalties require. Of a DeepSpeed JSON only the ZeRO stage
    and the optimizer offloading are used.
    """
    if _is_true(environment, "ACCELERATE_USE_DEEPSPEED"):
        return _requested_zero(environment)
    if not _is_true(environment, "ACCELERATE_USE_FSDP"):
        return None
    if _is_true(environment, "FSDP_OFFLOAD_PARAMS"):
        raise LaunchError(
            "launch environment: fsdp_offload_params is true, which is not supported; set it to "
            "false, or use launch/zero1-offload.yaml"
        )
    return "fsdp"


def chosen_engine(setting: str, environment: Mapping[str, str], world_size: int) -> str:
    """The name of the engine: `setting` (the config's `engine`), or for `auto` the requested one.

    `environment`: as it was before `connect`. Returns single, ddp, fsdp, zero1, zero2, zero3,
    zero1_offload or zero2_offload. Raises `LaunchError` if config and launch file contradict each
    other. The environment may differ between nodes: call it inside `world.on_all_ranks`.
    """
    requested = requested_engine(environment)
    launched = world_size > 1 or "WORLD_SIZE" in environment
    if setting == "auto":
        name = requested or ("ddp" if world_size > 1 else "single")
    else:
        name = setting
    if name == "single" and world_size > 1:
        raise LaunchError(
            f"engine = single, but {world_size} processes were started; use engine=auto"
        )
    if requested not in (None, name):
        raise LaunchError(
            f"engine = {name}, but the launch file requests {requested}; use engine=auto, or "
            f"--config_file launch/{_launch_file(name)}.yaml"
        )
    if name == "ddp" and world_size == 1:
        raise LaunchError(
            "engine = ddp needs several processes: start it with `accelerate launch "
            "--config_file launch/cpu.yaml -m bigan train ...`"
        )
    if name != "single" and not launched:
        raise LaunchError(
            f"engine = {name} needs a launcher, even for one process: start it with `accelerate "
            f"launch --config_file launch/{_launch_file(name)}.yaml -m bigan train ...`"
        )
    return name


def launch_remarks(environment: Mapping[str, str], precision: str, compiled: str) -> list[str]:
    """One line for each launcher setting that is not used because the config sets it."""
    settings = [
        ("mixed_precision", "ACCELERATE_MIXED_PRECISION", "no", "precision", precision),
        ("dynamo_backend", "ACCELERATE_DYNAMO_BACKEND", "no", "compile", compiled),
    ]
    remarks = [
        f"the launcher's {theirs} = {environment[name].lower()} is not used; the config sets "
        f"{ours} = {value}"
        for theirs, name, unset, ours, value in settings
        if environment.get(name, unset).lower() not in (unset, PRECISIONS.get(value))
    ]
    if _is_true(environment, "ACCELERATE_USE_FSDP") and environment.get("FSDP_VERSION") == "1":
        remarks.append("the launcher's fsdp_version = 1 is not used; bigan shards with FSDP2")
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", "auto"):
        remarks.append(
            "the launcher's gradient_accumulation_steps is not used; it is "
            "train.batch / (world size x train.micro_batch)"
        )
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if _is_true(environment, "ACCELERATE_USE_DEEPSPEED") and path != "none":
        remarks.append(
            f"of {path} only the ZeRO stage and the optimizer offloading are used; the config sets "
            "the rest"
        )
    restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and environment.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
        remarks.append(
            f"max_restarts = {restarts}, but a restart may hang: torch reuses the store with the "
            "addresses of the lost processes; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all "
            "nodes and use --rdzv_backend c10d"
        )
    return remarks


def _requested_zero(environment: Mapping[str, str]) -> str:
    stage, offload, offload_parameters = (
        environment.get(f"ACCELERATE_DEEPSPEED_{name}", default).lower()
        for name, default in (
            ("ZERO_STAGE", "2"),  # Accelerate's default
            ("OFFLOAD_OPTIMIZER_DEVICE", "none"),
            ("OFFLOAD_PARAM_DEVICE", "none"),
        )
    )
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path != "none":
        zero = _deepspeed_json(Path(path)).get("zero_optimization") or {}
        devices = {
            key: str((zero.get(key) or {}).get("device", "none"))
            for key in ("offload_optimizer", "offload_param")
        }
        in_file = str(zero.get("stage", 0))
        stage = stage if in_file == "auto" else in_file
        offload, offload_parameters = (
            default if found == "auto" else found
            for default, found in zip((offload, offload_parameters), devices.values(), strict=True)
        )
    if stage == "0" and offload == offload_parameters == "none":
        return "ddp"  # stage 0 shards nothing
    name = f"zero{stage}" if offload == "none" else f"zero{stage}_offload"
    known = ("zero1", "zero2", "zero3", "zero1_offload", "zero2_offload")
    if name not in known or offload not in ("none", "cpu") or offload_parameters != "none":
        raise LaunchError(
            f"launch environment: ZeRO stage {stage} with the optimizer offloaded to {offload} and "
            f"the parameters to {offload_parameters} is not supported; use stages 1 to 3, with "
            "offloading of the optimizer to cpu at stages 1 and 2"
        )
    return name


def _deepspeed_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"{path}: cannot read the DeepSpeed config: {error.strerror}") from None
    except ValueError as error:
        raise LaunchError(f"{path}: the DeepSpeed config is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise LaunchError(f"{path}: the DeepSpeed config must be a JSON object")
    return content


def _launch_file(engine: str) -> str:
    names = {"single": "gpu", "ddp": "node", "zero1_offload": "zero1-offload"}
    return names.get(engine, engine if engine in ("fsdp", "zero1", "zero2") else "node")


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("true", "1")


def _num_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the job step that this process belongs to; 1 outside a step.

    SLURM_NTASKS and SLURM_PROCID = 0 are also set in a batch script, which is one process.
    """
    if environment.get("SLURM_STEP_NUM_TASKS"):
        return _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    in_step = environment.get("SLURM_PROCID", "0") != "0" or "SLURM_STEP_NODELIST" in environment
    if in_step and environment.get("SLURM_NTASKS", "1") != "1":
        raise _incomplete(
            f"SLURM_NTASKS = {environment['SLURM_NTASKS']}, but SLURM_STEP_NUM_TASKS is not set; "
            "pass all SLURM_ variables of srun to the processes, or use `accelerate launch`"
        )
    return 1


def _number(environment: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    text = environment[name]
    number = int(text) if text.isdecimal() else -1
    if number < least or (most is not None and number > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise _incomplete(f"{name} = {text!r} is not a number {wanted}; correct it")
    return number


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) + (" is" if len(names) == 1 else " are")


def _incomplete(text: str) -> LaunchError:
    """An error of the variables of this process, which other processes need not have."""
    problem = LaunchError(f"launch environment: {text}")
    problem.everywhere = False
    return problem
