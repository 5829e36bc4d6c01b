"""Batches from shards, in an order that does not depend on the number of processes.

order.py       pure: which position reads which sample, which rank reads which positions
dataset.py     a path or URL to its manifest
fetchers.py    sample numbers to pixels; local_shards.py, streamed_shards.py: their bytes
cache.py       chunks of remote shards on a disk of the node
node_copy.py   manifest and index of a remote data set, once per node
ranges.py      byte ranges of shards; traffic.py: how many of them the ranks of a run read
stream.py      the endless training stream and the one-pass evaluation stream
device.py      host buffers and copies to the device
resampled.py   shards without a manifest, sampled with replacement
"""
