"""Types of command-line arguments: parsed, or refused in one line by argparse."""

from __future__ import annotations

import argparse
import re

from bigan.image_size import ImageSize, image_size

CONFIG_HELP = "a YAML config, for example configs/digits.yaml"
OVERRIDE_HELP = "settings to change, for example train.seed=1 (bigan describe CONFIG lists all)"


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def size(text: str) -> ImageSize:
    """64, or 320x192 (width x height)."""
    match = re.fullmatch(r"([1-9]\d{0,8})(?:x([1-9]\d{0,8}))?", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size like 64 or 320x192 (width x height)"
        )
    return image_size(int(match[2] or match[1]), int(match[1]))


def counts(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 0 <= int(match[1]) <= int(match[2]) or match[2] == "0":
        raise argparse.ArgumentTypeError(f"{text!r} is not a part like 3/8")
    return int(match[1]), int(match[2])


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction from 0 to below 1")
    return value
