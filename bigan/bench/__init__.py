"""Benchmarks of the training step.

step.py        `bigan bench step`: eager and compiled, without and with R1
scaling.py     `bigan bench scaling`: several processes, and the shares of the step time
processes.py   the processes of one measured point
rank.py        one of these processes
workload.py    a config as input of the prediction
prediction.py  from one device to a thousand: arithmetic with stated assumptions
report.py      the record of `bigan bench scaling` as a table
measuring.py   prepared states, synthetic images, timing of phases
script.py      options and records of the scripts in benchmarks/
"""
