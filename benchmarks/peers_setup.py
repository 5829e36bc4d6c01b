"""What `peers_data.py` needs before it measures: the images, the environment and the server."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from input_pipeline import picture  # noqa: E402

from bigan.data.packing import sources  # noqa: E402
from bigan.data.packing.pack import pack_source  # noqa: E402

REQUIREMENTS = HERE / "peers_data_requirements.txt"
PEERS = ("mosaicml-streaming", "litdata", "webdataset")
FORMATS = {"bigan": "shards", "mosaicml-streaming": "mds", "litdata": "litdata"}


@dataclass(frozen=True)
class Images:
    """The images in the folder `root`, in all formats, and the URL of the server."""

    root: Path
    num: int
    names: tuple[str, ...]  # of the tar files
    endpoint: str
    block: int
    digests: set[str] = field(default_factory=set)

    def set_bytes(self, library: str) -> int:
        """The size of all shards in the format that `library` reads."""
        folder = self.root / "set" / FORMATS.get(library, "shards")
        files = [file for file in folder.rglob("*") if file.is_file()]
        if library.startswith("webdataset"):
            files = [file for file in files if file.suffix == ".tar"]
        return sum(file.stat().st_size for file in files)


def write_shards(folder: Path, num: int, each: int, size: int) -> None:
    """Pack `num` different JPEG images of `size` pixels, `each` per shard."""
    generator = np.random.default_rng(0)
    originals = [picture(generator, size) for _ in range(64)]

    def image(i: int) -> np.ndarray:  # no two shifts of an original are equal
        number, which = divmod(i, len(originals))
        return np.roll(originals[which], divmod(number * 37 % size**2, size), (0, 1))

    source = sources.Source(
        name="pictures", transform="none", identity="pictures", resolution=size, channels=3,
        classes=("all",), keys=tuple(f"{i:07d}" for i in range(num)), labels=(0,) * num,
        splits=("train",) * num, read=image,
    )  # fmt: skip
    pack_source(source, folder, shard_size=each, encoding="jpg", quality=80)


def environment_python(folder: Path) -> Path:
    """The Python of an environment with the other libraries, which is created if it is missing.

    Packages that it lacks (torch is large) come from the environment that runs the benchmark.
    """
    python, mark = folder / "bin" / "python", folder / "bigan-requirements.txt"
    if mark.is_file() and mark.read_bytes() == REQUIREMENTS.read_bytes():
        return python
    print(f"{folder}: installing {', '.join(PEERS)}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    (packages,) = (folder / "lib").glob("python*/site-packages")
    own = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "zz-shared.pth").write_text(own + "\n")
    install = ["-m", "pip", "install", "-qq", "--requirement", str(REQUIREMENTS)]
    subprocess.run([str(python), *install], check=True)
    shutil.copy(REQUIREMENTS, mark)
    return python


def peer_versions(python: Path) -> dict[str, str]:
    """The versions of the other libraries and of what they read with."""
    names = [*PEERS, "boto3", "obstore", "numpy", "torch", "simplejpeg"]
    code = "import json, sys; from importlib.metadata import version\n"
    code += "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    return json.loads(subprocess.check_output([str(python), "-c", code, *names]))


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """The URL of a counting server of `folder`, in a separate process."""
    command = [sys.executable, str(HERE / "counting_server.py"), str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()
            process.wait()


def take_counts(endpoint: str) -> dict[str, int]:
    """{"bytes", "requests"} that the server has answered since the last call."""
    with urllib.request.urlopen(f"{endpoint}/-/counts") as answer:
        return json.load(answer)
