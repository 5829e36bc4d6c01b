"""`bigan pack` and `bigan verify`.

Sources of images
    sources.py      finds the kind of a source; listing.py: what every source returns
    trees.py        the files of a folder (folders.py), zip (zips.py) or tar (tar_trees.py)
    layout.py       their classes and splits by folder; label_files.py: by labels.csv and others
    image_trees.py  both together, as a list of images
    archives.py     CIFAR and MNIST as published; digits.py: the digits of scikit-learn
    webdatasets.py  existing WebDataset shards and packed folders
    tar_samples.py  the samples of a tar; shard_labels.py: classes and splits of all shards
    shard_files.py  finding shards; split_names.py: names that declare a split
    iterables.py    Python objects

Packing
    options.py      `PackOptions`, for the command, `pack` and the plan
    pack.py         `pack`; resumable, parallel over threads and over processes
    destination.py  which pack a destination (../places.py: a folder or a store) belongs to
    pack_plan.py    which sample is written to which shard
    pack_shard.py   one shard and its record; pack_manifest.py: index and manifest
    summary.py      what was understood, as text
    index_in_place.py  index and manifest for existing shards, which stay unchanged

Verification
    verify.py       `verify`; shard_scan.py: one shard; index_check.py: index and records
    findings.py, contact_sheet.py: duplicates, class balance and images of `--deep`
"""
