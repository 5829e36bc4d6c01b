"""Data sets on disk.

manifest.py     manifest.json and the index columns of a data folder, or of each level of a pyramid
data_set.py     writing index and manifest
tar.py          writing tar shards, and reading them strictly
compression.py  kinds of compressed tars
codec.py        one encoded image to pixels and back: npy, png, jpg, webp
convert.py      any image file to a uint8 array of one size
"""
