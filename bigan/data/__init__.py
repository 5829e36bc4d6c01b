"""Image data sets: from originals to WebDataset shards, and from shards to uint8 batches.

format/      what is on disk: manifest and index, tar shards, encoded images, conversion
packing/     `bigan pack` and `bigan verify`: sources of images, plan, shards, checks
stores/      files at a URL: object stores, web servers, commands; outages, credentials
streaming/   sample order, fetchers, cache, batches on the device
settings.py  the `data` section of a config
permutation.py  random permutations that are equal on all platforms
places.py    the folder or URL that a data set is packed to and verified in
"""

from bigan.errors import LOST, UserError


class DataError(UserError):
    """Images, shards or a data folder that cannot be used, in one line."""


class OutageError(DataError):
    """A store that has not answered for `data.patience_seconds`."""

    kind = LOST
