"""`python -m bigan.train CONFIG [a.b=value ...]`: what `accelerate launch -m` starts."""

import sys

from bigan.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
