"""Where sums over tokens are taken: in float64, on their own device where it has that type, else on the CPU."""

import functools

import torch

from ..memory import out_of_memory


@functools.cache
def place(device: torch.device) -> torch.device:
    """The device on which sums of what lies on `device` are taken. Metal and Intel's Arc cards have no float64."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).square_().sum().item()
    except (TypeError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        return torch.device("cpu")
    return device


def double(t: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, where its sums are taken."""
    return t.to(place(t.device)).double()
