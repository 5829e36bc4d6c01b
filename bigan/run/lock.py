"""One trainer at a time in a run folder: the file LOCK.

    <run_dir>/LOCK   who trains: host, pid, start of the process, job; its mtime is the heartbeat

Rank 0 of a launch holds it, from before anything else is written until the end. The file is locked
(`flock`) and touched every `BEAT_SECONDS`. A LOCK whose owner was killed does not block the next
start: on the same machine the kernel has released the lock and the process is gone. Of a process on
another machine only the heartbeat is known: its LOCK is taken over after `STALE_SECONDS` without
one, measured on the clock of the file system; and by the same attempt, which an elastic launch
starts again on other machines, after `WATCHED_BEATS` intervals without one. A later attempt of the
same SLURM job, chain of jobs or elastic launch takes a LOCK over at once: the scheduler has ended
the former attempt, or lost it and cannot end it. The owner of a LOCK that was taken over finds
another token in it and must not write any more (`RunLock.taken_by`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bigan import atomic_files
from bigan.errors import TAKEN_OVER, RunError, UserError, writing
from bigan.file_lock import try_lock
from bigan.run_folder import RunFolder

if TYPE_CHECKING:
    from bigan.distributed.world import World

BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0  # without a heartbeat, after which the process of another machine is dead
WATCHED_BEATS = 3  # of the former owner, where the same attempt of a job starts again
SETTLE_SECONDS = 0.5  # after a write without `flock`, until the last of several writers is known
LOCK_BYTES = 4096
ATTEMPTS = 10  # to open a LOCK that others delete or replace meanwhile


class LockedError(UserError):
    """The run folder is in use by another trainer."""


class TakenOverError(RunError):
    """Another trainer has taken the run over: this one must not write any more."""

    kind = TAKEN_OVER


@dataclass(frozen=True)
class Owner:
    """The process that holds a LOCK."""

    host: str
    pid: int
    scope: str  # within which `pid` is unique: host name and PID namespace
    boot: str  # id of the machine's boot, "" if unknown
    born: str  # start time of the process, in clock ticks since the boot, "" if unknown
    since: str  # local time at which it took the lock
    attempts: dict[str, int] = field(default_factory=dict)  # see `_attempts`
    token: str = ""

    @classmethod
    def this_process(cls) -> Owner:
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            scope=atomic_files.pid_scope(),
            boot=_boot_id(),
            born=_born(os.getpid()),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            attempts=_attempts(os.environ),
            token=secrets.token_hex(8),
        )

    @classmethod
    def read(cls, text: bytes) -> Owner | None:
        """The owner in the content of a LOCK; None if it is empty or not valid."""
        try:
            owner = cls(**json.loads(text))
        except (ValueError, TypeError):
            return None
        numbers = [
            owner.pid,
            *(owner.attempts.values() if type(owner.attempts) is dict else [None]),
        ]
        texts = (owner.host, owner.scope, owner.boot, owner.born, owner.since, owner.token)
        valid = all(type(n) is int for n in numbers) and all(type(t) is str for t in texts)
        return owner if valid else None

    def __str__(self) -> str:
        jobs = "".join(f", {name}" for name in self.attempts if name.startswith("SLURM job"))
        return f"host {self.host}, pid {self.pid} (since {self.since}{jobs})"

    @property
    def is_here(self) -> bool:
        """Whether it is (or was) a process of this machine since its last boot."""
        return self.boot != "" and self.boot == _boot_id()

    def lives(self, held: bool | None, silent_seconds: float) -> bool:
        """Whether it still trains. `held`: the LOCK is locked by another; None: unknown."""
        if self.is_here:
            visible = self.scope == atomic_files.pid_scope() and self.born != ""
            if visible and _born(self.pid) != self.born:
                return False  # also if a child that survived it has inherited the lock
            if held is not None:
                return held
            if visible:
                return True
        return silent_seconds < STALE_SECONDS

    def restarts(self, other: Owner) -> dict[str, int]:
        """Job or launch that both have -> restarts from this attempt to `other`."""
        common = self.attempts.keys() & other.attempts.keys()
        return {name: other.attempts[name] - self.attempts[name] for name in common}


class RunLock:
    """The LOCK of a run folder, held by this process until `release`."""

    def __init__(self, run_dir: Path) -> None:
        """Take the lock; raises `LockedError`, in one line, if another process trains there."""
        self.former: Owner | None = None  # whose lock was taken over
        self._path = RunFolder(run_dir).lock
        self._run_dir = run_dir
        self._owner = Owner.this_process()
        self._new_folders = [p for p in (run_dir, *run_dir.parents) if not p.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            self._descriptor = self._take()
        except BaseException:
            self._remove_new_folders()
            raise
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def taken_by(self) -> Owner | None:
        """The process that has taken the lock over from this one, if any; reads the file."""
        try:
            found = Owner.read(self._path.read_bytes())
        except OSError:  # deleted by a user, or a file system that does not answer
            return None
        return found if found is not None and found.token != self._owner.token else None

    def remarks(self) -> list[str]:
        """A line if the lock was taken over from another machine, or from an earlier attempt."""
        if self.former is None or (self.former.is_here and not self._follows(self.former)):
            return []
        return [f"{self._run_dir}: taken over from {self.former}, which did not release it"]

    def release(self) -> None:
        """Delete the lock, unless another process has taken it over."""
        if self._released.is_set():
            return
        self._released.set()
        with contextlib.suppress(OSError):
            if self.taken_by() is None:
                self._path.unlink()
        if threading.current_thread() is not self._thread:
            self._thread.join(1)  # it uses the descriptor
        os.close(self._descriptor)
        self._remove_new_folders()

    def _take(self) -> int:
        """The descriptor of the locked file, which names this process as the owner."""
        for _ in range(ATTEMPTS):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                locked = try_lock(descriptor)
                if not _is_at(descriptor, self._path):  # deleted or replaced meanwhile
                    continue
                self._require_free(descriptor, held=None if locked is None else not locked)
                if not _is_at(descriptor, self._path):  # that may have taken half a minute
                    continue
                if locked:
                    self._write(descriptor)
                else:
                    descriptor = self._replace(descriptor)
                # Where locks are those of one machine, several may have written.
                if not locked or (self.former and not self.former.is_here):
                    time.sleep(SETTLE_SECONDS)
                other = self.taken_by()
                if other is not None:
                    raise self._refusal(other, 0.0)
                taken, descriptor = descriptor, -1
                return taken
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
        raise LockedError(f"{self._path}: other processes start the same run; try again")

    def _write(self, descriptor: int) -> None:
        """Name the owner in the locked file; deletes it if the disk is full."""
        try:
            _write(descriptor, self._owner)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise

    def _require_free(self, descriptor: int, held: bool | None) -> None:
        """Raises `LockedError` if the owner in the file still trains."""
        found = Owner.read(os.pread(descriptor, 1 << 16, 0))
        if found is None:
            if held:
                raise LockedError(f"{self._run_dir}: another process is starting this run")
            return
        silent = 0.0  # without meaning where the kernel knows whether the owner lives
        if not found.is_here or held is None:
            silent = self._clock() - os.fstat(descriptor).st_mtime
        if not found.lives(held, silent) or self._follows(found):
            self.former = found
        else:
            raise self._refusal(found, silent)

    def _follows(self, owner: Owner) -> bool:
        """Whether this attempt continues that of `owner`, which lives or is on another machine.

        A requeued job and a later link of a chain do. An elastic launch that has lost a machine may
        start the same attempt again, and two launches may have one id: there a few heartbeats
        decide, if the owner is on another machine.
        """
        restarts = owner.restarts(self._owner)
        if not restarts or max(restarts.values()) < 0:
            return False
        if any(num > 0 for name, num in restarts.items() if name.startswith("SLURM")):
            return True
        return not owner.is_here and not self._beats()

    def _beats(self) -> bool:
        """Whether the LOCK gets a heartbeat within the next few intervals."""
        until = time.monotonic() + WATCHED_BEATS * BEAT_SECONDS
        with contextlib.suppress(FileNotFoundError):  # its owner has ended
            first = self._mtime()
            while time.monotonic() < until:
                time.sleep(BEAT_SECONDS / 10)
                if self._mtime() != first:
                    return True
        return False

    def _mtime(self) -> float:
        """The heartbeat; opening the file makes NFS read its attributes from the server."""
        with self._path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime

    def _refusal(self, owner: Owner, silent_seconds: float) -> LockedError:
        advice = f"stop it first (touch {RunFolder(self._run_dir).stop}), or use another run_dir"
        if not owner.is_here:
            left = max(1, round(STALE_SECONDS - silent_seconds))
            advice += (
                f"; if it has ended, this command starts in {left} s, {STALE_SECONDS:g} s after "
                f"its last heartbeat, or at once if you delete {self._path}"
            )
        return LockedError(f"{self._run_dir}: this run is already trained by {owner}; {advice}")

    def _clock(self) -> float:
        """The time of the file system, which may be that of a server."""
        probe = atomic_files.temporary_name(self._path)
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _replace(self, former: int) -> int:
        """Put a new file in the place of a LOCK that cannot be locked; returns its descriptor."""
        temporary = atomic_files.temporary_name(self._path)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try_lock(descriptor)
        _write(descriptor, self._owner)
        temporary.replace(self._path)
        os.close(former)
        return descriptor

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # by descriptor: also where the folder was moved
                os.utime(self._descriptor)

    def _remove_new_folders(self) -> None:
        """Delete the folders that this object made, if they are empty."""
        for folder in self._new_folders:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def exclusive(world: World, run_dir: Path) -> Iterator[RunLock | None]:
    """Hold the lock of a run folder on rank 0 (None on the others). A collective on entry.

    Raises `LockedError` on all ranks if another process trains there.
    """
    from bigan.distributed.world import on_all_ranks  # here: reading a LOCK needs no torch

    take = writing(run_dir)(RunLock)
    lock = on_all_ranks(world, lambda: take(run_dir) if world.is_rank_0 else None)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _write(descriptor: int, owner: Owner) -> None:
    """One write of a fixed size: those of two machines cannot mix."""
    text = json.dumps(asdict(owner)).encode()
    os.pwrite(descriptor, text.ljust(LOCK_BYTES - 1) + b"\n", 0)
    os.ftruncate(descriptor, LOCK_BYTES)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _attempts(environment: Mapping[str, str]) -> dict[str, int]:
    """Job, chain or elastic launch -> how often its scheduler has started it again.

    An element of a job array has a job id of its own, which it keeps when it is requeued. The links
    of a chain are jobs that start one after the other and share a token.
    """
    found = {}
    job, chain = environment.get("SLURM_JOB_ID"), environment.get("BIGAN_CHAIN")
    if job:
        found[f"SLURM job {job}"] = _count(environment, "SLURM_RESTART_COUNT")
    if chain:
        found[f"SLURM chain {chain}"] = _count(environment, "BIGAN_CHAIN_LINK")
    launch = environment.get("TORCHELASTIC_RUN_ID") or "none"
    if launch != "none":  # of static rendezvous: the same for every launch
        found[f"launch {launch}"] = _count(environment, "TORCHELASTIC_RESTART_COUNT")
    return found


def _count(environment: Mapping[str, str], name: str) -> int:
    """A number of restarts; 0 if it is not set or not a number."""
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else 0


@functools.cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return ""


def _born(pid: int) -> str:
    """Start time of a process of this PID namespace; "" if there is none (or only a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    state, born = fields[0], fields[19]
    return "" if state in "ZX" else born
