"""The scripts and commands of `bigan submit`: as expected, valid bash, every value quoted.

The expected texts are in golden/, without env.sh and job.sh. After a change of the templates:
    BIGAN_WRITE_GOLDEN=1 python -m pytest tests/cluster/test_submit_scripts.py && git diff
"""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from commands import ROOT

from bigan.cluster import plan, render
from bigan.cluster.plan import Job, Places, Request
from bigan.cluster.profiles import Container, Profile, load_profile

GOLDEN = Path(__file__).parent / "golden"
PROFILES = ROOT / "slurm" / "profiles"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
RUN = Path("/shared/runs/a")
PLACES = Places(
    RUN, RUN / "slurm/001", RUN / "slurm/code/0123456789abcdef", Path("/home/anna/bigan")
)
CONFIG = Path("configs/digits.yaml")
LARGE = {"nodes": 4, "gpus": 8, "time": "24:00:00", "cpus": 64, "memory": "800G"}
CASES: dict[str, tuple[str | None, Request]] = {
    "cpus": (None, Request(CONFIG, nodes=2, time="30", processes=2)),
    "generic": ("generic", Request(CONFIG, **LARGE)),
    "generic-srun": ("generic-srun", Request(CONFIG, **LARGE)),
    "pyxis": ("pyxis", Request(CONFIG, **LARGE)),
    "apptainer": ("apptainer", Request(CONFIG, **LARGE)),
    "evaluate-during": ("generic", Request(CONFIG, **LARGE, evaluate="during")),
    "evaluate-after": ("pyxis", Request(CONFIG, **LARGE, evaluate="after", evaluate_gpus=2)),
    "chain": (None, Request(CONFIG, gpus=1, time="8:00:00", chain=2, evaluate="during")),
    "sweep": ("generic", Request(CONFIG, gpus=1, time="60", sweep=Path("s.yaml"), parallel=4)),
}  # fmt: skip


def profile_of(name: str | None) -> Profile:
    if name == "generic-srun":
        return profile_of("generic").model_copy(update={"launcher": "srun"})
    return load_profile(PROFILES / f"{name}.yaml") if name else Profile()


def submission(name: str) -> list[tuple[Job, str, list[str]]]:
    """(job, script, command) of each job of a case, whose ids are 7, 8, ..."""
    known, request = CASES[name]
    profile = profile_of(known)
    jobs = plan.jobs_of(request, profile, RUN, num_trials=12)
    ids = [str(7 + number) for number, _ in enumerate(jobs)]
    return [
        (job, job.rendered(PLACES, profile, ids[:k]), job.command(PLACES, ids[:k]))
        for k, job in enumerate(jobs)
    ]


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/bigan/bin/python")
    monkeypatch.setattr(plan.secrets, "token_hex", lambda number: "0123abcd")
    monkeypatch.delenv("BIGAN_SLURM_PROFILE", raising=False)


@pytest.mark.usefixtures("fixed")
def test_scripts_and_commands_are_as_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    template = render.source
    monkeypatch.setattr(
        render, "source", lambda name: template(name) if name.endswith(".j2") else f"# {name}\n"
    )
    texts: dict[str, str] = {}
    commands = []
    for name in CASES:
        for job, script, command in submission(name):
            texts[f"{name}-{job.script}"] = script
            commands.append(f"{name}: {shlex.join(command)}\n")
    texts["commands.txt"] = "".join(commands)
    if os.environ.get("BIGAN_WRITE_GOLDEN"):
        for old in GOLDEN.iterdir():
            old.unlink()
        for file, text in texts.items():
            (GOLDEN / file).write_text(text)
    assert {path.name: path.read_text() for path in GOLDEN.iterdir()} == texts


def test_scripts_are_clean_bash(tmp_path: Path) -> None:
    """All of them, and one with job.sh for each kind; `make lint` checks the other scripts."""
    kinds: set[str] = set()
    files = []
    for name in CASES:
        for job, script, _ in submission(name):
            file = tmp_path / f"{name}-{job.script}"
            file.write_text(script)
            subprocess.run(["bash", "-n", file], check=True)
            if job.kind in kinds:  # shellcheck needs half a second for job.sh
                file.write_text(script.replace(render.source("job.sh"), ""))
            kinds.add(job.kind)
            files.append(file)
    assert kinds == {"train", "evaluate", "sweep"}
    command = [SHELLCHECK, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_value_that_a_template_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "source", lambda name: "echo {{ value }} {{ missing }}\n")
    with pytest.raises(jinja2.UndefinedError, match="missing"):
        render.render("any.j2", {"value": 1})


def test_included_files_are_no_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a.j2": '{% include "b.sh" %}\n', "b.sh": "echo ${#a[@]} {{ x }} {% y %}\n"}
    monkeypatch.setattr(render, "source", files.__getitem__)
    assert render.render("a.j2", {}).strip() == files["b.sh"].strip()


# ---- quoting ------------------------------------------------------------------------------------

HOSTILE = [
    "two words", "it's", 'say "hi"', "$(touch executed)", "`touch executed`", "; touch executed",
    "a\ntouch executed\n", "| touch executed", "&& touch executed", "%j %% %A", "-rf", "--help",
    "ünïcödé 雪", "$HOME ${PATH}", "\\", "'\"'\"'", "~", "*", "#comment", "{{ x }}", "{% raw %}",
    "!!", "\t", "<(touch executed)", "> executed", "$'\\n'", "a\\\nb",
]  # fmt: skip
RECORDER = """
record() {
    printf '%s\\0' "$@" >"$RECORD"
    for name in BIGAN_RUN_DIR BIGAN_PYTHON BIGAN_IMAGE BIGAN_LAUNCH_FILE PYTHONPATH TEXT; do
        printf '%s\\0' "${!name}" >>"$RECORD"
    done
    printf '%s\\0' "${BIGAN_CONTAINER_OPTIONS[@]}" >>"$RECORD"
}
train_job() { record "$@"; }
evaluate_job() { record "$@"; }
trial_job() { record "$@"; }
"""


def hostile_texts() -> list[str]:
    """The texts above, and random mixtures of them."""
    draw = random.Random(0)
    mixed = ["".join(draw.choices(HOSTILE, k=draw.randint(2, 4))) for _ in range(25)]
    return [*HOSTILE, *mixed]


@pytest.mark.parametrize("kind", ["train", "evaluate", "sweep"])
def test_no_value_is_executed(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of all kinds reach the functions of job.sh as they are."""
    template = render.source
    recorders = {"env.sh": "", "job.sh": RECORDER}
    monkeypatch.setattr(render, "source", lambda name: recorders.get(name) or template(name))
    scripts, expected = [], []
    for number, text in enumerate(hostile_texts()):
        run = Path("/") / text.replace("/", "-")
        places = Places(run, run / "slurm" / "001", run / "code", Path("/work") / text)
        container = Container(kind="pyxis", image=text, options=("--container-workdir=/", text))
        profile = Profile(python=text, container=container, environment={"TEXT": text})
        options = {"train": {}, "evaluate": {"evaluate": "after"}, "sweep": {"sweep": Path("s")}}
        jobs = plan.jobs_of(Request(CONFIG, **options[kind]), profile, run, num_trials=2)
        script = tmp_path / f"{number}.sbatch"
        script.write_text(jobs[-1].rendered(places, profile, ["7"]))
        scripts.append(script)
        argument = str(places.config() if kind == "train" else run)
        values = [str(run), text, text, str(places.launch_file()), str(places.code), text]
        expected.append([argument, *values, "--container-workdir=/", text])
    (tmp_path / "cwd").mkdir()
    loop = 'for script; do RECORD=$script.record bash "$script" || exit 1; done'
    environment = {"PATH": os.environ["PATH"], "BIGAN_TRAINING_JOB": "of the shell"}
    done = subprocess.run(
        ["bash", "-c", loop, "bash", *scripts],
        cwd=tmp_path / "cwd",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for script, values in zip(scripts, expected, strict=True):
        record = Path(f"{script}.record").read_bytes().decode().split("\0")[:-1]
        assert record == values
    assert not list((tmp_path / "cwd").iterdir())


def test_variables_of_the_submitting_shell_do_not_reach_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = render.source
    recorders = {"env.sh": "", "job.sh": 'train_job() { echo "${!BIGAN_@}"; }'}
    monkeypatch.setattr(render, "source", lambda name: recorders.get(name) or template(name))
    profile = Profile(environment={"BIGAN_POLL_SECONDS": 3})
    job = plan.jobs_of(Request(CONFIG), profile, RUN)[0]
    script = tmp_path / "a.sbatch"
    script.write_text(job.rendered(PLACES, profile, []))
    environment = {"PATH": os.environ["PATH"], "BIGAN_CHAIN": "1", "BIGAN_TRAINING_JOB": "3"}
    output = subprocess.run(["bash", script], env=environment, capture_output=True, check=True)
    names = set(output.stdout.decode().split())
    assert {"BIGAN_POLL_SECONDS", "BIGAN_RUN_DIR", "BIGAN_PROCESSES"} <= names
    assert not names & {"BIGAN_CHAIN", "BIGAN_TRAINING_JOB"}


def test_setup_is_executed_in_the_batch_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = render.source
    recorders = {"env.sh": "", "job.sh": 'train_job() { echo "$FROM_SETUP"; }'}
    monkeypatch.setattr(render, "source", lambda name: recorders.get(name) or template(name))
    setup = 'greet() { echo "hello $1 $WHO"; }\nexport FROM_SETUP=$(greet "a  b")\n'
    profile = Profile(setup=setup, environment={"WHO": "x y"})
    job = plan.jobs_of(Request(CONFIG), profile, RUN)[0]
    (tmp_path / "a.sbatch").write_text(job.rendered(PLACES, profile, []))
    output = subprocess.run(["bash", tmp_path / "a.sbatch"], capture_output=True, check=True)
    assert output.stdout.decode() == "hello a  b x y\n"
