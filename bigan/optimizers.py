"""The `optimizer` section: one optimizer per phase, its learning-rate schedule and clipping.

    optimizer:
      generator: {lr: 2.0e-4, beta1: 0.0}                         Adam is the default
      discriminator:
        {name: rmsprop, lr: 5.0e-5, schedule: {name: linear, end: 0.0, images: 1000000}}

Lengths are in images (`images_seen`), so they do not depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor

from bigan.config import Frozen, NonNegative, Positive, PositiveFloat
from bigan.schedules import annealed, warmup

Beta = Annotated[float, Field(ge=0, lt=1)]
Parameters = Iterable[Tensor]


class Constant(Frozen):
    """A constant learning rate."""

    name: Literal["constant"] = "constant"

    def at(self, lr: float, images_seen: int, anneal_images: int | None) -> float:
        return lr

    def scaled(self, factor: float) -> Constant:
        return self


class _Annealed(Frozen):
    """From the optimizer's `lr` to `end` over `images`, then constant."""

    end: NonNegative
    images: Positive | None = None  # None: `anneal_images` of the config

    def scaled(self, factor: float) -> Self:
        return self.model_copy(update={"end": self.end * factor})


class Linear(_Annealed):
    """From `lr` to `end` along a line."""

    name: Literal["linear"]

    def at(self, lr: float, images_seen: int, anneal_images: int | None) -> float:
        length = self.images or anneal_images
        return lr + (self.end - lr) * min(1.0, images_seen / length) if length else lr


class Cosine(_Annealed):
    """From `lr` to `end` along half a cosine (Loshchilov & Hutter 2017, eq. 5)."""

    name: Literal["cosine"]

    def at(self, lr: float, images_seen: int, anneal_images: int | None) -> float:
        return annealed(images_seen, lr, self.end, self.images or anneal_images)


class StepDecay(Frozen):
    """`lr` times `factor` after every `every_images` images."""

    name: Literal["step"]
    every_images: Positive
    factor: PositiveFloat

    def at(self, lr: float, images_seen: int, anneal_images: int | None) -> float:
        return lr * self.factor ** (images_seen // self.every_images)

    def scaled(self, factor: float) -> StepDecay:
        return self


Schedule = Annotated[Constant | Linear | Cosine | StepDecay, Field(discriminator="name")]


class _Optimizer(Frozen):
    """Settings of all optimizers."""

    lr: PositiveFloat
    schedule: Schedule = Constant()
    warmup_images: Annotated[int, Field(ge=0)] = 0  # linear, from 0 to the schedule's value
    # Gradients of the phase are scaled down to this global L2 norm; None: no clipping.
    clip_grad_norm: PositiveFloat | None = None

    def lr_at(
        self, images_seen: int, step_images: int, anneal_images: int | None, factor: float = 1.0
    ) -> float:
        """Learning rate, times `factor`, of the step of `step_images` images at `images_seen`."""
        share = warmup(images_seen, step_images, self.warmup_images) * factor
        return share * self.schedule.at(self.lr, images_seen, anneal_images)

    def group_at(self, images_seen: int, anneal_images: int | None) -> dict[str, Any]:
        """Hyperparameters, besides the learning rate, that change during the run."""
        return {}

    @property
    def needs_anneal_images(self) -> list[str]:
        """Keys of this section whose annealing is over `anneal_images` of the config."""
        unset = isinstance(self.schedule, _Annealed) and self.schedule.images is None
        return ["schedule.images"] if unset else []

    @property
    def has_state(self) -> bool:
        """Whether it keeps state between steps."""
        return True

    def corrected(self, every: int | None) -> Self:
        """The settings where a separate regularization step follows every `every`-th step.

        So that `every` + 1 steps have the effect of `every` steps on the weights and on the moving
        averages: c = every / (every + 1), lr * c and beta ** c (Karras et al. 2020,
        arXiv:1912.04958, appendix B). None: unchanged.
        """
        if every is None:
            return self
        c = every / (every + 1)
        return self.model_copy(
            update={"lr": self.lr * c, "schedule": self.schedule.scaled(c), **self._betas(c)}
        )

    def _betas(self, c: float) -> dict[str, float | None]:
        return {}


class _Moments(_Optimizer):
    """Settings of Adam and AdamW: running averages of the gradient and of its square."""

    beta1: Beta = 0.0
    beta2: Beta = 0.999
    beta2_end: Beta | None = None  # reached along half a cosine over `anneal_images`
    eps: PositiveFloat = 1e-8

    def group_at(self, images_seen: int, anneal_images: int | None) -> dict[str, Any]:
        if self.beta2_end is None:
            return {}
        beta2 = annealed(images_seen, self.beta2, self.beta2_end, anneal_images)
        return {"betas": (self.beta1, beta2)}

    @property
    def needs_anneal_images(self) -> list[str]:
        return super().needs_anneal_images + (["beta2_end"] if self.beta2_end is not None else [])

    def _betas(self, c: float) -> dict[str, float | None]:
        end = None if self.beta2_end is None else self.beta2_end**c
        return {"beta1": self.beta1**c, "beta2": self.beta2**c, "beta2_end": end}


class Adam(_Moments):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980), fused."""

    name: Literal["adam"] = "adam"

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        betas = (self.beta1, self.beta2)
        return torch.optim.Adam(parameters, lr=self.lr, betas=betas, eps=self.eps, fused=True)


class AdamW(_Moments):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101), fused."""

    name: Literal["adamw"]
    weight_decay: NonNegative = 0.01

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )


class SGD(_Optimizer):
    """Stochastic gradient descent with momentum, fused."""

    name: Literal["sgd"]
    momentum: Beta = 0.0
    nesterov: bool = False
    weight_decay: NonNegative = 0.0

    @model_validator(mode="after")
    def _nesterov(self) -> SGD:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: needs a momentum above 0")
        return self

    @property
    def has_state(self) -> bool:
        return self.momentum > 0

    def _betas(self, c: float) -> dict[str, float | None]:
        return {"momentum": self.momentum**c}

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            fused=True,
        )


class RMSprop(_Optimizer):
    """RMSprop (Tieleman & Hinton 2012), the optimizer of WGAN (Arjovsky et al. 2017)."""

    name: Literal["rmsprop"]
    alpha: Beta = 0.99
    momentum: Beta = 0.0
    eps: PositiveFloat = 1e-8

    def _betas(self, c: float) -> dict[str, float | None]:
        return {"alpha": self.alpha**c, "momentum": self.momentum**c}

    def build(self, parameters: Parameters) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(
            parameters, lr=self.lr, alpha=self.alpha, momentum=self.momentum, eps=self.eps
        )


def _name(entry: Any) -> str:
    """The tag of an entry; `name` may be left out: adam."""
    if isinstance(entry, dict):
        return str(entry.get("name", "adam"))
    return str(getattr(entry, "name", "adam"))  # a number or text: refused as an Adam section


OptimizerConfig = Annotated[
    Annotated[Adam, Tag("adam")]
    | Annotated[AdamW, Tag("adamw")]
    | Annotated[SGD, Tag("sgd")]
    | Annotated[RMSprop, Tag("rmsprop")],
    Discriminator(_name),
]
