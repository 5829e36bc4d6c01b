"""One variant of `bigan bench step` in its own process: a config on stdin, results on stdout."""

from __future__ import annotations

import json
import sys

from bigan.bench.step import measure_step
from bigan.errors import RunError, UserError

if __name__ == "__main__":
    try:
        result = measure_step(sys.stdin.read(), int(sys.argv[1]))
    except (UserError, RunError) as error:
        result = {"error": str(error), "user": isinstance(error, UserError)}
    sys.stdout.write(json.dumps(result))
