"""`python -m bigan`: the command line without the installed script."""

import sys

from bigan.cli import main

sys.exit(main())
