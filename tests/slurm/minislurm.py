"""A real SLURM of two nodes on this host, in a private folder; starts in about a second.

Its daemons listen on 127.0.0.1 only and are children of the test; no system service is used.
Debian and Ubuntu: apt-get install --no-install-recommends slurm-wlm
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from commands import environment, free_port

INSTALL = "apt-get install -y --no-install-recommends slurm-wlm"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo")
NODES = ("n1", "n2")
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}

# Devices that exist stand for GPUs: SLURM sets CUDA_VISIBLE_DEVICES and counts them.
GRES = "NodeName=n[1-2] Name=gpu Flags=nvidia_gpu_env File=/dev/null,/dev/zero\n"

# cred_expire: the shortest, or each requeue waits two minutes. config_overrides: more CPUs than the
# host has. MinJobAge: ended jobs stay visible to scontrol.
CONFIG = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
MinJobAge=3600
KillWait=30
SlurmdTimeout=5
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmctldTimeout=30
InactiveLimit=0
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000 Gres=gpu:2
PartitionName=debug Nodes=n[1-2] Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n[1-2] MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """The commands of a SLURM, run as a user runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {
            key: value
            for key, value in environment().items()
            if not key.startswith(("SBATCH_", "SRUN_", "PET_"))
        }
        self._environment |= {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(
        self, *command: object, timeout: float = 60, extra: Mapping[str, str] | None = None
    ) -> str:
        """stdout of a command; raises AssertionError with its stderr if it fails."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self._environment | (extra or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script: str, name: str = "job", options: tuple[str, ...] = ()) -> int:
        """Number of the job of a batch script; it writes to `output(name)`, appending."""
        path = self.folder / f"{name}.sbatch"
        path.write_text(script)
        output = f"--output={self.output(name)}"
        printed = self.run("sbatch", "--parsable", "--open-mode=append", output, *options, path)
        return int(printed.strip())

    def wait_for_restart(self, job: int | str) -> None:
        """Until the job has been requeued; SLURM notices a lost node after half a minute."""
        deadline = time.monotonic() + 180
        while self.field(job, "Restarts") == "0":
            assert time.monotonic() < deadline, f"job {job} is not requeued"
            time.sleep(0.2)

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a daemon as a child of the test."""
        with (self.folder / "log" / "daemons.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=log
            )

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        slurmd = shutil.which("slurmd", path=SBIN)
        config = self.folder / "slurm.conf"
        self.start(node, [str(slurmd), "-D", "-f", str(config), "-N", node])

    def kill_node(self, node: str) -> None:
        """Kill the slurmd of a node and all its tasks, as a power failure does."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        for pid in self._processes_of(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _processes_of(self, node: str) -> list[int]:
        """Tasks of a node, and the slurmstepd that started them."""
        wanted = {f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.folder / 'slurm.conf'}"}
        found = set()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted <= set((process / "environ").read_text(errors="replace").split("\0")):
                    found.add(int(process.name))
                    parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                    if "slurmstepd" in Path(f"/proc/{parent}/comm").read_text():
                        found.add(parent)
        return sorted(found)

    def wait_until_idle(self) -> None:
        """Until no node has a job, all respond."""
        deadline, states = time.monotonic() + 60, ""
        while states.split() != ["idle"] * len(NODES):
            log = self.folder / "log"
            assert time.monotonic() < deadline, f"the nodes are not idle but {states!r}; see {log}"
            with contextlib.suppress(AssertionError):
                states = self.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%T")
            time.sleep(0.1)

    def output(self, name: str = "job") -> Path:
        """The file of the job's output."""
        return self.folder / f"{name}.out"

    def field(self, job: int | str, name: str) -> str:
        """A field of `scontrol show job`, such as Restarts."""
        return self.run("scontrol", "show", "job", job).partition(f" {name}=")[2].split()[0]

    def state(self, job: int | str) -> str:
        """RUNNING, COMPLETED, ..."""
        printed = self.run("scontrol", "show", "job", job)
        return printed.partition("JobState=")[2].split()[0]

    def wait(self, job: int | str, timeout: float) -> str:
        """The final state of a job, which ends within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (state := self.state(job)) not in ENDED:
            assert time.monotonic() < deadline, f"job {job} is still {state}"
            time.sleep(0.2)
        return state


@contextlib.contextmanager
def minislurm(folder: Path) -> Iterator[Cluster]:
    """Start a cluster in `folder` (empty, with a short path for sockets); stop it on exit."""
    found = {name: shutil.which(name, path=SBIN) for name in NEEDED}
    missing = [name for name, path in found.items() if path is None]
    assert not missing, f"SLURM's {', '.join(missing)} not found; install it: {INSTALL}"
    host = socket.gethostname().partition(".")[0]
    for name in ("munge", "log", "ctld", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
        (folder / name).chmod(0o755)  # munged requires this
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    ports = [free_port() for _ in range(3)]
    config = CONFIG.format(folder=folder, host=host, user=getpass.getuser(), ports=ports)
    (folder / "slurm.conf").write_text(config)
    # The only value that works with cgroup v1, v2 or none mounted; it changes nothing.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "gres.conf").write_text(GRES)
    cluster = Cluster(folder)
    files = {"key": "key-file", "sock": "socket", "pid": "pid-file", "seed": "seed-file"}
    munge = [f"--{option}={folder / 'munge' / name}" for name, option in files.items()]
    munge += [f"--log-file={folder / 'log' / 'munged.log'}"]
    try:
        cluster.start("munged", [str(found["munged"]), "-F", "--force", *munge])
        _wait_for(folder / "munge" / "sock")
        controller = [str(found["slurmctld"]), "-D", "-c", "-f", str(folder / "slurm.conf")]
        cluster.start("slurmctld", controller)
        for node in NODES:
            cluster.start_node(node)
        cluster.wait_until_idle()
        yield cluster
    finally:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            cluster.run("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
            cluster.run("scancel", "--user", getpass.getuser())
        daemons = cluster.daemons.values()
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.02)
