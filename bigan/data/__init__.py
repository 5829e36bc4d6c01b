"""Images from shards on disk to uint8 batches, in one order that no number of processes changes.

plan.py     pure: which position reads which sample, which rank reads which positions
sources.py  where images come from before packing: built-in digits, folders of images
pack.py     source -> tar shards + index + manifest, resumable
shards.py   the packed folder: manifest, index, strict tar reading, checks
decode.py   bytes of one member <-> uint8 HWC array
stream.py   the endless training stream and the one-pass evaluation stream
"""

from bigan.errors import UserError


class DataError(UserError):
    """Images, shards or a data folder that cannot be used, in one line."""
