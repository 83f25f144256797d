"""What an engineer does with an encoder in memory, in a few verbs: find a plan, measure its discrepancy, prune, write.

Encoders are transformers modules (or ComfyUI's architecture modules) of a family that Skrr knows; tokenizers are
transformers' or any function of a prompt that gives token ids. Errors are SkrrError, in one line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import nn

from .encoder import families
from .encoder.actions import Assignment
from .encoder.rewire import rewire
from .encoder.row import EncoderError, Row
from .encoder.trace import Tracer
from .files import pruned
from .files.companion import Fitted
from .files.encoder_file import Checkpoint
from .files.folder import Encoder, usual_name
from .files.layout import Layout
from .files.narrow import check
from .measure.calibration import Calibration
from .measure.discrepancy import Discrepancy, Projection
from .measure.meter import Meter
from .memory import batch_tokens
from .plan.model import EncoderPlan, Level, Plan
from .search.job import Job
from .search.settings import Settings

Tokenizer = Callable[[str], Sequence[int]]
"""Prompt -> token ids; transformers' tokenizers are taken, too."""


@torch.no_grad()
def find_plan(
    encoder: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sparsity: float = 0.42,
    *,
    projection: Projection | None = None,
    **settings,
) -> Plan:
    """Search a plan (paper, algorithms 1 and 2).

    encoder: dense, stays as it is. prompts: calibration prompts, 128 or more. sparsity: fraction of the encoder's
    parameters to remove. projection: the denoiser's, `[batch, tokens, width]` to `[batch, tokens, features]`, see
    measure.projection.from_file. settings: more of search.settings.Settings. Raises SearchError, EncoderError.
    """
    seen = _seen(encoder, tokenizer)
    wanted = Settings(sparsity, **settings)
    job = Job(seen.name, lambda texts, race: _calibration(seen, texts, race), prompts, wanted, projection)
    return job.plan(job.run().entry)


@torch.no_grad()
def discrepancy(
    encoder: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    plan: Plan,
    sparsity: float | None = None,
    *,
    projection: Projection | None = None,
    fitted: Fitted = Fitted(),  # noqa: B008 - frozen
) -> Discrepancy:
    """The discrepancy of a plan's level on prompts.

    sparsity: the strongest level at or below it; None: the strongest of all. fitted: see `prune`. Others: as for
    `find_plan`. Raises PlanError, EncoderError.
    """
    seen = _seen(encoder, tokenizer)
    removed = _removed(seen.row, plan, sparsity, fitted)
    return Meter(_calibration(seen, prompts), projection).measure([removed])[0]


def prune(
    encoder: nn.Module,
    plan: Plan,
    sparsity: float | None = None,
    fitted: Fitted = Fitted(),  # noqa: B008 - frozen
) -> nn.Module:
    """Rewire an encoder by a plan's level, in place: what is left out is freed once nobody else holds it.

    sparsity: see `discrepancy`. fitted: the level's stand-ins and units, see files.companion.read. Returns the
    encoder. Raises PlanError, EncoderError, where units are missing that the level needs, too.
    """
    row = families.find(encoder)
    rewire(encoder, row, _removed(row, plan, sparsity, fitted))
    return encoder


def write_pruned(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    plan: Plan,
    sparsity: float | None = None,
    fitted: Fitted = Fitted(),  # noqa: B008 - frozen
) -> int:
    """Copy an encoder's .safetensors without what a plan's level leaves out; returns the bytes written.

    sparsity: see `discrepancy`. fitted: see `prune`. Raises CheckpointError, PlanError, OSError, EncoderError.
    """
    file = Checkpoint(source)
    name, entry = entry_for(file.layout, plan)
    level = _level(entry, sparsity)
    _assignment(entry, level, fitted)
    return pruned.write_pruned(file, out, name, plan, level.skipped, fitted=fitted)


def entry_for(shape: Row | Layout, plan: Plan) -> tuple[str, EncoderPlan]:
    """The plan's entry for an encoder and its name: the first that is made for its family, blocks and width. shape: a
    Row, a file's Layout. Raises PlanError where there is none, or where its units are others; EncoderError."""
    own = shape.family, shape.blocks, shape.width
    fits = [name for name, entry in plan.encoders.items() if (entry.family, entry.blocks, entry.width) == own]
    name = fits[0] if fits else next(iter(plan.encoders))
    entry = plan.encoder(name)
    check(shape, entry, name)
    return name, entry


def _level(entry: EncoderPlan, sparsity: float | None) -> Level:
    return entry.levels[-1] if sparsity is None else entry.choose(sparsity)


def _removed(row: Row, plan: Plan, sparsity: float | None, fitted: Fitted) -> Assignment:
    _, entry = entry_for(row, plan)
    return _assignment(entry, _level(entry, sparsity), fitted)


def _assignment(entry: EncoderPlan, level: Level, fitted: Fitted) -> Assignment:
    found = fitted.assignment(entry, level)
    if not found:
        raise EncoderError("this level narrows sub-blocks: give its companion file's content, see files.companion.read")
    return found


def _seen(encoder: nn.Module, tokenizer: Tokenizer) -> Encoder:
    row = families.find(encoder)
    return Encoder(usual_name(row), encoder, row, _ids(tokenizer))


def _ids(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Prompt -> token ids, at least one: the empty prompt may be the BOS token (else EOS, else PAD) alone."""

    def tokenize(prompt: str) -> list[int]:
        found = tokenizer(prompt)
        ids = list(getattr(found, "input_ids", found))
        marks = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
        ids = ids or [mark for mark in marks if mark is not None][:1]
        if not ids:
            raise EncoderError("the tokenizer gives no token for the empty prompt: have it add BOS or EOS")
        return ids

    return tokenize


def _calibration(seen: Encoder, prompts: Sequence[str], race: bool = False) -> Calibration:
    device = next(seen.module.parameters()).device
    batches = seen.batches(prompts, batch_tokens(1 << 40, seen.row.width, device), race)
    return Calibration(seen.module, Tracer(seen.module, seen.row), batches, seen.batch([seen.tokenize("")]))
