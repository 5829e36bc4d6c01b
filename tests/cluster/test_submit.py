"""`bigan submit` with a recorded sbatch: what is checked, frozen, submitted and printed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.fake_slurm import hold_lock, line
from commands import ROOT, SMOKE

from bigan import config as configs
from bigan.cli.main import main
from bigan.cluster import freeze, jobs, plan, slurm, words
from bigan.cluster.profiles import Profile, load_profile
from bigan.cluster.sweep_folder import SweepFolder, Trial
from bigan.reporting.tracker import revision
from bigan.run_config import load_config

FAKE = """#!/bin/bash
# Records its arguments and environment; prints 1, 2, ...; fails if there is a file fail-<number>.
if [ "$1" = --test-only ]; then cat >"$FAKE/stdin"; echo "sbatch: Job 9 to start now" >&2; exit; fi
number=1
while [ -e "$FAKE/$number" ]; do number=$((number + 1)); done
if [ -e "$FAKE/fail-$number" ]; then echo "sbatch: error: refused" >&2; exit 1; fi
printf '%s\\0' "$@" >"$FAKE/$number"
env >"$FAKE/environment"
echo "$number;cluster"
"""


SWEEP = "{method: {name: grid}, parameters: {train.batch: [40, 25]}"


class FakeSlurm:
    """The commands of SLURM in a folder: they record how they are called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in {
            "sbatch": FAKE,
            "squeue": '#!/bin/bash\ncat "$FAKE/queue" 2>/dev/null || :\n',
            "scancel": '#!/bin/bash\necho "$@" >"$FAKE/cancelled"\n',
        }.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def calls(self) -> list[list[str]]:
        """argv of each call of sbatch."""
        files = sorted(self.folder.glob("[0-9]*"), key=lambda path: int(path.name))
        return [path.read_bytes().decode().split("\0")[:-1] for path in files]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("BIGAN_SLURM_PROFILE", raising=False)
    package = tmp_path / "package" / "bigan"  # a small one: copying bigan takes time
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(freeze, "PACKAGE", package)
    return FakeSlurm(folder)


@pytest.fixture
def without_slurm(fake: FakeSlurm) -> None:
    for file in fake.folder.iterdir():
        file.unlink()
    os.environ["PATH"] = str(fake.folder)


def submit(*arguments: object) -> int:
    return main(["submit", str(SMOKE), *map(str, arguments)])


def records(run: Path = Path("runs/smoke-digits")) -> list[dict[str, Any]]:
    return jobs.read(run)


def files_below(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The only line of an error; nothing is written."""
    before = files_below(Path())
    try:
        code = submit(*arguments)
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert files_below(Path()) == before
    return error[-1]


# ---- what is written and submitted ---------------------------------------------------------------


def test_submission_is_frozen_and_recorded(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("runs/smoke-digits")
    assert submit("--nodes", 2, "--time", 30, "train.seed=3", "--evaluate", "during") == 0
    output = capsys.readouterr().out
    for command in ("status", "logs", "cancel"):
        assert f"bigan {command} {run}" in output
    folder = run.absolute() / "slurm" / "001"
    expected = load_config(SMOKE, ["train.seed=3"])
    assert load_config(folder / "config.yaml") == expected
    train, evaluate = fake.calls()
    assert train[-1] == str(folder / "train.sbatch")
    assert f"--chdir={Path.cwd()}" in train
    assert f"--output={run.absolute()}/slurm/logs/%j.log" in train
    assert {"--nodes=2", "--time=30", "--requeue", "--open-mode=append"} <= set(train)
    assert "--signal=B:USR1@180" in train
    assert not [option for option in train if "gpu" in option]
    assert "--dependency=after:1" in evaluate
    assert "BIGAN_TRAINING_JOB=1\n" in (folder / "evaluate.sbatch").read_text()
    first, second = records()
    assert (first["job"], first["kind"], first["nodes"], first["gpus"]) == ("1", "train", 2, 0)
    assert first["command"] == ["sbatch", *train]
    assert first["script"] == "slurm/001/train.sbatch"
    assert (second["job"], second["kind"]) == ("2", "evaluate")
    assert (run / "slurm" / "logs").is_dir()
    assert not [name for name in files_below(run) if name.endswith(".tmp")]
    launch_file = yaml.safe_load((folder / "accelerate.yaml").read_text())
    assert launch_file == yaml.safe_load((ROOT / "launch" / "cluster.yaml").read_text()) | {
        "num_machines": 1,
        "num_processes": 1,
    }


def test_frozen_code_is_what_the_job_runs(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another package bigan/ is in the working folder."""
    monkeypatch.setattr(freeze, "PACKAGE", ROOT / "bigan")
    assert submit("--time", 30) == submit("--time", 30) == 0
    run = Path("runs/smoke-digits").absolute()
    (code,) = (run / "slurm" / "code").iterdir()
    assert records()[0]["code"]["hash"] == code.name
    assert [path.name for path in sorted((run / "slurm").glob("0*"))] == ["001", "002"]
    recorded = json.loads((code / "revision.json").read_text())
    assert {"version", "commit", "dirty"} == set(recorded)
    copied = {str(p.relative_to(code)) for p in code.rglob("*") if p.is_file()}
    assert not [name for name in copied if "__pycache__" in name]
    assert {"bigan/__init__.py", "bigan/cluster/templates/job.sh", "bigan/py.typed"} <= copied
    program = "import bigan; print(bigan.__file__)"
    script = (run / "slurm" / "001" / "train.sbatch").read_text()
    settings = script[script.index("unset") : script.index("export BIGAN_RUN_DIR")]
    (tmp_path / "job.sh").write_text(f"{settings}\n{shlex.join([sys.executable, '-c', program])}\n")
    output = subprocess.run(
        ["bash", tmp_path / "job.sh"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    package = code / "bigan" / "__init__.py"
    assert output.stdout == f"{package}\n"
    (code / "revision.json").write_text('{"version": "1", "commit": "abc", "dirty": true}')
    assert revision(package) == {"commit": "abc", "dirty": True}
    (code / "revision.json").write_text('{"version": "1", "commit": null, "dirty": null}')
    assert revision(package) is None


def test_hash_changes_with_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "bigan"
    (package / "__pycache__").mkdir(parents=True)
    (package / "a.py").write_text("1")
    monkeypatch.setattr(freeze, "PACKAGE", package)
    first = freeze.current_code()
    (package / "__pycache__" / "a.cpython-311.pyc").write_text("compiled")
    assert freeze.current_code().hash == first.hash
    (package / "b.py").write_text("")
    assert freeze.current_code().hash != first.hash


def test_chain(fake: FakeSlurm) -> None:
    assert submit("--time", 30, "--chain", 3, "--evaluate", "after") == 0
    *links, evaluate = fake.calls()
    wanted = [[], ["--dependency=afterany:1"], ["--dependency=afterany:2"]]
    assert [[o for o in link if o.startswith("--dependency")] for link in links] == wanted
    assert all("--no-requeue" in link and "--requeue" not in link for link in links)
    assert {"--dependency=afterok:3", "--kill-on-invalid-dep=yes", "--requeue"} <= set(evaluate)
    scripts = [Path(link[-1]).read_text() for link in links]
    for number, script in enumerate(scripts, 1):
        assert f"BIGAN_CHAIN_LINK={number}\n" in script
        assert "BIGAN_CHAIN_LENGTH=3\n" in script
    assert len({s.partition("BIGAN_CHAIN=")[2].split()[0] for s in scripts}) == 1
    assert [(job["link"], job["links"]) for job in records()] == [(1, 3), (2, 3), (3, 3), (1, 1)]


@pytest.mark.parametrize(("options", "limit"), [((), 3), (("--parallel", 2), 2)])
def test_sweep_is_one_array(
    fake: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
    limit: int,
) -> None:
    Path("s.yaml").write_text(f"{SWEEP}, parallel: 3}}")
    assert submit("--time", 30, "--sweep", "s.yaml", *options, "run_dir=runs/s") == 0
    (call,) = fake.calls()
    assert f"--array=0-1%{limit}" in call
    assert any(option.endswith("/logs/%A_%a.log") for option in call)
    assert Path("runs/s/sweep.yaml").exists()
    assert records(Path("runs/s"))[0]["kind"] == "sweep"
    Path("s.yaml").write_text(f"{SWEEP.replace('25', '50')}}}")  # another sweep in its folder
    assert "parameters" in refusal(
        capsys, "--time", 30, "--sweep", "s.yaml", "run_dir=runs/s", "--dry-run"
    )
    Path("s.yaml").write_text(f"{SWEEP}}}")
    for index in range(2):
        SweepFolder(Path("runs/s")).write(Trial(index, {}, "complete"))
    assert submit("--time", 30, "--sweep", "s.yaml", "run_dir=runs/s") == 0
    assert "method.trials" in capsys.readouterr().out
    assert len(fake.calls()) == 1


def test_processes_of_every_trial_are_checked(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("s.yaml").write_text(f"{SWEEP}}}")
    line = refusal(capsys, "--nodes", 2, "--sweep", "s.yaml", "run_dir=runs/s")
    assert "train.batch=25" in line
    assert "2 node(s)" in line
    assert not fake.calls()


HOSTILE_RUNS = [
    "two words",
    "it's",
    "$(touch x)",
    "`touch x`",
    "a;touch x",
    "50%j",
    "-rf",
    "ü雪",
    '"',
]


@pytest.mark.parametrize("name", HOSTILE_RUNS)
def test_hostile_run_folders_and_overrides(fake: FakeSlurm, name: str) -> None:
    text = f"experiment {name}"
    overrides = [f"run_dir={json.dumps(f'runs/{name}')}", f"tracking.experiment={json.dumps(text)}"]
    assert submit("--time", 30, *overrides) == 0
    (call,) = fake.calls()
    run = Path("runs").absolute() / name
    assert call[-1] == str(run / "slurm/001/train.sbatch")
    assert load_config(run / "slurm/001/config.yaml").tracking.experiment == text
    assert f"--output={str(run).replace('%', '%%')}/slurm/logs/%j.log" in call
    record = records(run)[0]["command"]
    assert shlex.split(shlex.join(record)) == ["sbatch", *call]
    assert not Path("x").exists()
    (job,) = [option for option in call if option.startswith("--job-name=")]
    assert words.name(job.partition("=")[2])


def test_variables_of_a_job_are_not_inherited(
    fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitted inside a job, for example an interactive one."""
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID", "SRUN_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/s.conf")
    assert submit("--time", 30) == 0
    environment = (fake.folder / "environment").read_text().splitlines()
    assert "SLURM_CONF=/etc/s.conf" in environment
    assert not [e for e in environment if e.startswith(("SLURM_R", "SLURM_A", "SRUN_"))]


def test_signal_fits_the_time_limit(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert submit("--time", 3, "--evaluate", "after", "--evaluate-time", 60) == 0
    signals = [o for argv in fake.calls() for o in argv if o.startswith("--signal")]
    assert signals == ["--signal=B:USR1@90", "--signal=B:USR1@180"]
    profile = tmp_path / "p.yaml"
    profile.write_text("signal_seconds: 180\n")
    given = ("--profile", profile, "run_dir=runs/other")
    line = refusal(capsys, "--time", 3, *given)
    assert "--time 3" in line
    assert "signal_seconds = 180" in line
    late = ("--evaluate", "after", "--evaluate-time", 2)
    assert "--evaluate-time 2" in refusal(capsys, "--time", 30, *late, *given)


# ---- failures ------------------------------------------------------------------------------------


def test_a_refused_job_leaves_no_folder(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake.folder / "fail-1").touch()
    assert submit("--time", 30) == 2
    assert "refused" in capsys.readouterr().err
    run = Path("runs/smoke-digits")
    assert not list((run / "slurm").glob("0*"))
    assert not records()
    (fake.folder / "fail-1").unlink()
    assert submit("--time", 30) == 0


def test_a_refused_second_job_cancels_the_first(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake.folder / "fail-2").touch()
    assert submit("--time", 30, "--evaluate", "after") == 2
    assert (fake.folder / "cancelled").read_text().split() == ["1"]
    assert "cancelled: 1" in capsys.readouterr().out
    assert [job["job"] for job in records()] == ["1"]


def test_an_interrupt_cancels_what_was_submitted(
    fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = slurm.sbatch

    def interrupted(arguments: list[str]) -> str:
        if fake.calls():
            raise KeyboardInterrupt
        return sbatch(arguments)

    monkeypatch.setattr(slurm, "sbatch", interrupted)
    assert submit("--time", 30, "--chain", 2) == 130
    assert (fake.folder / "cancelled").read_text().split() == ["1"]


def test_jobs_that_cannot_be_cancelled_are_named(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    (fake.folder / "fail-3").touch()
    (fake.folder / "scancel").write_text("#!/bin/bash\nexit 1\n")
    assert submit("--time", 30, "--chain", 3) == 2
    assert "scancel 1 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "code", "fact"),
    [
        ("echo", 2, "not the id of a job"),
        ("echo Submitted batch job", 2, "not the id of a job"),
        ("echo your quota: 95", 2, "not the id of a job"),
        ("echo Welcome to 7; echo '4;alpha'; echo your quota: 95", 0, "job 4 "),
        ("echo Submitted batch job 4", 0, "job 4 "),
        ("printf 'd\\xe9fense\\n' | tee /dev/stderr; echo 4", 0, "job 4 "),
        ("printf 'd\\xe9fense\\n' >&2; exit 1", 2, "fense"),
        ("exit 3", 2, "exit code 3"),
        ("exec sleep 9", 2, "squeue --me"),
    ],
)
def test_answers_of_sbatch(
    fake: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    code: int,
    fact: str,
) -> None:
    monkeypatch.setattr(slurm, "TIMEOUT_SECONDS", 0.4 if "sleep" in answer else 60.0)
    (fake.folder / "sbatch").write_text(f"#!/bin/bash\n{answer}\n")
    assert submit("--time", 30) == code
    assert fact in "".join(capsys.readouterr())


def test_a_run_in_the_queue_is_not_submitted_again(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("--time", 30) == 0
    run = Path("runs/smoke-digits").absolute()
    queue = fake.folder / "queue"
    queue.write_text(f"{line('17', 'running', run)}\n{line('1', 'running', run)}\n")
    assert "job 1 " in refusal(capsys, "--time", 30)
    # Another job with the number, of another cluster; and one that has ended.
    queue.write_text(f"{line('1', 'running', Path('/other'))}\n")
    assert submit("--time", 30) == 0
    queue.write_text(f"{line('1', 'completed', run)}\n")
    assert submit("--time", 30) == 0


def test_a_run_that_is_trained_here_is_not_submitted(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path("runs/smoke-digits") / "slurm").mkdir(parents=True)
    hold_lock(Path("runs/smoke-digits"))
    assert f"pid {os.getpid()}" in refusal(capsys, "--time", 30)
    assert not fake.calls()


def test_a_complete_run_is_submitted_only_for_more_images(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("runs/smoke-digits")
    run.mkdir(parents=True)
    config = load_config(SMOKE)
    (run / "config.yaml").write_text(configs.dump(config))
    (run / "DONE").write_text(f"{config.train.total_images}\n")
    assert submit("--time", 30) == 0
    assert "train.total_images" in capsys.readouterr().out
    assert not fake.calls()
    assert submit("--time", 30, "train.total_images=4000") == 0
    assert submit("--time", 30, "--evaluate", "after") == 0
    assert len(fake.calls()) == 3


def test_two_submissions_at_once_are_one(fake: FakeSlurm) -> None:
    """The second one waits until the first one has recorded its job, and finds it."""
    run = Path("runs/smoke-digits").absolute()
    (fake.folder / "queue").write_text(f"{line('1', 'begin', run)}\n")
    text = (fake.folder / "sbatch").read_text()
    (fake.folder / "sbatch").write_text(text.replace("number=1\n", "sleep 0.2\nnumber=1\n"))
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(submit("--time", 30))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(codes) == [0, 2]
    assert len(fake.calls()) == len(records()) == 1


def test_a_config_that_contradicts_the_run_is_refused(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("runs/smoke-digits")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(configs.dump(load_config(SMOKE)))
    assert "train.seed" in refusal(capsys, "--time", 30, "train.seed=3")
    assert not fake.calls()


@pytest.mark.parametrize(
    "url",
    [
        "https://anna:pa55word@host/set",
        "https://host/set?sig=pa55word",
        "pipe:curl -u a:pa55word x",
    ],
)
def test_credentials_are_not_frozen(
    fake: FakeSlurm, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    line = refusal(capsys, "--time", 30, f"data.path={url}")
    assert "data.path" in line
    assert "pa55word" not in line


TIME = ("--time", "24:00:00")


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (("--time", "5x"), ["--time", "'5x'"]),
        (("--time", "0"), ["--time"]),
        (("--time", "1:2:3:4"), ["--time"]),
        (("--nodes", "0"), ["--nodes"]),
        (("--gpus", "-1"), ["--gpus"]),
        (("--chain", "0"), ["--chain"]),
        (("--mem", "64 GB"), ["--mem"]),
        (("--evaluate", "during", "--evaluate", "after"), ["--evaluate", "twice"]),
        (("--nodes", "1", "--nodes", "2"), ["--nodes", "twice"]),
        (("--evaluate-gpus", "1"), ["--evaluate-gpus", "--evaluate"]),
        (("--parallel", "2"), ["--parallel", "--sweep"]),
        (("--sweep", "s.yaml", "--chain", "2"), ["--chain", "--sweep"]),
        (("--sweep", "s.yaml", "--evaluate", "after"), ["--evaluate", "--sweep"]),
        (("--gpus", "2", "--processes", "4"), ["--processes 4", "2 GPU"]),
        (("--nodes", "3"), ["train.batch = 40", "3 processes"]),
        (("--gpus", "8", "train.micro_batch=3"), ["train.micro_batch = 3"]),
        (("--nodes", "2", "engine=single"), ["engine"]),
        (("--partition", "a b"), ["--partition"]),
        (("--partition", "$(touch x)"), ["--partition"]),
        (("--account", "a\nb"), ["--account"]),
        (("--qos", "--wrap=x"), ["--qos"]),
        (("--constraint", "a;b"), ["--constraint"]),
        (("--name", "a/%j"), ["--name"]),
        (("--profile", "missing.yaml"), ["missing.yaml"]),
        (("--dry-run", "--test-only"), ["--test-only"]),
        (('run_dir="a\\nb"',), ["run_dir"]),
        (("run_dir=a\\b",), ["run_dir"]),
        (("run_dir=a:b",), ["run_dir"]),
        (("train.sed=1",), ["train.sed", "train.seed"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    fake: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    facts: list[str],
) -> None:
    line = refusal(capsys, *arguments)
    assert all(fact in line for fact in facts), line
    assert not fake.calls()


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("launch: srun", ["launch", "launcher"]),
        ("partition: a b", ["partition", "'a b'"]),
        ("options: {partition: x}", ["options", "partition"]),
        ("options: {output: x}", ["options", "output"]),
        ("options: {comment: 'a b'}", ["options", "'a b'"]),
        ("options: {Bad_name: 1}", ["options", "Bad_name"]),
        ("environment: {A-B: 1}", ["environment", "A-B"]),
        ("environment: {A: true}", ["environment.A"]),
        ("container: {kind: docker, image: x}", ["container.kind", "pyxis"]),
        ("container: {kind: pyxis}", ["container", "image"]),
        ("container: {kind: pyxis, image: x, mounts: ['a:b']}", ["container.mounts", "'a:b'"]),
        ("{gpus: gres, options: {gres: 'ssd:1'}}", ["gres"]),
        ("signal_seconds: 0", ["signal_seconds"]),
        ("max_requeues: -1", ["max_requeues"]),
        ("launcher: mpirun", ["launcher", "accelerate"]),
    ],
)
def test_errors_of_profiles(tmp_path: Path, text: str, facts: list[str]) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(text)
    with pytest.raises(configs.ConfigError) as raised:
        load_profile(file)
    assert all(fact in str(raised.value) for fact in [str(file), *facts]), raised.value
    assert "\n" not in str(raised.value)


def test_profile_of_the_environment_and_the_command_line(
    fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("{partition: a, account: me, options: {exclusive: true, nice: 5, hold: false}}")
    monkeypatch.setenv("BIGAN_SLURM_PROFILE", str(file))
    assert submit("--time", 30, "--partition", "fast", "--gpus", 2) == 0
    (call,) = fake.calls()
    assert {"--partition=fast", "--account=me", "--exclusive", "--nice=5"} <= set(call)
    assert "--gpus-per-node=2" in call
    assert not [option for option in call if "hold" in option]


# ---- without a submission ------------------------------------------------------------------------


@pytest.mark.usefixtures("without_slurm")
def test_dry_run_needs_no_slurm_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("--time", 30, "--evaluate", "after", "run_dir=runs/a b", "--dry-run") == 0
    output = capsys.readouterr().out
    assert not list(Path().iterdir())
    lines = output.splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("sbatch")]
    assert [Path(command[-1]).name for command in commands] == ["train.sbatch", "evaluate.sbatch"]
    assert commands[0][-1] == str(Path("runs/a b/slurm/001/train.sbatch").absolute())
    assert "--dependency=afterok:JOB_1" in commands[1]
    assert lines.count("#!/bin/bash") == 2
    assert lines.count('train_job "$@"') == 1


@pytest.mark.parametrize(
    ("options", "fact"),
    [((), "no --gpus"), (("--gpus", 1), "no --cpus"), (("--gpus", 1, "--cpus", 8), None)],
)
def test_missing_gpus_and_cpus_are_stated(
    fake: FakeSlurm,
    capsys: pytest.CaptureFixture[str],
    options: tuple[object, ...],
    fact: str | None,
) -> None:
    assert submit("--time", 30, "--dry-run", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("data/digits: ") for line in lines), "it is not in this folder"
    stated = [line for line in lines if line.startswith("no --")]
    assert [line.partition(":")[0] for line in stated] == ([fact] if fact else [])


@pytest.mark.parametrize(
    ("request_", "cpus", "evaluator"),
    [
        ({"gpus": 8, "cpus": 64, "memory": "800G"}, "64", ("8", "100G")),
        ({"gpus": 8}, "32", ("4", None)),
        ({"processes": 2}, "2", (None, None)),
        ({"cpus": 3, "memory": "0"}, "3", ("3", "0")),
        ({"gpus": 8, "memory": "0"}, "32", ("4", "0")),
        ({"gpus": 8, "cpus": 4, "evaluate_gpus": 0}, "4", ("4", None)),
    ],
)
def test_cores_and_memory(
    request_: dict[str, Any], cpus: str, evaluator: tuple[str | None, str | None]
) -> None:
    """Of the evaluator: its share of what a training node has."""

    def option(job: plan.Job, name: str) -> str | None:
        found = [o.partition("=")[2] for o in job.options if o.startswith(f"--{name}=")]
        return found[0] if found else None

    request = plan.Request(SMOKE, **request_, evaluate="after")
    train, evaluate = plan.jobs_of(request, Profile(cpus_per_gpu=4), Path("/r"))
    assert option(train, "cpus-per-task") == cpus
    assert (option(evaluate, "cpus-per-task"), option(evaluate, "mem")) == evaluator


def test_test_only_leaves_no_trace(fake: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("--time", 30, "--evaluate", "during", "--test-only") == 0
    assert capsys.readouterr().out.count("Job 9 to start now") == 2
    assert not list(Path().iterdir())
    assert (fake.folder / "stdin").read_text().startswith("#!/bin/bash")


@pytest.mark.usefixtures("without_slurm")
def test_without_slurm_the_missing_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("--time", 30) == 2
    assert "sbatch: not found" in capsys.readouterr().err


# ---- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("90:30", 5430), ("1:00:00", 3600), ("24:00:00", 86400), ("2-00", 172800),
        ("1-12:30", 131400), ("1-00:00:01", 86401),
    ],
)  # fmt: skip
def test_time_formats_of_slurm(text: str, seconds: int) -> None:
    assert words.time(text) == text
    assert words.seconds(text) == seconds


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits-2", "digits-2"),
        ("a b$(c)", "a-b-c"),
        ("--x", "x"),
        ("雪", "bigan"),
        ("a" * 99, "a" * 60),
    ],
)
def test_job_names(name: str, expected: str) -> None:
    assert plan.job_name(Path("runs") / name) == expected


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (Profile(), sys.executable),
        (Profile(setup="module load x"), "python"),
        (Profile(setup="module load x", python="/opt/p"), "/opt/p"),
    ],
)
def test_python_of_a_job(profile: Profile, expected: str) -> None:
    job = plan.jobs_of(plan.Request(SMOKE), profile, Path("/r"))[0]
    places = plan.Places(Path("/r"), Path("/r/f"), Path("/r/c"), Path("/w"))
    assert f"export BIGAN_PYTHON={expected}\n" in job.rendered(places, profile, [])


def test_jobs_of_two_processes_are_appended_whole(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    code = (
        "import sys; from pathlib import Path; from bigan.cluster import jobs\n"
        "job = {'job': sys.argv[2], 'x': 'y' * 999}\n"
        "for _ in range(200): jobs.append(Path(sys.argv[1]), job)"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, str(n)], cwd=ROOT) for n in (1, 2)
    ]
    assert [process.wait(60) for process in started] == [0, 0]
    assert sorted(job["job"] for job in jobs.read(tmp_path)) == ["1"] * 200 + ["2"] * 200
