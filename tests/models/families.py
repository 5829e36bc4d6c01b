"""The families that the contract suite tests: a new family needs one entry here."""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass, field

from bigan import config as configs
from bigan import models
from bigan.image_size import ImageSize, halved
from bigan.models import AnyModel

Values = dict[str, object]


@dataclass(frozen=True)
class Family:
    """Configs of one family; all entries but `small` and `full` are changes to `small`."""

    small: Values  # few parameters, all optional parts enabled
    full: Callable[[int], Values]  # nominal resolution -> a config of published widths
    variants: dict[str, Values] = field(default_factory=dict)  # further configs under test
    shallow: Values = field(default_factory=dict)  # fewer layers, where time depends on them
    narrowest: tuple[Values, ...] = ()  # configs at the limit of what is accepted
    counts: dict[str, tuple[Values, tuple[int, ...]]] = field(default_factory=dict)
    errors: tuple[tuple[Values, str], ...] = ()  # changes -> pattern in the one-line message


FAMILIES = {
    "biggan": Family(
        small={
            "resolution": 16, "num_classes": 5, "z_dim": 12, "channels": 4, "image_channels": 1,
            "shared_dim": 6, "attention_resolutions": [8],
        },
        full=lambda resolution: {
            "num_classes": 1000,
            "z_dim": 20 * {16: 3, 32: 4, 64: 5, 128: 6, 256: 7, 512: 8}[resolution],
        },
        variants={
            "flat": {"hierarchical": False, "z_dim": 13, "image_channels": 3},
            "upright": {"resolution": [24, 16], "image_channels": 4},
        },
        counts={
            "imagenet-128": (
                {"resolution": 128, "z_dim": 120, "num_classes": 1000}, (70433988, 87982370),
            ),
            "imagenet-64": (
                {"resolution": 64, "z_dim": 100, "num_classes": 1000}, (70083972, 45500449),
            ),
            "cifar": (
                {
                    "resolution": 32, "z_dim": 80, "num_classes": 10, "attention_resolutions": [16],
                    "discriminator_channels": 48,
                },
                (9416196, 2415170),
            ),
        },
        errors=(
            ({"z_dim": 13}, "use z_dim=12, or hierarchical=false"),
            ({"z_dim": 1}, "use z_dim=3"),
            ({"attention_resolutions": [48]}, r"attention_resolutions.*48 px.*use 32"),
            ({"channels": 3}, "attention_resolutions: 8 has 12 channels"),
            ({"sn_eps": 0.0}, "sn_eps = 0.0"),
        ),
    ),
    "biggan_deep": Family(
        small={
            "resolution": 16, "num_classes": 5, "z_dim": 7, "channels": 4, "image_channels": 1,
            "shared_dim": 6, "attention_resolutions": [8],
        },
        full=lambda resolution: {"num_classes": 1000},
        variants={"wide": {"resolution": [16, 24], "image_channels": 4}},
        narrowest=tuple(
            {"resolution": resolution, "channels": channels, "attention_resolutions": []}
            for resolution, channels in (
                (16, 2), (32, 1), (64, 1), (128, 2), (256, 6), (512, 4),
            )
        ),
        counts={"imagenet-128": ({"resolution": 128, "num_classes": 1000}, (50244484, 34590210))},
        errors=(
            ({"resolution": 128, "channels": 7}, "14 channels at 128 px.*; use channels=8"),
            ({"resolution": 512, "channels": 1}, "1 channels at 512 px.*; use channels=4"),
            ({"channels": 3}, "attention_resolutions: 8 has 12 channels"),
            (
                {"resolution": 64, "channels": 2, "attention_resolutions": [64]},
                "attention_resolutions: 64 has 4 channels",
            ),
            ({"attention_resolutions": [48]}, r"attention_resolutions.*48 px.*use 32"),
            ({"hierarchical": True}, "hierarchical = True: unknown key"),
        ),
    ),
    "progan": Family(
        small={  # maps of 6 channels at 4 px and 4 at 8 px
            "resolution": 8, "num_classes": 5, "conditional": True, "fading": True, "z_dim": 7,
            "image_channels": 1, "base_channels": 16, "max_channels": 6,
        },
        full=lambda resolution: {"num_classes": 10, "conditional": True, "fading": resolution > 4},
        variants={
            "upright": {"resolution": [12, 8], "image_channels": 4},
            "stable": {
                "fading": False, "conditional": False, "image_channels": 3, "fused_scale": True,
            },
        },
        narrowest=({"resolution": 64, "base_channels": 32},),
        counts={
            # Table 2 of the paper gives 23.1M for both. The authors' code counts 23,079,115 and
            # 23,087,249: it has image layers at all resolutions, a stage of ours at one.
            "celeba-hq-1024": ({"resolution": 1024, "num_classes": 1}, (23071507, 23077137)),
        },
        errors=(
            ({"resolution": 4}, "fading: .*use fading=false"),
            ({"num_classes": 1}, "conditional: .*num_classes = 1; use conditional=false"),
            ({"resolution": 64}, "no channel at 64 px; use base_channels=32 or more"),
            ({"minibatch_group": 1}, "minibatch_group = 1"),
            ({"max_channels": 0}, "max_channels = 0"),
        ),
    ),
    "stylegan2": Family(
        small={
            "resolution": 16, "num_classes": 5, "conditional": True, "z_dim": 6, "w_dim": 7,
            "image_channels": 1, "channel_base": 64, "max_channels": 6, "mapping_layers": 2,
        },
        full=lambda resolution: {"num_classes": 10, "conditional": True},
        variants={
            "unconditional": {"conditional": False, "image_channels": 3},
            "wide": {"resolution": [8, 12], "image_channels": 4},
        },
        shallow={"resolution": 8, "mapping_layers": 1},
        narrowest=({"channel_base": 16},),
        counts={
            "ffhq-1024": ({"resolution": 1024, "num_classes": 1}, (30370060, 29012513)),
            "ffhq-256": (
                {"resolution": 256, "channel_base": 16384, "num_classes": 1}, (24767458, 24001089),
            ),
            # The authors' default configuration with --cond=1: two mapping layers in G, eight in D.
            "auto-256-conditional": (
                {
                    "resolution": 256, "channel_base": 16384, "num_classes": 10,
                    "conditional": True, "mapping_layers": 2, "discriminator_mapping_layers": 8,
                },
                (23459298, 26370112),
            ),
        },
        errors=(
            ({"num_classes": 1}, "conditional: .*num_classes = 1; use conditional=false"),
            ({"channel_base": 8}, "channel_base = 8 .* at 16 px; use channel_base=16"),
            ({"style_mixing": 1.5}, "style_mixing = 1.5"),
            ({"mapping_layers": 0}, "mapping_layers = 0"),
            ({"discriminator_mapping_layers": 0}, "discriminator_mapping_layers = 0"),
            (
                {"conditional": False, "discriminator_mapping_layers": 2},
                "discriminator_mapping_layers: .*conditional=true",
            ),
            ({"activation_clamp": 0.0}, "activation_clamp = 0.0"),
        ),
    ),
    "r3gan": Family(
        small={
            "resolution": 16, "num_classes": 5, "z_dim": 6, "image_channels": 1,
            "widths": [16, 16, 8], "group_size": 4, "embedding_dim": 4, "conditional": True,
        },
        full=lambda resolution: {"num_classes": 7, "conditional": True},
        variants={
            "unconditional": {"conditional": False, "image_channels": 3},
            "upright": {"resolution": [12, 8], "widths": [16, 8], "image_channels": 4},
        },
        shallow={"resolution": 8, "widths": [16, 8], "blocks_per_stage": 1},
        narrowest=({"widths": [2, 2, 2]},),
        counts={
            "cifar-10": ({"resolution": 32, "num_classes": 10}, (20732160, 20683776)),
            "cifar-10-conditional": (
                {"resolution": 32, "num_classes": 10, "conditional": True}, (20781952, 21280512),
            ),
            "ffhq-64": ({"resolution": 64, "num_classes": 1}, (22429824, 22381440)),
            "ffhq-256": ({"resolution": 256, "num_classes": 1}, (23057952, 23009568)),
            "imagenet-32": (
                {
                    "resolution": 32, "num_classes": 1000, "conditional": True, "group_size": 32,
                    "widths": [1536] * 4,
                },
                (82914304, 86548992),
            ),
            "imagenet-64": (
                {
                    "resolution": 64, "num_classes": 1000, "conditional": True, "group_size": 32,
                    "widths": [1536] * 5,
                },
                (103570432, 107205120),
            ),
        },
        errors=(
            ({"widths": [16, 16]}, "widths has 2 entries, .* a 16 px network has 3 stages"),
            ({"widths": []}, r"for example widths=\[768, 768, 768\]"),
            ({"widths": [16, 17, 8]}, "use 16 for 17"),
            ({"widths": [16, 16, 1]}, "use 2 for 1"),
            ({"group_size": 48}, "2 x 16 hidden channels.*group_size = 48"),
            ({"widths": [16, 0, 8]}, "widths.1 = 0"),
            ({"num_classes": 1}, "conditional: .*num_classes = 1; use conditional=false"),
            ({"blocks_per_stage": 0}, "blocks_per_stage = 0"),
        ),
    ),
    "autoencoder": Family(
        small={
            "resolution": 16, "num_classes": 5, "z_dim": 6, "image_channels": 1, "channels": 3,
            "conditional": True,
        },
        full=lambda resolution: {"num_classes": 10, "conditional": True},
        variants={
            "unconditional": {"conditional": False, "image_channels": 3},
            "wide": {"resolution": [8, 12], "image_channels": 2},
        },
        shallow={"resolution": 8},
        narrowest=({"channels": 1},),
        errors=(
            ({"num_classes": 1}, "conditional: .*num_classes = 1; use conditional=false"),
            ({"channels": 0}, "channels = 0"),
            ({"resolution": 4}, "resolution = 4.*8"),
        ),
    ),
}  # fmt: skip


def members() -> dict[str, type[AnyModel]]:
    """The `Config` of every family in the union, by name."""
    union, _ = typing.get_args(models.AnyModel)
    classes = typing.get_args(union)
    return {typing.get_args(c.model_fields["name"].annotation)[0]: c for c in classes}


def resolutions(name: str) -> tuple[int, ...]:
    """Every resolution that the family has published networks, or ours of their kind, for."""
    least, most = members()[name].doublings
    return tuple(4 * 2**num for num in range(least, most + 1))


OTHER_SIZES: tuple[ImageSize, ...] = (
    24, 28, 96, 192, 224, (24, 16), (32, 48), (192, 320), (384, 512), (480, 640),
)  # fmt: skip


def sizes(name: str) -> list[tuple[ImageSize, int]]:
    """(size, nominal resolution) of `resolutions`, and of other sizes."""
    others = [(size, 4 * 2 ** halved(size)[1]) for size in OTHER_SIZES]
    return [(r, r) for r in resolutions(name)] + others


def make(name: str, values: Values) -> AnyModel:
    """A config of the family; ConfigError where `values` are not valid."""
    return configs.validate(members()[name], {"name": name, **values}, "test")


def small(name: str, **changes: object) -> AnyModel:
    """The family's small config with some changes."""
    return make(name, FAMILIES[name].small | changes)
