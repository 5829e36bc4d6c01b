"""`python -m bigan.evaluate RUN [--watch]`: what `accelerate launch -m` starts."""

import sys

from bigan.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
