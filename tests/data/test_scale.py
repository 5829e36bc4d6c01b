"""Large data sets: time and memory to open them, in chunks that are checked completely."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from large_sets import large_set
from verify_folders import reseal
from web import serving

from bigan.data import DataError
from bigan.data.format import index_files, manifest
from bigan.data.format.manifest import COLUMNS, Manifest

# Seconds and MiB (highest so far, and now) that opening a set takes in a new process.
OPEN = """
import json, sys, time
from pathlib import Path
from bigan.data.settings import Fetch
from bigan.data.streaming.dataset import open_manifest
from bigan.data.streaming.stream import ShardStream
from bigan.distributed.world import World

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

path, cache, mode = sys.argv[1:]
fetch = Fetch(mode=mode, cache=Path(cache) if cache else None)
if cache:
    open_manifest(path, fetch)  # another process has copied it to the node
import ctypes; ctypes.CDLL(None).malloc_trim(0)
before, began = memory("VmRSS"), time.perf_counter()
highest = memory("VmHWM")
manifest = open_manifest(path, fetch)
manifest.load_index("train")
stream = ShardStream(manifest, seed=0, world=World(), batch=64, fetch=fetch)
seconds = time.perf_counter() - began
high, now = memory("VmHWM"), memory("VmRSS")
print(json.dumps([seconds, max(0, high - max(before, highest)), now - before]))
stream.close()
"""
