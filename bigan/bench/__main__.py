"""One variant of `bigan bench step` in a process of its own: a recipe in, its figures out."""

from __future__ import annotations

import json
import sys

from bigan.bench.step import measure_step

if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure_step(sys.stdin.read(), int(sys.argv[1]))))
