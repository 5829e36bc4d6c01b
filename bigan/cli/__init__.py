"""The `bigan` command: `main.py` has the commands, `bench.py` the options of `bigan bench`."""
