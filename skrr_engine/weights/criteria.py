"""Scores of single weights: the lowest go first.

A criterion is a callable over a name, its module and statistics of its inputs; another one is another callable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .statistics import Statistics
from .stored import stored

Criterion = Callable[[str, nn.Module, Statistics | None], torch.Tensor]
"""(name, module, statistics) -> scores >= 0, float32, of the weight's shape."""


def magnitude(name: str, module: nn.Module, statistics: Statistics | None = None) -> torch.Tensor:
    """|W|, a scale counted. No statistics are needed.

    Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626.
    """
    return stored(name, module).values().abs()


def wanda(name: str, module: nn.Module, statistics: Statistics) -> torch.Tensor:
    """|W_ij| * ||X_j||_2, X_j the j-th input feature over all tokens; here its root mean square, which ranks alike.

    Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695,
    equation 1. A convolution's input features are those of its unfolded input, [channels / groups * kernel].
    """
    weight = magnitude(name, module)
    norm = statistics.norm(name).to(weight.device)  # [groups, features]
    return (weight.reshape(len(norm), -1, norm.shape[1]) * norm.unsqueeze(1)).reshape(weight.shape)
