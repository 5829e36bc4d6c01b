"""Launcher environments: engines, SLURM ranks, refused launches, ranks that differ."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from commands import environment, free_port

from bigan.distributed.launch import check_same_program, connect, program
from bigan.distributed.launch_env import (
    FIRST_PORT,
    LAUNCHER,
    NUM_PORTS,
    check_devices,
    check_launch,
    chosen_engine,
    first_host,
    from_slurm,
    launch_remarks,
    requested_engine,
    set_variables,
)
from bigan.distributed.world import World
from bigan.errors import LaunchError

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}
MULTIPLE = {"WORLD_SIZE": "2"}
PORT = "MASTER_PORT"


def zero(stage: object, optimizer: str = "none", parameters: str = "none") -> dict[str, str]:
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": optimizer,
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": parameters,
    }


@pytest.mark.parametrize(
    ("setting", "requested", "world_size", "engine"),
    [
        ("auto", {}, 1, "single"),
        ("auto", {}, 2, "ddp"),
        ("auto", FSDP, 2, "fsdp"),
        ("auto", FSDP | {"FSDP_VERSION": "1"}, 2, "fsdp"),
        ("auto", FSDP | {"ACCELERATE_USE_FSDP": "false"}, 2, "ddp"),
        ("auto", zero(0), 2, "ddp"),
        ("auto", zero(1), 2, "zero1"),
        ("auto", zero(2), 2, "zero2"),
        ("auto", zero(3), 2, "zero3"),
        ("auto", zero(1, "cpu"), 2, "zero1_offload"),
        ("auto", zero(2, "cpu"), 2, "zero2_offload"),
        ("auto", {"ACCELERATE_USE_DEEPSPEED": "true"}, 2, "zero2"),  # accelerate's default
        ("auto", zero(1, "cpu") | {"WORLD_SIZE": "1"}, 1, "zero1_offload"),
        ("single", {}, 1, "single"),
        ("ddp", {}, 2, "ddp"),
        ("ddp", zero(0), 2, "ddp"),
        ("fsdp", FSDP, 2, "fsdp"),
        ("fsdp", {}, 2, "fsdp"),  # the launch file requests none: the config decides
        ("zero1", {}, 2, "zero1"),
        ("zero2_offload", zero(2, "cpu"), 2, "zero2_offload"),
    ],
)
def test_engine_follows_from_config_and_launch_file(
    setting: str, requested: Mapping[str, str], world_size: int, engine: str
) -> None:
    launched = MULTIPLE if world_size > 1 else {}
    assert chosen_engine(setting, {**launched, **requested}, world_size) == engine


@pytest.mark.parametrize(
    ("setting", "requested", "world_size", "expected"),
    [
        ("single", {}, 2, "engine = single, but 2 processes were started"),
        ("ddp", {}, 1, "engine = ddp needs several processes"),
        ("ddp", {"WORLD_SIZE": "1"}, 1, "engine = ddp needs several processes"),
        ("zero1", {}, 1, "engine = zero1 needs a launcher.*launch/zero1.yaml"),
        ("zero1", zero(2), 2, "engine = zero1, .* zero2.*launch/zero1.yaml"),
        ("zero1", zero(1, "cpu"), 2, "requests zero1_offload"),
        ("zero1", FSDP, 2, "requests fsdp"),
        ("ddp", FSDP, 2, "requests fsdp.*launch/node.yaml"),
        ("single", FSDP | {"WORLD_SIZE": "1"}, 1, "requests fsdp.*launch/gpu.yaml"),
        ("auto", FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, 2, "fsdp_offload_params is true"),
        ("auto", zero(3, "cpu"), 2, "ZeRO stage 3 with the optimizer offloaded to cpu"),
        ("auto", zero(3, "none", "cpu"), 2, "the parameters to cpu"),
        ("auto", zero(1, "nvme"), 2, "offloaded to nvme"),
        ("auto", zero(0, "cpu"), 2, "ZeRO stage 0"),
        ("auto", zero(4), 2, "ZeRO stage 4"),
    ],
)
def test_contradictions_are_refused_on_one_line(
    setting: str, requested: Mapping[str, str], world_size: int, expected: str
) -> None:
    launched = MULTIPLE if world_size > 1 else {}
    with pytest.raises(LaunchError, match=expected) as caught:
        chosen_engine(setting, {**launched, **requested}, world_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "engine"),
    [
        ({}, "ddp"),
        ({"zero_optimization": {"stage": 1}}, "zero1"),
        ({"zero_optimization": {"stage": "auto"}}, "zero2"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "zero2_offload",
        ),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "auto"}}}, "zero1"),
    ],
)
def test_deepspeed_json_sets_stage_and_offloading(
    tmp_path: Path, content: dict, engine: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    requested = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    assert requested_engine(requested) == engine
    (remark,) = launch_remarks(requested, "fp32", "auto")
    assert str(path) in remark


@pytest.mark.parametrize(
    ("text", "expected"), [(None, "No such file"), ("{", "JSON"), ("[]", "object")]
)
def test_unusable_deepspeed_json(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    requested = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    with pytest.raises(LaunchError, match=expected):
        requested_engine(requested)


@pytest.mark.parametrize(
    ("requested", "precision", "expected"),
    [
        ({}, "bf16", []),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "bf16", []),  # as in every launch file
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16", []),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "bf16", ["mixed_precision = fp16 is not used"]),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "fp32", ["precision = fp32"]),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, "fp32", []),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "fp32", ["dynamo_backend.*compile = eager"]),
        (FSDP | {"FSDP_VERSION": "1"}, "fp32", ["fsdp_version = 1"]),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "fp32", ["gradient_accumulation_steps"]),
    ],
)
def test_unused_launcher_settings_are_reported(
    requested: Mapping[str, str], precision: str, expected: list[str]
) -> None:
    remarks = launch_remarks(requested, precision, "eager")
    assert len(remarks) == len(expected)
    assert all(re.search(p, r) for p, r in zip(expected, remarks, strict=True))


TASK = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu-a[03-04]",
    "SLURM_JOB_NODELIST": "gpu-a[01-04]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
}


def test_ranks_of_srun() -> None:
    assert from_slurm(TASK) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu-a03",
        "MASTER_PORT": str(20_000 + 31 * 1234 % 12_000 + 2),
    }


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"SLURM_STEP_NODELIST": ""}, "MASTER_ADDR", "gpu-a01"),
        ({"SLURM_STEP_NUM_NODES": "1"}, "MASTER_ADDR", "127.0.0.1"),
        ({"MASTER_ADDR": "10.0.0.7"}, "MASTER_ADDR", "10.0.0.7"),
        ({"MASTER_PORT": "29500"}, "MASTER_PORT", "29500"),
        ({"WORLD_SIZE": "1"}, "WORLD_SIZE", "8"),  # of an image, not of a launcher
    ],
)
def test_srun_variants(changes: Mapping[str, str], key: str, value: str) -> None:
    assert from_slurm({**TASK, **changes})[key] == value


def test_ports_of_jobs_and_steps_differ_and_are_not_ephemeral() -> None:
    ports = [
        int(from_slurm({**TASK, "SLURM_JOB_ID": f"{job}", "SLURM_STEP_ID": f"{step}"})[PORT])
        for job in range(5_000_000, 5_000_300)
        for step in range(31)
    ]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= FIRST_PORT
    assert max(ports) < FIRST_PORT + NUM_PORTS < 32_768


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # a batch script or salloc, without srun
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        TASK
        | {
            "WORLD_SIZE": "16",
            "RANK": "3",
            "LOCAL_RANK": "3",
        },  # accelerate or torchrun inside srun
    ],
)
def test_no_ranks_of_srun(environment: Mapping[str, str]) -> None:
    assert from_slurm(environment) == {}


def test_incomplete_slurm_environment() -> None:
    with pytest.raises(LaunchError, match="MASTER_PORT = 'http'"):
        from_slurm(TASK | {"MASTER_PORT": "http"})
    with pytest.raises(LaunchError, match="srun started 8 tasks but 'SLURM_PROCID' is not set"):
        from_slurm({key: value for key, value in TASK.items() if key != "SLURM_PROCID"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("n[01-03,7]", "n01"),
        ("n[7,01-03]", "n7"),
        ("a,b[1-2]", "a"),
        ("gpu-a[3],gpu-b[1-2]", "gpu-a3"),
        ("rack[1-2]n[08-11]", "rack1n08"),
        ("c[1-2]-ib.cluster.org", "c1-ib.cluster.org"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", "n[", "n]1", "[]"])
def test_unreadable_node_list(nodes: str) -> None:
    with pytest.raises(LaunchError, match="cannot read the node list"):
        first_host(nodes)


def test_launches_of_unconnected_processes_are_refused() -> None:
    accelerate = {"ACCELERATE_MIXED_PRECISION": "no"}
    check_launch({})
    check_launch(accelerate)
    check_launch(TASK)  # `connect` connects them
    launched = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    check_launch(TASK | accelerate | launched | {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"})
    check_launch({"WORLD_SIZE": "1"})
    check_launch({"PMI_SIZE": "8"} | TASK)  # set by srun as well
    check_launch({"SLURM_JOB_ID": "1", "MASTER_ADDR": "n1"})  # exported before srun
    with pytest.raises(LaunchError, match="OMPI_COMM_WORLD_SIZE = 16"):
        check_launch({"OMPI_COMM_WORLD_SIZE": "16"} | TASK)  # mpirun in a step of its daemons
    with pytest.raises(LaunchError, match="started one"):
        check_launch(accelerate | {"MASTER_ADDR": "127.0.0.1"})
    with pytest.raises(LaunchError, match="srun started 8 launchers"):
        check_launch(TASK | accelerate)
    with pytest.raises(LaunchError, match="Megatron-LM"):
        check_launch({"ACCELERATE_USE_MEGATRON_LM": "true", "WORLD_SIZE": "2"})


def test_empty_variables_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `docker run -e WORLD_SIZE=` leaves them."""
    slurm = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
    others = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_MAX_RESTARTS")
    for name in (*LAUNCHER, *slurm, *others):
        monkeypatch.setenv(name, "")
    found = set_variables(os.environ)
    _, world = connect(60)
    assert world.size == 1
    assert chosen_engine("auto", found, world.size) == "single"
    assert launch_remarks(found, "fp32", "auto") == []


def test_more_processes_than_gpus_are_refused() -> None:
    check_devices({"LOCAL_WORLD_SIZE": "4"}, 4)
    check_devices({}, 1)
    with pytest.raises(LaunchError, match=r"8 processes were started on .* has 4 GPU\(s\)"):
        check_devices({"LOCAL_WORLD_SIZE": "8"}, 4)


def test_program_is_versions_engine_and_config() -> None:
    config = {"run_dir": "a", "data": {"path": "x", "block": 5}, "train": {"seed": 1}}
    one = program(config, "ddp")
    assert one == program(config | {"run_dir": "b", "data": {"path": "y", "block": 5}}, "ddp")
    streams = {"data": {name: {"path": name, "block": 5} for name in ("photos", "paintings")}}
    elsewhere = {"data": {name: {"path": "z", "block": 5} for name in ("photos", "paintings")}}
    assert program(streams, "ddp") == program(elsewhere, "ddp")
    assert program(streams, "ddp")["data.photos.block"] == "5"
    assert (one["train.seed"], one["data.block"], one["the engine"]) == ("1", "5", "ddp")
    assert one["torch version"][0].isdigit()
    assert one != program(config, "fsdp")
    assert one != program(config | {"train": {"seed": 2}}, "ddp")
    check_same_program(World(), one)


# Connected as srun starts them, with the variables of a DeepSpeed launch file.
TASKS = """
import json, os, sys
import torch, torch.distributed as dist
from bigan.errors import LaunchError
from bigan.distributed.launch_env import chosen_engine
from bigan.distributed.launch import check_same_program, connect, disconnect
from bigan.distributed.world import gather

requested = dict(os.environ)
accelerator, world = connect(600)  # a timeout that accelerate drops, because it is its default
check_same_program(world, {"torch version": "2", "train.seed": "1"})
kinds = ["cuda"] if torch.cuda.is_available() else ["cpu"]
said = ""
try:
    check_same_program(world, {"torch version": "2", "train.seed": str(world.rank)})
except LaunchError as error:
    said = str(error)
result = {
    "engine": chosen_engine("auto", requested, world.size), "said": gather(world, said),
    "ranks": gather(world, (world.rank, world.size, world.local_rank)),
    "timeouts": gather(world, [
        backend.options._timeout.total_seconds()
        for backend in map(dist.group.WORLD._get_backend, map(torch.device, kinds))
    ]),
    "kind": str(accelerator.distributed_type),
    "imported": [m for m in ("deepspeed", "transformers") if m in sys.modules],
    "left": [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))],
}
disconnect(world)
if world.is_rank_0:
    print(json.dumps(result))
"""


def test_srun_tasks_connect_without_accelerates_plugins() -> None:
    slurm = TASK | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
    requested = zero(1) | {"MASTER_PORT": str(free_port())}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", TASKS],
            env={
                **environment(),
                **slurm,
                **requested,
                "SLURM_PROCID": rank,
                "SLURM_LOCALID": rank,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        outputs = [task.communicate(timeout=200) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [0, 0], outputs
    result = json.loads(outputs[0][0])
    assert result["ranks"] == [[0, 2, 0], [1, 2, 1]]
    assert result["engine"] == "zero1"
    assert result["timeouts"] == [[600.0], [600.0]]
    assert result["kind"] in ("DistributedType.MULTI_CPU", "DistributedType.MULTI_GPU")
    assert result["imported"] == [], "accelerate must not create plugins"
    assert result["left"] == []
    node = os.uname().nodename
    assert len(set(result["said"])) == 1
    assert f"rank 1 on {node} has train.seed = 1, but rank 0 has 0" in result["said"][0]
