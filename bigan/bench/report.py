"""The record of `bigan bench scaling` as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bigan.bench.measuring import device_name

SENSITIVITY_ROWS = 8  # the first of them are shown


def as_text(record: Mapping[str, Any]) -> str:
    """Measured points with the shares of their time, then the prediction and its assumptions."""
    return "\n".join(_lines(record))


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    device = device_name(record["environment"])
    yield f"{record['config']}, engine {record['engine']}, on {device}"
    yield from (f"note: {note}" for note in record["notes"])
    if "points" in record:
        yield from _measured(record)
    yield from _predicted(record["prediction"])


def _measured(record: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"measured, median of {record['runs']} runs (lowest to highest); shares of step time in %"
    widths = {name: max(len(name) + 2, 7) for name in record["points"][0]["shares"]}
    head = f"{'mode':<7}{'ranks':>5}{'batch':>7}{'images/s':>24}{'efficiency':>11}"
    head += "".join(f"{name:>{width}}" for name, width in widths.items())
    yield head + f"{'predicted':>11}"
    for row in record["points"]:
        rate = row["images_per_second"]
        spread = f"{rate['median']:.0f} ({rate['min']:.0f} to {rate['max']:.0f})"
        line = f"{row['mode']:<7}{row['ranks']:>5}{row['batch']:>7}{spread:>24}"
        line += f"{row['efficiency']:>11.2f}"
        line += "".join(f"{100 * row['shares'][n]:>{width}.1f}" for n, width in widths.items())
        error = row.get("prediction_error")
        yield line + ("" if error is None else f"{100 * error:>+10.0f}%")


def _predicted(prediction: Mapping[str, Any]) -> Iterator[str]:
    network, workload = prediction["network"], prediction["workload"]
    yield ""
    yield (
        f"predicted for {network['gb_per_second']:g} GB/s per device between nodes, "
        f"{network['node_gb_per_second']:g} GB/s within nodes of {network['ranks_per_node']}, "
        f"{network['latency_us']:g} us latency, overlap {workload['overlap']:g}, "
        f"spread {workload['spread']:.3g}"
    )
    yield f"{'mode':<7}{'ranks':>5}{'images/s':>12}{'efficiency':>11}{'ms per step':>13}"
    for row in prediction["points"]:
        yield (
            f"{row['mode']:<7}{row['ranks']:>5}{row['images_per_second']:>12,.0f}"
            f"{row['efficiency']:>11.2f}{1000 * row['step_seconds']:>13.1f}"
        )
    if not prediction["sensitivity"]:
        return
    yield ""
    head = f"{'efficiency if the assumption is':<36}{'mode':<7}{'ranks':>5}"
    yield head + f"{'halved':>8}{'as is':>8}{'doubled':>8}"
    for row in prediction["sensitivity"][:SENSITIVITY_ROWS]:
        yield (
            f"{row['assumption']:<36}{row['mode']:<7}{row['ranks']:>5}{row['halved']:>8.2f}"
            f"{row['efficiency']:>8.2f}{row['doubled']:>8.2f}"
        )
    yield prediction["most_sensitive"]
