"""A search on a CLIP: calibration in ComfyUI's own classes, a state to resume, the finished plan in the library."""

import hashlib
import json
from collections.abc import Sequence

import comfy.model_management
import torch

from ...skrr_engine import __version__
from ...skrr_engine.encoder.trace import Tracer
from ...skrr_engine.errors import SkrrError
from ...skrr_engine.files import companion as standin_file
from ...skrr_engine.measure.calibration import Calibration
from ...skrr_engine.measure.meter import Meter
from ...skrr_engine.measure.prompts import sha256 as prompts_sha256
from ...skrr_engine.memory import batch_tokens, free_memory
from ...skrr_engine.plan.model import EncoderPlan, Plan, Provenance
from ...skrr_engine.search import run as engine
from ...skrr_engine.search import with_standins as heal
from ...skrr_engine.search.resume import StateError
from ...skrr_engine.standins.fit import Fitting, halved, meter_bytes
from .clip.prompts import Conditioning
from .clip.views import TRANSFORMER, View, dense_model
from .model import from_model
from .plans import folder as library
from .talk import Reporter, say

BARE = (
    "without a denoiser's text projection: searching on the bare embeddings, quality suffers"
    " (paper: GenEval .381 instead of .442)"
)
SAMPLE = 64
"""Bytes of each tensor that its fingerprint reads."""


def find_plan(
    clip,
    model,
    view: View,
    settings: engine.Settings,
    prompts: Sequence[str],
    name: str,
    node_id: str | None,
    fitting: Fitting | None = None,
) -> Plan:
    """The plan for these inputs: the saved one where they were searched before, else a new one, saved as `name`.
    fitting: of linear stand-ins; None for the paper's plan."""
    given = prompts
    fitted_on, prompts = (None, prompts) if fitting is None else halved(prompts)
    library.file_name(name)  # refuse a bad name now rather than after the search, and a folder that can't be written
    library.folder_to_write(library.FOLDER)
    row = view.row  # refuses an encoder that was loaded pruned
    conditioning = Conditioning(clip, view)
    projection = None
    if model is not None and conditioning.hidden:  # a pooled vector alone goes through no text projection
        projection = from_model(model, view).to(clip.patcher.load_device)
    if projection is None:
        say(BARE, node_id)
    how = settings if fitting is None else (settings, fitting, prompts_sha256(fitted_on))
    key = fingerprint(clip, view, how, prompts, projection)
    known = library.searched(key)
    if known is not None:
        say(f'found the plan "{known[0]}" of an earlier search with these inputs', node_id)
        return known[1]

    conditioning.load()
    tracer = Tracer(conditioning.encoder, row, TRANSFORMER)
    device = clip.patcher.load_device
    memory = free_memory(device) if device.type == "cpu" else comfy.model_management.get_free_memory(device) * 9 // 10
    null, share = conditioning.null(), int(memory) if fitting is None else meter_bytes(int(memory), row.width)

    def calibration(texts: Sequence[str], race: bool = False) -> Calibration:
        batches = conditioning.batches(texts, batch_tokens(share, row.width, device), race)
        return Calibration(conditioning.encoder, tracer, batches, null, share)

    meter = Meter(calibration(prompts, settings.delta > 0), projection)
    state = library.state(key)
    try:
        beam = state.load(meter.readable())
    except StateError:
        beam = []  # damaged: the next step writes over it
    if beam:
        say(f"going on with an interrupted search, {len(beam[0].order)} sub-blocks skipped so far", node_id)
    provenance = Provenance(
        source="search",
        projection=projection and projection.name,
        denoiser=projection and projection.denoiser,
        prompts=len(given),
        prompts_sha256=prompts_sha256(given),
        beam=settings.beam if fitting is None else 1,
        created_with=f"skrr {__version__}",
    )

    def plan_of(entry: EncoderPlan) -> Plan:
        return Plan(encoders={view.name: entry}, provenance=provenance)

    reporter = Reporter(node_id, row, settings.sparsity)
    standins: dict = {}
    best = beam[0] if beam else None

    def save(found: Sequence[engine.Path]) -> None:
        nonlocal best
        state.save(found)
        best = found[0]

    try:
        if fitting is None:
            entry = engine.search(meter, settings, reporter, save, beam)
        else:
            healed = heal.search(calibration(fitted_on), meter, settings, fitting, reporter, save, beam)
            entry, standins = healed.plan, {view.name: healed.standins}
    except comfy.model_management.InterruptProcessingException:
        if best is not None:
            entry = engine.unfinished(row, best, settings, fitting is not None)
            try:
                saved = library.save_unfinished(plan_of(entry), name, key)
                say(f'stopped: the best so far is saved as "{saved}"; run again to go on', node_id)
            except (SkrrError, OSError) as error:  # Stop stays a stop
                say(f"stopped: run again to go on; the best so far could not be saved as a plan: {error}", node_id)
        raise
    plan, data = plan_of(entry), b""
    if standins:
        plan, data = standin_file.encoded(plan, standins)
    saved = library.save_searched(plan, name, key, data)
    beside = f", its stand-ins as {standin_file.beside(saved)}" if data else ""
    say(f'saved as "{saved}"{beside} in models/{library.FOLDER}', node_id)
    state.forget()
    return plan


def fingerprint(clip, view: View, settings, prompts: Sequence[str], projection) -> str:
    """SHA-256 over all that decides the outcome of a search: weights, LoRAs, layer choice, prompts, settings (whatever
    their repr tells apart)."""
    digest = hashlib.sha256()
    options = [clip.layer_idx, str(clip.tokenizer_options)]
    digest.update(json.dumps([__version__, view.name, options, repr(settings), prompts_sha256(prompts)]).encode())
    backup = clip.patcher.backup
    transformer = dense_model(clip).get_submodule(view.path).transformer
    for key, tensor in transformer.named_parameters():
        full = view.prefix + key
        feed(digest, [key, backup[full].weight if full in backup else tensor])
    for key in sorted(key for key in clip.patcher.patches if key.startswith(view.prefix)):
        feed(digest, [key, clip.patcher.patches[key]])
    feed(digest, sorted(projection.tensors.items()) if projection is not None else None)
    return digest.hexdigest()


def feed(digest, value) -> None:
    """Add a value to a digest: of tensors the kind, shape and first bytes, of containers each member."""
    if torch.is_tensor(value):
        raw = getattr(value, "_qdata", value).detach()  # comfy_quant keeps its bytes there
        start, length = raw.storage_offset() * raw.element_size(), min(SAMPLE, raw.nbytes)
        sample = torch.empty(0, dtype=torch.uint8, device=raw.device)
        sample.set_(raw.untyped_storage(), start, (length,))
        digest.update(f"{raw.dtype}{list(value.shape)}".encode() + sample.cpu().numpy().tobytes())
    elif isinstance(value, dict):
        feed(digest, sorted(value.items(), key=lambda item: str(item[0])))
    elif isinstance(value, list | tuple):
        digest.update(b"(")
        for part in value:
            feed(digest, part)
        digest.update(b")")
    elif hasattr(value, "weights"):  # ComfyUI's LoRA adapters
        feed(digest, [type(value).__name__, value.weights])
    else:
        digest.update(
            repr(value).encode() if isinstance(value, str | int | float | None) else type(value).__name__.encode()
        )
