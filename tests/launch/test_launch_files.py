"""Every launch file with the real `accelerate launch`: the environment of the started processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment, free_port

from bigan.distributed.launch_env import chosen_engine, launch_remarks

FILES = sorted((ROOT / "launch").glob("*.yaml"))

# file: (engine, machines, processes in all)
EXPECTED = {
    "cluster": ("ddp", 2, 16),
    "cluster-c10d": ("ddp", 2, 16),
    "cpu": ("ddp", 1, 2),
    "fsdp": ("fsdp", 1, 2),
    "gpu": ("single", 1, 1),
    "node": ("ddp", 1, 8),
    "zero1": ("zero1", 1, 2),
    "zero1-offload": ("zero1_offload", 1, 2),
    "zero2": ("zero2", 1, 2),
}

# Writes the environment of a started process.
PROBE = """
import json, os, sys
from pathlib import Path
name = f"{os.environ.get('GROUP_RANK', 0)}-{os.environ.get('LOCAL_RANK', 0)}.json"
Path(sys.argv[1], name).write_text(json.dumps(dict(os.environ)))
"""


# Reads a list of commands and runs each as `accelerate launch` in a fork, which saves the imports.
LAUNCHER = """
import json, os, sys, traceback
import torch.distributed.run
from accelerate.commands.launch import main

def launch(command):
    sys.argv = ["accelerate-launch", *command]
    try:
        main()
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

commands = json.load(sys.stdin)
for command in commands:
    if os.fork() == 0:
        os._exit(launch(command))
codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in commands]
sys.exit(any(codes))
"""


def header_options(path: Path) -> list[str]:
    """The options of the command in the comment at the top, without `--config_file`."""
    lines = path.read_text().splitlines()
    comment = " ".join(line[1:].strip(" \\") for line in lines if line.startswith("#"))
    command = re.search(r"accelerate launch (.*?) -m bigan train (\S+)", comment)
    assert command, f"{path.name} does not begin with its command"
    words = command[1].split()
    assert words[:2] == ["--config_file", f"launch/{path.name}"]
    return words[2:]


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """Launch file -> the environments of all processes that its own command starts."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "probe.py").write_text(PROBE)
    commands = []
    for path in FILES:
        (folder / path.stem).mkdir()
        options = header_options(path)
        port = str(free_port())
        values = {"FIRST_MACHINE": "127.0.0.1", "29500": port}
        if "--main_process_port" not in options:
            options += ["--main_process_port", port]
        for rank in range(EXPECTED[path.stem][1]):
            own = [{**values, "RANK": str(rank)}.get(word, word) for word in options]
            if EXPECTED[path.stem][1] > 1 and "--machine_rank" not in own:
                # c10d assigns the ranks of nodes. On node 0 accelerate requires a free port, which
                # it is not, because here both nodes are one machine.
                own = ["--machine_rank", "1", *own]
            commands.append(
                [
                    "--config_file",
                    str(path),
                    *own,
                    str(folder / "probe.py"),
                    str(folder / path.stem),
                ]
            )
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER],
        env=environment() | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},  # required by c10d's file
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(json.dumps(commands), timeout=240)
        assert process.returncode == 0, errors[-3000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return {
        path.stem: [json.loads(p.read_text()) for p in sorted((folder / path.stem).iterdir())]
        for path in FILES
    }


def test_every_launch_file_is_tested() -> None:
    assert {path.stem for path in FILES} == EXPECTED.keys()


@pytest.mark.full
@pytest.mark.parametrize("name", EXPECTED)
def test_file_starts_the_expected_processes(
    name: str, environments: dict[str, list[dict[str, str]]]
) -> None:
    engine, num_machines, num_processes = EXPECTED[name]
    processes = environments[name]
    assert len(processes) == num_processes
    if num_processes == 1:
        assert "WORLD_SIZE" not in processes[0]
    else:
        assert sorted(int(p["RANK"]) for p in processes) == list(range(num_processes))
        assert {int(p["WORLD_SIZE"]) for p in processes} == {num_processes}
        assert {int(p["LOCAL_WORLD_SIZE"]) for p in processes} == {num_processes // num_machines}
        assert len({(p["MASTER_ADDR"], p["MASTER_PORT"]) for p in processes}) == 1
        restarts = {int(p["TORCHELASTIC_MAX_RESTARTS"]) for p in processes}
        assert restarts == {3 if name == "cluster-c10d" else 0}
    for process in processes:
        assert chosen_engine("auto", process, num_processes) == engine
        assert chosen_engine(engine, process, num_processes) == engine
        assert launch_remarks(process, "fp32", "auto") == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_accelerate_reads_the_file(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    content = load_config_from_file(str(path))
    assert (content.num_machines, content.num_processes) == EXPECTED[path.stem][1:]
    assert str(content.distributed_type.value) not in ("MULTI_CPU",), (
        "MULTI_CPU starts unconnected processes"
    )
    assert content.use_cpu is False
