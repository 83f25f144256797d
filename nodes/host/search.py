"""A search on a CLIP: calibration in ComfyUI's own classes, a state to resume, the finished plan in its folder."""

from collections.abc import Callable, Sequence

import comfy.model_management

from ...skrr_engine import __version__
from ...skrr_engine.encoder.trace import Tracer
from ...skrr_engine.errors import SearchError, SkrrError
from ...skrr_engine.files import companion
from ...skrr_engine.measure.calibration import Calibration
from ...skrr_engine.measure.prompts import sha256 as prompts_sha256
from ...skrr_engine.memory import batch_tokens, free_memory
from ...skrr_engine.plan.model import EncoderPlan, Plan
from ...skrr_engine.search import resume
from ...skrr_engine.search.allocate import Table
from ...skrr_engine.search.job import Job
from ...skrr_engine.search.settings import Settings
from ...skrr_engine.search.skip import SkipList
from ...skrr_engine.standins.fit import Fitting, meter_bytes
from ...skrr_engine.standins.widths import SHARES
from .clip.prompts import Conditioning
from .clip.views import TRANSFORMER, View, dense_model
from .model import from_model
from .plans import folder, searched
from .talk import Reporter, say

BARE = (
    "without a denoiser's text projection: searching on the bare embeddings, quality suffers"
    " (paper: GenEval .381 instead of .442)"
)


def find_plan(
    clip,
    model,
    view: View,
    settings: Settings,
    prompts: Sequence[str],
    name: str,
    node_id: str | None,
    fitting: Fitting | None = None,
    method: str = "",
) -> Plan:
    """The plan for these inputs: the saved one where they were searched before, else a new one, saved as `name`.
    fitting: of linear stand-ins; None for the paper's plan. method: one of search.METHODS, "" for the usual one."""
    job, key = prepared(clip, model, view, settings, prompts, name, node_id, fitting, method)
    known = searched.searched(key)
    if known is not None:
        say(f'found the plan "{known[0]}" of an earlier search with these inputs', node_id)
        return known[1]
    state = searched.state(fingerprint(clip, view, job, job.state_facts()))
    plan = kept(job.plan, run(job, state, key, name, node_id), view.name, key, name, node_id)
    if job.method != "widths":  # a table of widths serves other sizes, too
        state.forget()
    return plan


def repair_plan(
    clip, model, view: View, plan: Plan, entry_name: str, prompts: Sequence[str], name: str, node_id: str | None,
    fitting: Fitting, widths: bool,
) -> Plan:  # fmt: skip
    """A plan's entry for an encoder with stand-ins at all its levels, saved as `name`. widths: levels of the same sizes
    with narrowed sub-blocks, found anew, instead."""
    entry = plan.encoder(entry_name)
    if widths:
        sizes = sorted({level.sparsity for level in entry.levels})
        settings = Settings(sizes[-1], further=tuple(sizes[:-1]))
        found = find_plan(clip, model, view, settings, prompts, name, node_id, fitting, "widths")
        return plan.model_copy(
            update={"version": 2, "encoders": {**plan.encoders, entry_name: found.encoder(view.name)}}
        )
    job, key = prepared(clip, model, view, Settings(), prompts, name, node_id, fitting, "standins", plan.to_json())
    known = searched.searched(key)
    if known is not None:
        say(f'found the plan "{known[0]}" that was repaired with these inputs', node_id)
        return known[1]
    orders = {}
    if entry.units is not None:
        fitted, problem = companion.of_level(folder.folders(), entry_name, entry, entry.levels[-1])
        if problem:
            raise SearchError(problem)
        orders = fitted.units
    found = job.repair(entry, orders, report=Reporter(node_id, job.meter.row, entry.levels[-1].sparsity))

    def made(entry: EncoderPlan) -> Plan:
        return plan.model_copy(update={"encoders": {**plan.encoders, entry_name: entry}})

    return kept(made, found, entry_name, key, name, node_id)


def prepared(
    clip, model, view: View, settings: Settings, prompts: Sequence[str], name: str, node_id: str | None,
    fitting: Fitting | None, method: str, *more,
) -> tuple[Job, str]:  # fmt: skip
    """The job for these inputs, and what its outcome is found again by. Refuses what can't be done before anything is
    loaded."""
    folder.file_name(name)
    folder.folder_to_write(folder.FOLDER)
    _ = view.row  # refuses an encoder that was loaded pruned
    conditioning = Conditioning(clip, view)
    projection = None
    if model is not None and conditioning.hidden:  # a pooled vector alone goes through no text projection
        projection = from_model(model, view, conditioning.width).to(clip.patcher.load_device)
    if projection is None:
        say(BARE, node_id)
    targets = 1 + len(SHARES) if method == "widths" else 1
    calibration = calibrating(conditioning, view, fitting, targets)
    job = Job(view.name, calibration, prompts, settings, projection, fitting, method)
    return job, fingerprint(clip, view, job, [*job.facts(), *more])


def kept(made: Callable[[EncoderPlan], Plan], found, encoder: str, key: str, name: str, node_id: str | None) -> Plan:
    """The plan of what was found, written to its folder with its companion file. made: an entry -> the plan with it."""
    plan, data = made(found.entry), b""
    if found.standins or found.orders:
        orders = {encoder: found.orders} if found.orders else None
        plan, data = companion.encoded(plan, {encoder: found.standins}, orders)
    saved = searched.save_searched(plan, name, key, data)
    beside = f", its stand-ins as {companion.beside(saved)}" if data else ""
    say(f'saved as "{saved}"{beside} in models/{folder.FOLDER}', node_id)
    return plan


def calibrating(conditioning: Conditioning, view: View, fitting: Fitting | None, targets: int = 1):
    """(prompts, whether in the order of a race) -> how the encoder is measured on them. The CLIP is loaded when that is
    first asked for. targets: stand-ins that are fitted to one place together."""
    tracer = null = None
    share = 0

    def calibration(texts: Sequence[str], race: bool) -> Calibration:
        nonlocal tracer, null, share
        device = conditioning.clip.patcher.load_device
        if tracer is None:
            conditioning.load()
            tracer, null = Tracer(conditioning.encoder, view.row, TRANSFORMER), conditioning.null()
            on_cpu = device.type == "cpu"
            memory = free_memory(device) if on_cpu else comfy.model_management.get_free_memory(device) * 9 // 10
            share = int(memory) if fitting is None else meter_bytes(int(memory), view.shape.width, targets)
        batches = conditioning.batches(texts, batch_tokens(share, view.shape.width, device), race)
        return Calibration(conditioning.encoder, tracer, batches, null, share)

    return calibration


def run(job: Job, state: resume.State, key: str, name: str, node_id: str | None):
    """What a job finds; it goes on where an interrupted one stopped. One that is interrupted now leaves what it has as
    a plan, named after `name`; of one with widths only its measurements."""
    row = job.meter.row
    try:
        beam = state.load(job.meter.readable())
    except resume.StateError:
        beam = []  # damaged: the next step writes over it
    if isinstance(beam, Table):
        say(f"going on with {len(beam.curves)} places that were measured before", node_id)
    elif beam:
        say(f"going on with an interrupted search, {len(beam[0].order)} sub-blocks skipped so far", node_id)
    best = beam[0] if beam and not isinstance(beam, Table) else None

    def save(found: Sequence[SkipList] | Table) -> None:
        nonlocal best
        state.save(found)
        best = None if isinstance(found, Table) else found[0]

    try:
        return job.run(Reporter(node_id, row, job.settings.sparsity), save, beam)
    except comfy.model_management.InterruptProcessingException:
        if best is not None:
            try:
                saved = searched.save_unfinished(job.plan(job.unfinished(best)), name, key)
                say(f'stopped: the best so far is saved as "{saved}"; run again to go on', node_id)
            except (SkrrError, OSError) as error:  # Stop stays a stop
                say(f"stopped: run again to go on; the best so far could not be saved as a plan: {error}", node_id)
        else:
            say("stopped: run again to go on with what was measured", node_id)
        raise


def fingerprint(clip, view: View, job: Job, facts: list) -> str:
    """SHA-256 over all that decides the outcome of a search: weights, LoRAs, layer choice, prompts, and these facts."""
    backup = clip.patcher.backup
    transformer = dense_model(clip).get_submodule(view.path).transformer
    weights = (
        [key, backup[view.prefix + key].weight if view.prefix + key in backup else tensor]
        for key, tensor in transformer.named_parameters()
    )
    patches = [[key, clip.patcher.patches[key]] for key in sorted(clip.patcher.patches) if key.startswith(view.prefix)]
    through = job.projection and [job.projection.name, job.projection.tensors]
    options = [clip.layer_idx, str(clip.tokenizer_options)]
    return resume.fingerprint(
        __version__, view.name, options, facts, prompts_sha256(job.prompts), through, weights, patches
    )
