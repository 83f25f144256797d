"""Out-projections of narrowed sub-blocks, fitted anew: better pictures, for a file of one's own.

What stays of an out-projection was trained beside the units that are gone. Here it is regressed (ridge, towards what it
is) onto what is missing to the dense stream, and the place's stand-in onto what is then still missing, in turn, all
from one Gram matrix of both features. Places are taken in order, as in fit.py. It is a new tensor: one companion file
can't serve several precisions with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from ..encoder import families
from ..encoder.actions import KEEP, Action, Assignment, Narrow
from ..encoder.standin import NORMS
from ..encoder.units import activations, out_weight, units_of
from ..measure.calibration import Calibration
from .fit import Fitting, Gram, Streams, factored, fit_here, solve, stand_in
from .widths import additive

ROUNDS = 2
"""How often out-projection and stand-in are fitted in turn."""


def refit(
    calibration: Calibration,
    removed: Assignment,
    fitting: Fitting,
    tick: Callable[[float], None] = lambda share: None,
) -> Assignment:
    """An assignment with the stand-ins of all its places fitted anew, and the out-projections of its narrowed ones.

    calibration: the prompts that are fitted on. removed: see fit.fit; stand-ins that it has are replaced. Places whose
    out-projection is followed by a norm keep it. tick: called before every sub-block of every batch with the share of
    the work that is done; what it raises ends the work.
    """
    row = calibration.tracer.row
    norm = families.by_name(row.family).norm
    last = max(removed, default=-1)
    streams = Streams(calibration, lambda: tick(len(streams.passed) / (last + 1)))
    found: dict[int, Action] = {}
    for place in range(last + 1):
        action = removed.get(place, KEEP)
        bare = replace(action, standin=None, out=None) if isinstance(action, Narrow) else action
        if isinstance(bare, Narrow) and additive(row.sub_blocks[place]):
            action = streams.guarded(functools.partial(refit_here, streams, norm, fitting, bare))
        elif bare.open:
            trial = streams.guarded(functools.partial(fit_here, streams, norm, fitting, bare, False))
            action = bare.repaired(trial.standin)
        else:
            streams.guarded(functools.partial(streams.pass_by, action == KEEP))
        if action != KEEP:
            found[place] = action
        streams.go_on(action)
    return found


def refit_here(streams: Streams, norm: str, fitting: Fitting, bare: Narrow) -> Action:
    """What is done at the place where the streams are, its out-projection and its stand-in fitted anew."""
    place, row = len(streams.passed), streams.row
    own, width = units_of(row, place), row.width
    columns = own.columns(bare.units)
    weight = out_weight(own.out)[:, columns.to(own.out.weight.device)].double()
    bias = getattr(own.out, "bias", None)
    gram = held = None
    null, share, prompts = None, 0.0, 0
    for number, trace, pair in streams.here():
        if gram is None:
            gram = Gram.of(width + len(columns), pair.behind.device, width)
            held = Gram.of(width + len(columns), pair.behind.device, width)
        hidden, _ = activations(row, place, pair.pruned, trace.calls[place])
        hidden = hidden.index_select(-1, columns.to(hidden.device)).float()
        missing = pair.behind.float() - pair.pruned.float() - (0 if bias is None else bias.float())
        features = torch.cat([NORMS[norm](pair.pruned.float()), hidden], dim=-1).flatten(0, 1)
        batch, weights = len(hidden), streams.weights(number, trace, pair.behind)
        if number == 0:
            null = features, missing.flatten(0, 1), weights.flatten()
            continue
        share += float(weights.sum())
        out = torch.arange(prompts, prompts + batch) % max(fitting.held_out, 1) == fitting.held_out - 1
        prompts += batch
        missing, tokens = missing.flatten(0, 1), weights.shape[1]
        for part, chosen in ((gram, ~out), (held, out)):
            mine = chosen.repeat_interleave(tokens).to(features.device)
            part.add(features[mine], missing[mine], weights.flatten()[mine])
    features, missing, weights = null
    read = float(weights.sum())
    gram.add(features, missing, weights * (fitting.null * share / read if read else 0.0))
    weight = weight.to(gram.zz.device).T  # [columns, width]
    ridge = fitting.ridges[0]
    if held.weight and len(fitting.ridges) > 1:
        errors = {r: remaining(held, width, *alternated(gram, width, weight, fitting.rank, r)) for r in fitting.ridges}
        ridge = min(errors, key=errors.get)
    gram.join(held)
    out, fitted = alternated(gram, width, weight, fitting.rank, ridge)
    device = streams.calibration.device
    standin = stand_in(fitted, norm).to(device)
    return replace(bare, standin=standin, out=out.T.float().to(device))


def alternated(gram: Gram, width: int, weight: torch.Tensor, rank: int, ridge: float):
    """The out-projection `[columns, width]` and the stand-in's fit, each fitted to what the other leaves."""
    z, a = slice(0, width), slice(width, None)
    own = Gram(gram.weight, gram.z[z], gram.r, gram.zz[z, z], gram.zr[z], gram.rr)
    factor = factored(own, ridge)
    aa = gram.zz[a, a].clone()
    aa.diagonal().add_(ridge * aa.diagonal().mean() + 1e-12)
    inner = torch.linalg.cholesky(aa)
    out = weight
    for _ in range(ROUNDS):
        fit = solve(less(own, gram, width, out), rank, ridge, factor)
        down, up, bias = fit
        left = gram.zr[a] - gram.zz[a, z] @ down @ up - torch.outer(gram.z[a], bias) - gram.zz[a, a] @ weight
        out = weight + torch.cholesky_solve(left, inner)
    return out, solve(less(own, gram, width, out), rank, ridge, factor)


def less(own: Gram, gram: Gram, width: int, out: torch.Tensor) -> Gram:
    """The stand-in's features against what an out-projection leaves."""
    a = slice(width, None)
    return Gram(
        own.weight, own.z, gram.r - gram.z[a] @ out, own.zz, own.zr - gram.zz[:width, a] @ out, own.rr
    )  # fmt: skip


def remaining(gram: Gram, width: int, out: torch.Tensor, fit) -> float:
    """Weighted sum of squared errors on these tokens, but for what does not depend on the fit."""
    down, up, bias = fit
    both = torch.cat([down @ up, out])
    linear = ((gram.zz @ both) * both).sum() + 2 * (gram.z @ both) @ bias + gram.weight * (bias @ bias)
    return float(linear - 2 * ((gram.zr * both).sum() + bias @ gram.r))
