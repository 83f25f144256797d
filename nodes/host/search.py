"""A search on a CLIP: calibration in ComfyUI's own classes, a state to resume, the finished plan in its folder."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import comfy.model_management

from ...skrr_engine import __version__
from ...skrr_engine.encoder.row import EncoderError, Numbers
from ...skrr_engine.encoder.trace import Tracer
from ...skrr_engine.errors import SearchError, SkrrError
from ...skrr_engine.files import companion
from ...skrr_engine.measure.calibration import Calibration
from ...skrr_engine.measure.projection import UnknownError
from ...skrr_engine.measure.prompts import sha256 as prompts_sha256
from ...skrr_engine.memory import batch_tokens, free_memory
from ...skrr_engine.plan.model import Plan, Together
from ...skrr_engine.search import joint, resume, widths
from ...skrr_engine.search.allocate import Table
from ...skrr_engine.search.entry import Found
from ...skrr_engine.search.job import Job
from ...skrr_engine.search.settings import Settings, sizes_of
from ...skrr_engine.search.skip import SkipList
from ...skrr_engine.standins.fit import Fitting, meter_bytes
from ...skrr_engine.standins.widths import TARGETS
from .clip.prompts import Conditioning
from .clip.views import TRANSFORMER, View, dense_model, views
from .model import Projection, from_model
from .plans import folder, searched
from .talk import Reporter, say

BARE = (
    "without a denoiser's text projection: searching on the bare embeddings, quality suffers"
    " (paper: GenEval .381 instead of .442)"
)

REPAIR = "repair"
"""In place of a method: stand-ins for what a plan removes, nothing is chosen."""


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
    if plan := found_before(key, "of an earlier search", node_id):
        return plan
    found = searching(clip, view, job, key, name, node_id)
    return kept(job.plan(found.entry), {view.name: found}, name, key, node_id)


def found_before(key: str, how: str, node_id: str | None) -> Plan | None:
    """The saved plan that was made with the inputs behind this key, where there is one. how: it was, to tell."""
    known = searched.searched(key)
    if known is None:
        return None
    name, plan = known
    say(f'found the plan "{name}" {how} with these inputs', node_id)
    return plan


def find_together(
    clip,
    model,
    settings: Settings,
    gigabytes: float,
    prompts: Sequence[str],
    name: str,
    node_id: str | None,
    fitting: Fitting,
) -> Plan:
    """The plan with widths for all encoders of a CLIP on one budget, found and saved as `find_plan` does it. settings:
    whose targets are shares of all encoders' parameters; gigabytes: that they are brought to together instead, 10**9
    bytes, 0 for none."""
    known = views(clip)
    jobs = {}
    for view in known.values():
        try:
            jobs[view.name] = prepared(clip, model, view, Settings(0.01), prompts, name, node_id, fitting, "widths")
        except EncoderError as error:
            if view.whole is None:
                raise
            say(f"{view.name} stays whole: {error}", node_id)
    if not jobs:
        raise EncoderError(
            "the conditioning reads nothing of this CLIP's encoders that Skrr knows: connect another CLIP"
        )
    wanted = [sorted({*settings.targets, *settings.further}), gigabytes, "together"]
    key = resume.fingerprint([own for _, own in jobs.values()], wanted)
    if plan := found_before(key, "of an earlier search", node_id):
        return plan
    members, tables, states = {}, {}, {}
    for encoder, (job, _) in jobs.items():
        state = states[encoder] = searched.state(fingerprint(clip, known[encoder], job, job.state_facts()))
        with stoppable(node_id):
            search = width_search(job, node_id)
            tables[encoder] = search.measure(state.save, saved_table(state, job, encoder, node_id))
            steps = search.steps(tables[encoder])
            members[encoder] = joint.Member(steps, search.counts, known[encoder].shape, job.meter.nothing())
        job.release()  # its streams are as large as the memory allows
    whole = [view.shape for encoder, view in known.items() if encoder not in members]
    asked, *_ = taken = budgets(members, whole, settings, gigabytes, fitting.rank)
    found = {}
    for encoder, (job, _) in jobs.items():
        ends = {group[encoder] for group in taken} - {0}
        if ends:
            with stoppable(node_id):
                found[encoder] = width_search(job, node_id).found(
                    tables[encoder], ends, {asked[encoder]}, job.kept(states[encoder])
                )
        job.release()
    first, _ = jobs[next(iter(found))]
    plan = Plan(
        encoders={encoder: own.entry for encoder, own in found.items()},
        provenance=first.plan(found[first.name].entry).provenance,
        together=belonging(members, whole, taken, found),
    )
    return kept(plan, found, name, key, node_id)


def budgets(
    members: Mapping[str, joint.Member], whole: Sequence[Numbers], settings: Settings, gigabytes: float, rank: int
) -> list[dict[str, int]]:
    """What each of the budgets that are asked for takes: encoder -> how many of its steps, 0 for none; further ones
    come last. whole: encoders that stay so, and count. Raises SearchError where none takes anything."""
    taken, targets = [], sorted({*settings.further})
    if gigabytes > 0:
        beside = sum(shape.total_bytes for shape in whole)
        taken.append(joint.at_bytes(members, gigabytes * 1e9 - beside, rank))
    else:
        targets = [*settings.targets, *targets]
    own = sum(member.shape.total for member in members.values())
    total = own + sum(shape.total for shape in whole)
    for target in targets:
        with contextlib.suppress(SearchError):  # too small a share for any part, where it was not asked for
            taken.append(joint.at_sparsity(members, target * total / own))
    if not taken:
        raise SearchError("no part of these encoders is as small as what is to be removed: ask for more")
    return taken


def belonging(
    members: Mapping[str, joint.Member],
    whole: Sequence[Numbers],
    taken: Sequence[Mapping[str, int]],
    found: Mapping[str, Found],
) -> tuple[Together, ...]:
    """What a plan says of the levels that belong together, the weakest first. taken: see `budgets`."""
    total = sum(shape.total for shape in (*whole, *(member.shape for member in members.values())))
    groups = {}
    for ends in taken:
        levels = {encoder: end for encoder, end in ends.items() if end}
        parts = [(found[n].entry.level(end).discrepancy, members[n].nothing) for n, end in levels.items()]
        d = None if any(own is None for own, _ in parts) else sum(own / nothing for own, nothing in parts)
        gone = sum(members[n].removed(end) for n, end in levels.items()) / total
        groups[tuple(ends.values())] = Together(sparsity=round(gone, 6), levels=levels, discrepancy=d)
    return tuple(sorted(groups.values(), key=lambda group: group.sparsity))


def width_search(job: Job, node_id: str | None) -> widths.Search:
    """What measures and fits a job's encoder, telling the node."""
    report = Reporter(node_id, job.meter.row, job.settings.sparsity, f"{job.name}: ")
    return widths.Search(job.fitted, job.meter, job.settings, job.fitting, report)


def saved_table(state: resume.State, job: Job, encoder: str, node_id: str | None) -> Table:
    """What was measured of an encoder before, nothing where that is damaged."""
    table = loaded(state, job)
    if not isinstance(table, Table):
        return Table()
    say(f"{encoder}: going on with {len(table.curves)} parts that were measured before", node_id)
    return table


def loaded(state: resume.State, job: Job):
    """What an interrupted search has left, nothing where that is damaged: the next step writes over it."""
    try:
        return state.load(job.meter.readable())
    except resume.StateError:
        return []


@contextlib.contextmanager
def stoppable(node_id: str | None) -> Iterator[None]:
    """Says, where it is interrupted, that what was measured stays."""
    try:
        yield
    except comfy.model_management.InterruptProcessingException:
        say("stopped: run again to go on with what was measured", node_id)
        raise


def searching(clip, view: View, job: Job, key: str, name: str, node_id: str | None) -> Found:
    """What a search finds, from the state of an interrupted one on. A table of widths stays: it serves other sizes,
    too."""
    state = searched.state(fingerprint(clip, view, job, job.state_facts()))
    found = run(job, state, key, name, node_id)
    if job.method != "widths":
        state.forget()
    return found


def repair_plan(
    clip,
    model,
    matched: Mapping[str, View],
    plan: Plan,
    prompts: Sequence[str],
    name: str,
    node_id: str | None,
    fitting: Fitting,
    widths: bool,
) -> Plan:
    """A plan with stand-ins at all levels of its entries for these encoders (entry's name -> encoder), saved as `name`
    with one file for all of them; other entries stay as they are. widths: levels of the same sizes with narrowed
    sub-blocks, found anew, instead."""
    jobs = {}
    for entry_name, view in matched.items():
        settings, method = (sizes_of(plan.encoder(entry_name)), "widths") if widths else (Settings(), REPAIR)
        jobs[entry_name] = prepared(clip, model, view, settings, prompts, name, node_id, fitting, method)
    key = resume.fingerprint([own for _, own in jobs.values()], plan.to_json())
    if before := found_before(key, "that was repaired", node_id):
        return before
    read = {} if widths else matched
    orders = {entry: companion.of_entry(folder.folders(), entry, plan.encoder(entry)) for entry in read}
    found = {}
    for entry_name, (job, _) in jobs.items():
        entry, view = plan.encoder(entry_name), matched[entry_name]
        if widths:
            found[entry_name] = searching(clip, view, job, key, name, node_id)
        else:
            report = Reporter(node_id, view.row, entry.levels[-1].sparsity)
            found[entry_name] = job.repair(entry, orders[entry_name], report=report)
        job.release()  # its streams are as large as the memory allows
    entries = {**plan.encoders, **{entry_name: own.entry for entry_name, own in found.items()}}
    provenance = job.plan(entry).provenance if widths and found.keys() == plan.encoders.keys() else plan.provenance
    return kept(Plan(encoders=entries, provenance=provenance), found, name, key, node_id)


def prepared(
    clip, model, view: View, settings: Settings, prompts: Sequence[str], name: str, node_id: str | None,
    fitting: Fitting | None, method: str,
) -> tuple[Job, str]:  # fmt: skip
    """The job for these inputs, and what its outcome is found again by. method: one of search.METHODS, or REPAIR.
    Refuses what can't be done before anything is loaded."""
    folder.file_name(name)
    folder.folder_to_write(folder.FOLDER)
    _ = view.row  # refuses an encoder that was loaded pruned
    conditioning = Conditioning(clip, view)
    projection, why = projecting(clip, model, conditioning)
    if projection is None and (method != REPAIR or fitting.tuning):  # fits alone look at no projection
        say(why + BARE, node_id)
    targets = TARGETS if method == "widths" else 1
    calibration = calibrating(conditioning, view, fitting, targets)
    named = "standins" if method == REPAIR else method
    job = Job(view.name, calibration, prompts, settings, projection, fitting, named)
    return job, fingerprint(clip, view, job, [*job.facts(), *([REPAIR] if method == REPAIR else [])])


def projecting(clip, model, conditioning: Conditioning) -> tuple[Projection | None, str]:
    """A MODEL's projection of what is read of an encoder, on the device that encodes; None, and why, where there is
    none. Raises ProjectionError where it is for embeddings of another width."""
    view = conditioning.view
    if model is None:
        return None, ""
    try:
        found = from_model(model, view, conditioning.width, conditioning.hidden, conditioning.pooled)
    except UnknownError as error:
        return None, f"{view.name}: {error}; "
    return found.to(clip.patcher.load_device), ""


def kept(plan: Plan, found: Mapping[str, Found], name: str, key: str, node_id: str | None) -> Plan:
    """A plan with what was found for its entries, written to its folder with its companion file."""
    standins = {entry: own.standins for entry, own in found.items() if own.standins}
    orders, data = {entry: own.orders for entry, own in found.items() if own.orders}, b""
    if standins or orders:
        plan, data = companion.encoded(plan, standins, orders)
    saved = searched.save_searched(plan, name, key, data)
    beside = f" with {companion.beside(saved)}, which belongs to it," if data else ""
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
    row, beam = job.meter.row, loaded(state, job)
    if isinstance(beam, Table):
        places = len(beam.curves)
        whole = places == job.meter.readable()
        told = (
            "every part was measured before: fitting it to this size"
            if whole
            else (f"going on with {places} parts that were measured before")
        )
        say(told, node_id)
    elif beam:
        say(f"going on with an interrupted search, {len(beam[0].order)} sub-blocks skipped so far", node_id)
    best = beam[0] if beam and not isinstance(beam, Table) else None

    def save(found: Sequence[SkipList] | Table) -> None:
        nonlocal best
        state.save(found)
        best = None if isinstance(found, Table) else found[0]

    try:
        return job.run(Reporter(node_id, row, job.settings.sparsity), save, beam, state)
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
