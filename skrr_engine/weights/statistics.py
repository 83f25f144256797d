"""What modules are given while calibration inputs run: second moments of their input features.

    with gathering(pairs) as statistics:
        ...  # an encoder on prompts, a denoiser for a few sampling steps
    statistics.norm("layers.0.mlp.up_proj")

A convolution is a linear layer on its unfolded input: features [channels / groups * kernel], a token an output place.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import SkrrError, printable

Pair = tuple[str, nn.Module]
HESSIANS = 1 << 30
"""Bytes that SparseGPT's hessians may take at a time."""


class Statistics:
    """Means over all tokens that were seen, float32, by names. groups: 1 but for grouped convolutions.

    squares: of each input feature's square, [groups, features]; hessians: of x xᵀ, [groups, features, features], where
    they were asked for; tokens: how many there were.
    """

    def __init__(self):
        self.squares: dict[str, torch.Tensor] = {}
        self.hessians: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}

    def norm(self, name: str) -> torch.Tensor:
        """Root mean square of each input feature, [groups, features]. Raises SkrrError where nothing was seen."""
        if name not in self.squares:
            raise self.unseen(name)
        return self.squares[name].sqrt()

    def hessian(self, name: str) -> torch.Tensor:
        """Mean of x xᵀ, [groups, features, features]: SparseGPT's H but for its factor of 2, which changes nothing.
        Raises SkrrError where nothing was seen."""
        if name not in self.hessians:
            raise self.unseen(name)
        return self.hessians[name]

    @staticmethod
    def unseen(name: str) -> SkrrError:
        """What is said of a module without statistics."""
        return SkrrError(
            f"{printable(name)}: the calibration inputs never reached it; exclude it, or take the method magnitude"
        )

    def add(self, name: str, inputs: torch.Tensor, hessian: bool) -> None:
        """Count tokens in. inputs: [groups, tokens, features]."""
        x = inputs.float()
        before, count = self.tokens.get(name, 0), x.shape[1]
        self.tokens[name] = total = before + count
        _mean_on(self.squares, name, before, total, lambda: x.square().sum(dim=1))
        if hessian:
            _mean_on(self.hessians, name, before, total, lambda: x.transpose(1, 2) @ x)


def _mean_on(means: dict, name: str, before: int, total: int, new: Callable[[], torch.Tensor]) -> None:
    """A mean over `before` tokens becomes one over `total`; new: the sum over those between."""
    if name in means:
        means[name].mul_(before / total).add_(new(), alpha=1 / total)
    elif total > 0:
        means[name] = new() / total


@contextlib.contextmanager
def gathering(pairs: Sequence[Pair], hessian: bool = False) -> Iterator[Statistics]:
    """Statistics of all inputs that these modules are given inside the `with` block.

    hessian: for SparseGPT; takes 4 * features² bytes a module (see `Repeated`).
    """
    statistics = Statistics()

    def look(name: str, module: nn.Module, args: tuple) -> None:
        if args:
            with torch.inference_mode(False), torch.no_grad():
                statistics.add(name, features(module, args[0]), hessian)

    hooks = [module.register_forward_pre_hook(functools.partial(look, name)) for name, module in pairs]
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()


def features(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """A module's input as tokens of features, [groups, tokens, features]; a convolution's unfolded."""
    inputs = inputs.detach()
    kernel = getattr(module, "kernel_size", None)
    if kernel is None:
        return inputs.reshape(1, -1, inputs.shape[-1])
    dimensions = len(kernel)
    if inputs.ndim == dimensions + 1:
        inputs = inputs.unsqueeze(0)
    padding = module._reversed_padding_repeated_twice  # as F.pad has it; "same" and "valid" as numbers, too
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(inputs, list(padding), mode=mode) if any(padding) else inputs
    for d in range(dimensions):  # a window's places go to the end: [batch, channels, *places, *kernel]
        reach = module.dilation[d] * (kernel[d] - 1) + 1
        x = x.unfold(2 + d, reach, module.stride[d])[..., :: module.dilation[d]]
    places = x.shape[2 : 2 + dimensions]
    x = x.reshape(x.shape[0], module.groups, -1, math.prod(places), math.prod(kernel))
    return x.permute(1, 0, 3, 2, 4).reshape(module.groups, -1, x.shape[2] * x.shape[4])


class Repeated(Statistics):
    """Hessians of as many modules at a time as a memory holds: the calibration inputs run again for the next ones.

    pairs: in the order in which they will be asked for; run: runs the calibration inputs; memory: bytes that hessians
    may take (one is made, however large). Where the caller puts pruned weights to use as they come, later modules see
    what the pruned ones before them give, as in SparseGPT's paper.
    """

    def __init__(self, pairs: Sequence[Pair], run: Callable[[], object], memory: int):
        super().__init__()
        self.pairs, self.run, self.memory = list(pairs), run, memory

    def hessian(self, name: str) -> torch.Tensor:
        if name not in self.hessians:
            self.hessians = {}
            with gathering(self.group(name), hessian=True) as found:
                self.run()
            self.hessians = found.hessians
        return super().hessian(name)

    def group(self, name: str) -> list[Pair]:
        """The pairs from this one on whose hessians the memory holds."""
        start = next(i for i, (own, _) in enumerate(self.pairs) if own == name)
        sizes = itertools.accumulate(hessian_bytes(module) for _, module in self.pairs[start:])
        fits = sum(size <= self.memory for size in sizes)
        return self.pairs[start : start + max(1, fits)]


def seen(pairs: Sequence[Pair], run: Callable[[], object], hessian: bool) -> Statistics:
    """What modules are given while `run` runs the calibration inputs. hessian: for SparseGPT; then it runs when one is
    asked for, again for each part of them."""
    if hessian:
        return Repeated(pairs, run, HESSIANS)
    with gathering(pairs) as found:
        run()
    return found


def hessian_bytes(module: nn.Module) -> int:
    """Bytes of a module's hessians."""
    groups, shape = getattr(module, "groups", 1), module.weight.shape
    return 4 * groups * math.prod(shape[1:]) ** 2
