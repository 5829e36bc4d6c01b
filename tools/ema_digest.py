"""Digest of the final EMA generator of short runs: equal before and after an exact refactor.

    python tools/ema_digest.py OUT.json            (in the checkout of each of the two commits)
    python tools/ema_digest.py OUT.json --compare BEFORE.json

Each config of `RUNS` is trained in a process of its own by the `bigan` of the current folder. The
digest of a run is the sha256 over the sorted sha256 sums of its tensors (dtype, shape and bytes):
the multiset of tensors, whatever their names. Digests agree only on one machine, with one number
of threads and one version of torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open

NUM_IMAGES = 4000
RUNS: dict[str, list[str]] = {
    "digits": [],
    "progan-digits": ["growth.stable_images=1200", "growth.fade_images=1200"],
    "stylegan2-digits": [],
    "r3gan-digits": ["anneal_images=3000"],
}
DATA = {"digits": ["digits"], "digits-pyramid": ["digits", "--resolution", "32", "--pyramid"]}


def bigan(*arguments: str) -> None:
    """Run a `bigan` command of the current folder; raises CalledProcessError."""
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bigan", *arguments]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def digest(weights: Path) -> str:
    """sha256 of the multiset of tensors in a safetensors file."""
    sums = []
    with safe_open(weights, framework="np") as file:
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            tensor = file.get_tensor(name)
            head = f"{tensor.dtype.str}{list(tensor.shape)}".encode()
            sums.append(hashlib.sha256(head + tensor.tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(sums)).encode()).hexdigest()


def measure(name: str, work: Path) -> str:
    """Train `configs/<name>.yaml` for `NUM_IMAGES` images; returns its digest."""
    run = work / "runs" / name
    data = work / ("digits-pyramid" if "progan" in name else "digits")
    overrides = [
        f"run_dir={run}",
        f"data.path={data}",
        f"train.total_images={NUM_IMAGES}",
        f"train.snapshot_images={NUM_IMAGES}",
        f"train.checkpoint_images={NUM_IMAGES}",
        "tracking.mlflow=false",
    ]
    bigan("train", f"configs/{name}.yaml", *overrides, *RUNS[name])
    snapshots = sorted((run / "snapshots").iterdir(), key=lambda path: int(path.name))
    (weights,) = snapshots[-1].glob("*.safetensors")
    return digest(weights)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="JSON file to write: {config: digest}")
    parser.add_argument(
        "--compare", type=Path, help="a file of another commit; exit 1 if they differ"
    )
    parser.add_argument("--only", nargs="*", default=list(RUNS), help="configs (default: all)")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for name, options in DATA.items():
            bigan("pack", options[0], f"{work}/{name}", *options[1:])
        for name in arguments.only:
            found[name] = measure(name, Path(work))
            sys.stdout.write(f"{name} {found[name]}\n")
            sys.stdout.flush()
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    if arguments.compare:
        before = json.loads(arguments.compare.read_text())
        differing = [name for name in found if found[name] != before[name]]
        if differing:
            sys.stderr.write(f"different tensors: {', '.join(differing)}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
