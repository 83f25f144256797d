"""Two encoders' conditioning side by side, token by token: how far a pruned one has moved, and what that means."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..encoder.trace import Reading
from ..errors import SkrrError
from .discrepancy import Discrepancy, Projection, counts, features, squared_errors, token_norm

NULL_GROWTH = 2.0
"""From this on a verdict warns of the null embedding. A rule of thumb; the paper's example of broken pictures (blocks 3
and 5 of T5-XXL removed) has its norm grow from 0.03 to 3.34."""

CLOSE, FAR = 0.95, 0.7
"""Mean cosines between which a verdict asks to look at pictures. Rules of thumb, too: a cosine alone proves nothing."""


class CompareError(SkrrError):
    """Two encoders that can't be compared; one line that says why and what to do."""


@dataclass(frozen=True)
class PromptDifference:
    """One prompt. cosine, error: `[tokens]`, of each token that the denoiser reads, the cosine between the dense and
    the pruned embedding, and the length of their difference relative to the dense one's."""

    prompt: str
    cosine: torch.Tensor
    error: torch.Tensor


@dataclass(frozen=True)
class Comparison:
    """prompts: one by one; discrepancy: D_cond, D_null and the pruned null norm (see Discrepancy); dense_null_norm:
    likewise of the dense encoder; projected: whether through a denoiser's text projection."""

    prompts: tuple[PromptDifference, ...]
    discrepancy: Discrepancy
    dense_null_norm: float
    projected: bool

    @property
    def growth(self) -> float:
        """How many times as long the null embedding has become."""
        return self.discrepancy.null_norm / max(self.dense_null_norm, 1e-12)

    @property
    def cosine(self) -> float:
        """Mean over all tokens of all prompts."""
        return float(torch.cat([p.cosine for p in self.prompts]).mean())


def compare(
    prompts: Sequence[str],
    dense: Sequence[Reading],
    pruned: Sequence[Reading],
    projection: Projection | None = None,
) -> Comparison:
    """prompts: texts; dense, pruned: what each encoder gives for them, one reading a prompt, and for the empty prompt
    at last. projection: the denoiser's, for D and the norms; tokens are compared bare. Raises CompareError."""
    names = [*prompts, ""]
    for text, d, p in zip(names, dense, pruned, strict=True):
        if [t.shape for t, _ in d] != [t.shape for t, _ in p]:
            shapes = " and ".join(str(list(reading[0][0].shape[1:])) for reading in (d, p))
            raise CompareError(
                f'"{text[:40]}" gives embeddings of {shapes} (tokens, width): connect two forms of one text encoder'
            )
    wholes = [(features(d, projection), features(p, projection)) for d, p in zip(dense, pruned, strict=True)]
    conditional = mean_squared_error(wholes[:-1])
    null = mean_squared_error(wholes[-1:])
    dense_null, pruned_null = wholes[-1]
    return Comparison(
        tuple(difference(*parts) for parts in zip(prompts, dense[:-1], pruned[:-1], strict=True)),
        Discrepancy(conditional, null, token_norm(pruned_null)),
        token_norm(dense_null),
        projection is not None,
    )


def mean_squared_error(pairs: Sequence[tuple[Reading, Reading]]) -> float:
    """Over all pairs of a dense and a pruned reading; of readings of several tensors the means add up."""
    errors = torch.stack([torch.stack(squared_errors(d, p)).sum(dim=1) for d, p in pairs]).sum(dim=0)
    elements = torch.stack([torch.stack(counts(d)).sum(dim=1) for d, _ in pairs]).sum(dim=0)
    return float((errors / elements).sum())


def difference(prompt: str, dense: Reading, pruned: Reading) -> PromptDifference:
    """Of a prompt's tokens."""
    (d, mask), (p, _) = dense[0], pruned[0]
    d, p = d.cpu().double().flatten(0, 1), p.cpu().double().flatten(0, 1)
    if mask is not None:
        read = mask.flatten().bool().cpu()
        d, p = d[read], p[read]
    error = (p - d).norm(dim=-1) / d.norm(dim=-1).clamp(min=1e-12)
    return PromptDifference(prompt, torch.cosine_similarity(d, p, dim=-1), error)


def verdict(c: Comparison) -> str:
    """What to expect of pictures, in a line. It comes from rules of thumb; only pictures prove anything."""
    if not all(map(math.isfinite, (c.growth, c.cosine, c.discrepancy.total))):
        return (
            "the pruned encoder overflows in this precision: choose a lower level, or load the encoder in bfloat16 or"
            " float32"
        )
    if c.growth >= NULL_GROWTH:
        return (
            f"null embedding grew {c.growth:.3g} x: expect burnt pictures with CFG > 1; choose a lower level"
            " (a model that runs at CFG 1 does not use it)"
        )
    if c.growth <= 1 / NULL_GROWTH:
        return f"null embedding shrank to {c.growth:.2g} x: expect another look with CFG > 1; choose a lower level"
    if c.cosine < FAR:
        return f"tokens point elsewhere (mean cosine {c.cosine:.2f}): expect other pictures; choose a lower level"
    if c.cosine < CLOSE:
        return f"tokens have moved (mean cosine {c.cosine:.2f}): look at colours and places in a few pictures"
    return f"close to the dense encoder (mean cosine {c.cosine:.3f}): a few pictures should confirm it"
