"""SparseGPT: weights are pruned column by column, and those to the right make up for what each one's loss does.

Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774,
algorithm 1; names as there and in the authors' code.
"""

from __future__ import annotations

import torch

from ..measure.sums import double
from .choose import lowest, spread

BLOCKSIZE, PERCDAMP = 128, 0.01
"""Columns among which the weights to prune are chosen at once; damping, as a share of H's mean diagonal."""


def fasterprune(
    W: torch.Tensor, H: torch.Tensor, count: int, blocksize: int = BLOCKSIZE, percdamp: float = PERCDAMP
) -> torch.Tensor:
    """A weight with `count` of its numbers zero and the others changed, float32 [rows, columns].

    W: float32 [rows, columns]; H: mean of x xᵀ, [columns, columns]. The authors choose the same share in each block of
    columns, by one threshold; so does this, to the very number of weights.
    """
    W = W.clone()
    columns = W.shape[1]
    H = double(H).clone()
    dead = H.diagonal() == 0  # never any input: these go first
    H.diagonal()[dead] = 1
    H.diagonal().add_(percdamp * H.diagonal().mean())
    H = torch.cholesky_inverse(torch.linalg.cholesky(H))
    Hinv = torch.linalg.cholesky(H, upper=True).float().to(W.device)
    counts = spread(count, [W.shape[0] * min(blocksize, columns - i1) for i1 in range(0, columns, blocksize)])
    for i1, of_block in zip(range(0, columns, blocksize), counts, strict=True):
        i2 = min(i1 + blocksize, columns)
        W1, Hinv1 = W[:, i1:i2].clone(), Hinv[i1:i2, i1:i2]
        Err1 = torch.zeros_like(W1)
        scores = W1.square() / Hinv1.diagonal().square()
        scores[:, dead[i1:i2].to(W.device)] = 0
        (mask1,) = lowest(lambda scores=scores: [scores], of_block)
        for i in range(i2 - i1):
            w, d = W1[:, i], Hinv1[i, i]
            q = torch.where(mask1[:, i], 0, w)
            Err1[:, i] = (w - q) / d
            W1[:, i:] -= Err1[:, i : i + 1] * Hinv1[i, i:]
            W1[:, i] = q
        W[:, i1:i2] = W1
        W[:, i2:] -= Err1 @ Hinv[i1:i2, i2:]
    return W


def pruned(weight: torch.Tensor, hessian: torch.Tensor, count: int) -> torch.Tensor:
    """A module's weight, float32 of any shape, with `count` of its numbers zero.

    hessian: [groups, features, features], see Statistics.
    """
    groups = weight.reshape(len(hessian), -1, hessian.shape[-1])
    counts = spread(count, [group.numel() for group in groups])
    made = [fasterprune(W, H, n) for W, H, n in zip(groups, hessian, counts, strict=True)]
    return torch.stack(made).reshape(weight.shape)
