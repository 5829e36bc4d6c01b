"""Images from files to uint8 batches, in one order that no number of processes changes.

From originals to shards (`bigan pack`)
    sources.py      finds out what kind of source it is; listing.py: what a source is
    trees.py        folders and zips; labels.py: labels.csv and dataset.json
    archives.py     CIFAR and MNIST as published; digits.py: the built-in digits
    foreign.py      other people's WebDatasets; iterables.py: Python objects
    convert.py      any picture -> a uint8 square
    pack.py         the work, resumable; pack_claim.py: whose folder it is; pack_plan.py: what goes
                    where; pack_shard.py: one shard; pack_manifest.py: the last step

Shards on disk
    shards.py       manifest and index; tario.py: tars, read strictly; decode.py: one member
    adopt.py        other people's tars, indexed in place
    verify.py       `bigan verify`; shard_scan.py: one shard; findings.py, contact.py: --deep

From shards to batches
    plan.py         pure: which position reads which sample, which rank reads which positions
    dataset.py      a path or URL -> a manifest; settings.py: the recipe's `data` section
    fetch.py        sample numbers -> pixels; local.py, streamed.py, cache.py, remote.py: where the
                    bytes come from
    stream.py       the endless training stream and the one-pass evaluation stream
    device.py       host buffers and copies; workers.py: decoding in processes
    resampled.py    foreign shards without a manifest, without guarantees
"""

from bigan.errors import UserError


class DataError(UserError):
    """Images, shards or a data folder that cannot be used, in one line."""
