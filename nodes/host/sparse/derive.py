"""A MODEL or a CLIP with the smallest of its weights gone, and the others packed."""

import dataclasses
import uuid
from collections.abc import Callable, Sequence

import comfy.model_management
import comfy.utils
from torch import nn

from ....skrr_engine.encoder.standin import StandInModule
from ....skrr_engine.errors import SkrrError
from ....skrr_engine.weights.prune import prunable, sparsify
from ....skrr_engine.weights.statistics import Pair, Statistics
from ....skrr_engine.weights.tensor import packed_weights, smaller
from ...drawing.report import human
from ...drawing.report import share as share_of
from ..clip.cut import requantising
from ..clip.guard import guard
from ..clip.views import ATTACHMENT, Pruned, View, pruning, seen, size
from ..files.save import named_as_in_files, source_of
from .calibrate import encoding, looking, sampling
from .own import own_patcher, own_tree
from .save import ATTACHMENT as ATTACHED

NAMES = ("diffusion model", "text encoders")


def own_model(model):
    """A MODEL of our own, dense as yet; `model` stays as it is."""
    return own_patcher(model, own_tree(model, model.model))


def own_clip(clip):
    """A CLIP of our own, dense as yet, without what a plan has left out; `clip` stays as it is. No other plan can be
    put onto what a plan has left something out of."""
    found = clip.clone()
    tree = own_tree(clip.patcher, clip.cond_stage_model)
    found.patcher = own_patcher(clip.patcher, tree)
    found.cond_stage_model = tree
    known, pruned = seen(clip)[0], pruning(clip)
    record = {name: carried(clip, tree, known[name], entry) for name, entry in pruned.items() if name in known}
    found.patcher.set_attachments(ATTACHMENT, record)
    if record:
        guard(tree, known, record)
    return found


def carried(clip, tree: nn.Module, view: View, entry: Pruned) -> Pruned:
    """What is left out of an encoder, of a tree that has nothing else in it."""
    if not entry.removed:
        return dataclasses.replace(entry, shape=None, file=None)
    whole = source_of(clip, view, entry).entries
    own = tree.get_submodule(view.path).transformer.state_dict()
    own = {key: tuple(tensor.shape) for key, tensor in named_as_in_files(own).items()}
    gone = {key: dataclasses.replace(e, kept=True) for key, e in whole.items() if own.get(key) != e.shape}
    return dataclasses.replace(entry, shape=view.shape, file=None, gone=gone)


def pairs_of(tree: nn.Module, exclude: Sequence[str] = ()) -> list[Pair]:
    """The layers of a tree that may lose weights, with their names; see `prunable`. Stand-ins stay: they are small, and
    make up for what is gone already."""
    own = [name for name, module in tree.named_modules() if isinstance(module, StandInModule)]
    return prunable(tree, [*exclude, *(f"{name}.*" for name in own)])


def pack_weights(
    pairs: Sequence[Pair], sparsity: float, method: str, statistics: Statistics | None, tick: Callable[[float], None]
) -> None:
    """Prune the weights of these layers, in place, and pack those that are smaller so. tick: told the share that is
    done. Raises SkrrError; some are pruned then."""
    layers = dict(pairs)
    for done, (name, weight) in enumerate(sparsify(pairs, sparsity, method, statistics=statistics)):
        tick(done / len(layers))
        put(layers[name], weight)
    tick(1.0)


def put(layer: nn.Module, numbers) -> None:
    """Give a layer other numbers, in the form that its weight has; packed where that is smaller."""
    wrap = requantising(layer.weight) if hasattr(layer.weight, "_qdata") else None
    found = smaller(numbers, layer.weight, wrap).to(layer.weight.device)
    layer.weight = nn.Parameter(found, requires_grad=False)


def sparse(
    model, clip, methods: tuple[str, str], shares: tuple[float, float], prompts: Sequence[str], exclude: Sequence[str],
    node_id: str | None = None,
) -> tuple:  # fmt: skip
    """(MODEL, CLIP) with weights gone, and what is to be told. What is None, or has a share of 0, is given back as it
    is. methods: see prune.METHODS, and shares: of the MODEL's and of the CLIP's weights; prompts: for methods that look
    at what layers are given; exclude: patterns of layers' names that stay. Raises SkrrError."""
    found, lines = [model, clip], []
    wanted = [number for number, given in enumerate((model, clip)) if given is not None and shares[number] > 0]
    bar = comfy.utils.ProgressBar(1000, node_id=node_id)
    for done, number in enumerate(wanted):
        own = own_model(model) if number == 0 else own_clip(clip)
        patcher = own if number == 0 else own.patcher
        pairs, method = pairs_of(patcher.model, exclude), methods[number]
        if not pairs:
            raise SkrrError(f"{NAMES[number]}: there is no layer whose weights may go: exclude less")
        run = encoding(own, prompts) if number else sampling(own, clip, prompts) if clip is not None else None

        def tick(share: float, done=done) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(int(1000 * (done + share) / len(wanted)), 1000)

        loras, patcher.patches = patcher.patches, {}  # only tensors are pruned, never what is added to them
        statistics = looking(method, pairs, run)
        pack_weights(pairs, shares[number], method, statistics, tick)
        if statistics is not None:  # it ran, and ComfyUI counts it as it was before
            comfy.model_management.unload_all_models()
        patcher.patches, patcher.size, patcher.patches_uuid = loras, 0, uuid.uuid4()
        patcher.set_attachments(ATTACHED, (method, shares[number]))
        found[number] = own
        lines.append(told(NAMES[number], patcher.model, shares[number]))
    return *found, lines or ["nothing is sparsified: connect a MODEL or a CLIP, and give it a share above 0"]


def told(name: str, tree: nn.Module, share: float) -> str:
    """In a line what has become of a model."""
    weights = packed_weights(tree).values()
    saved = sum(weight.dense_nbytes - weight.nbytes for weight in weights)
    now = size(tree)
    return (
        f"{name}: {share:.1%} of the weights gone, {human(now)} of {human(now + saved)} ({share_of(now, now + saved)})"
    )
