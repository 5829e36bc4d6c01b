"""`python -m bigan`: the command line without the installed script."""

import sys

from bigan.cli.main import main

sys.exit(main())
