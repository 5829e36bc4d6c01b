"""`bigan pack` and `bigan verify`.

Sources of images
    sources.py      finds the kind of a source; listing.py: what every source returns
    folders.py      folders and zip files of images; labels.py: labels.csv and dataset.json
    archives.py     CIFAR and MNIST as published; digits.py: the digits of scikit-learn
    webdatasets.py  existing WebDataset shards and packed folders
    tar_samples.py  the samples of a tar; shard_labels.py: classes and splits of all shards
    shard_files.py  finding shards; split_names.py: names that declare a split
    iterables.py    Python objects

Packing
    options.py      `PackOptions`, for the command, `pack` and the plan
    pack.py         `pack`; resumable, parallel over threads and over processes
    destination.py  which pack a destination belongs to
    pack_plan.py    which sample is written to which shard
    pack_shard.py   one shard and its record; pack_manifest.py: index and manifest
    index_in_place.py  index and manifest for existing shards, which stay unchanged

Verification
    verify.py       `verify`; shard_scan.py: one shard; index_check.py: index and records
    findings.py, contact_sheet.py: duplicates, class balance and images of `--deep`
"""
