"""Benchmarks of the training step.

step.py        `bigan bench step`: eager and compiled, without and with R1
scaling.py     `bigan bench scaling`: several processes, and what the step's time is spent on
turns.py       the processes of one measured point, which take turns with other points
rank.py        what one such process does
prediction.py  from one device to a thousand: arithmetic with stated assumptions
report.py      the human table
measuring.py   what they share
"""
