"""What each command does."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SkrrError
from ..measure.prompts import broad as broad_prompts
from ..measure.prompts import from_file as read_prompts
from ..measure.prompts import generate as generate_prompts
from ..plan.model import Plan, is_name
from ..plan.words import changes, describe_plan, duration
from ..search import QUALITIES, RESUMABLE

if TYPE_CHECKING:
    from ..encoder.row import Numbers
    from ..files.folder import Encoder, Padding
    from ..measure.calibration import Calibration
    from ..measure.meter import Meter
    from ..measure.processes import Team
    from ..measure.projection import TextProjection

BARE = (
    "no --projection: the search runs on the bare embeddings, and quality suffers (paper: GenEval .381 instead of .442)"
)


WEIGHTS = (".safetensors", ".bin")
CONFIGURATION = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model",
)  # fmt: skip
"""What transformers reads beside weights."""


class UsageError(SkrrError):
    """An option that makes no sense; one line."""


def run_search(options) -> None:
    """Search a plan for an encoder and write it."""
    method = method_of(options)
    check_search(options, method)
    rank = options.standins or ("16" if method in ("widths", "standins") else None)
    fitting = parsed_standins(rank, options.tune)
    settings = settings_of(options, method, fitting)
    bench = prepare(options, fitting, method == "widths")
    job = job_of(options, bench, settings, fitting, method)
    leads = bench.team.leads
    if bench.projection is None and leads:
        print(f"skrr: {BARE}", file=sys.stderr)
    inputs = inputs_sha256(bench)
    state, save, beam = resumed(options, bench, job, inputs)
    facts = [*job.facts(), options.dtype, bench.encoder.row.parameter_counts, bench.tokens, inputs, beam]
    bench.team.agree(repr(facts))
    found = job.run(
        (lambda progress: None) if options.quiet or not leads else Reporter(), save, beam, state if leads else None
    )
    if leads:
        plan, written = write_plan(
            options.out, job.plan(found.entry), {job.name: found.standins}, {job.name: found.orders}
        )
        if state is not None:
            state.forget()
        if not options.quiet:
            print("", file=sys.stderr)
        print(describe_plan(plan))
        print(f"written to {written}", flush=True)
    bench.team.part()


def method_of(options) -> str:
    """The method that is asked for: by name, by its quality, or by flags that only the paper's way has."""
    if options.method:
        return options.method
    if options.quality:
        return QUALITIES[options.quality]
    if options.standins:
        return "standins"
    paper = options.beam is not None or options.exact or options.no_reuse or options.delta is not None
    return QUALITIES["paper" if paper else "best"]


def settings_of(options, method: str, fitting):
    """The search's settings. Raises UsageError, SearchError."""
    from ..search.settings import Settings, sparsity_for
    from ..search.widths import LEVELS

    if options.sparsity is not None and options.gb is not None:
        raise UsageError("--gb: give either that or --sparsity")
    sparsity = 0.42 if options.sparsity is None else options.sparsity
    if options.gb is not None:
        sparsity = sparsity_for(options.gb * 1e9, numbers_on_disk(options.encoder), fitting.rank if fitting else 0)
    delta = 0.0 if options.exact else Settings.delta if options.delta is None else options.delta
    beam = Settings.beam if options.beam is None else options.beam
    levels, further = parsed_levels(options.levels), ()
    if method == "widths":
        levels, further = (), levels or LEVELS
    return Settings(sparsity, levels, beam, not options.no_reuse, delta, further, options.gb is not None)


def numbers_on_disk(path: str) -> "Numbers":
    """An encoder's numbers as its files hold it. Raises UsageError."""
    from ..files.layout import layout_of
    from ..files.offload import Files

    source = Path(path)
    files = Files(sorted(source.glob("*.safetensors")) if source.is_dir() else [source])
    layout = layout_of(files.entries)
    if layout is None:
        raise UsageError("--gb: what this encoder takes on the disk can't be told; give --sparsity")
    return layout


def check_search(options, method: str) -> None:
    """Refuse what can't be done before anything is loaded. Raises UsageError."""
    if options.method == "standins" and options.standins is None:
        raise UsageError("--method standins: fits stand-ins; give their rank with --standins, like 16")
    if options.standins == "auto" and method == "widths":
        raise UsageError("--standins auto: narrowed sub-blocks have stand-ins of one rank; give it, like 16")
    if options.tune and method != "widths":
        raise UsageError("--tune: goes with --quality best; tune the stand-ins of other plans with repair --tune")
    if options.resume and method not in RESUMABLE:
        raise UsageError(f"--resume: --method {method} takes one step; leave it out")
    check_writable(options.out, "--out")
    if options.resume:
        check_writable(options.resume, "--resume")
    if options.name is not None and not is_name(options.name):
        raise UsageError(f"--name {options.name}: an encoder's name has letters, digits, _ and -, like t5xxl")


def job_of(options, bench: "Bench", settings, fitting, method: str):
    """The search that is asked for."""
    from ..search.job import Job

    return Job(
        options.name or bench.encoder.name,
        bench.calibration,
        bench.prompts,
        settings,
        bench.projection,
        fitting,
        method,
        getattr(options, "seed", 0),
        bench.team,
    )


def write_plan(out: str, plan: Plan, standins, orders=None) -> tuple[Plan, str]:
    """Write a plan and, beside it, the stand-ins (encoder -> level -> place -> stand-in) and the orders of units
    (encoder -> place -> units) where there are any; returns the plan as it was written, and where."""
    from ..files import companion

    orders = {name: own for name, own in (orders or {}).items() if own}
    if not any(standins.values()) and not orders:
        plan.write(out)
        return plan, out
    plan, data = companion.encoded(plan, standins, orders)
    companion.write_both(out, plan, data)
    return plan, f"{out}, its stand-ins to {companion.beside(out)} ({len(data) / 1e6:.1f} MB)"


def parsed_standins(text: str | None, tuning: int = 0):
    """`--standins` and `--tune` as a Fitting, None where there are no stand-ins."""
    from ..standins.fit import Fitting

    if text is None:
        return None
    if text == "auto":
        return Fitting(ranks=Fitting.RANKS)
    try:
        rank = int(text)
    except ValueError:
        raise UsageError(f"--standins {text}: give a rank, like 16, or auto") from None
    return Fitting(rank=rank, tuning=tuning)


def resumed(options, bench: "Bench", job, inputs: str):
    """The search's saved state (None without --resume), what saves it, and the beam to go on from. inputs: see
    `inputs_sha256`."""
    from ..search.resume import State, fingerprint

    if not options.resume:
        return None, lambda beam: None, ()
    encoder = bench.encoder

    def weights():
        for sub_block in encoder.row.sub_blocks:
            encoder.bring(sub_block.index)
            yield sub_block.tensors()

    row = encoder.row
    key = fingerprint([row.family, row.width, row.total], job.state_facts(), options.dtype, inputs, weights())
    state = State(options.resume, key)
    return state, state.save if bench.team.leads else lambda beam: None, state.load(len(row))


def inputs_sha256(bench: "Bench") -> str:
    """Over the prompts' tokens and samples of the denoiser's projection: what an encoder is searched on."""
    from ..search.resume import fingerprint

    ids = [list(bench.encoder.tokenize(prompt)) for prompt in ["", *bench.prompts]]
    through = bench.projection and [bench.projection.name, bench.projection.tensors]
    return fingerprint(ids, repr(bench.padding), through)


def run_show(options) -> None:
    """Print a plan: its encoders, levels and a map of the strongest level."""
    print(describe_plan(Plan.read(options.plan)))


def run_discrepancy(options) -> None:
    """Measure a plan's level on prompts: D_cond and D_null (mean squared errors of the projected conditional and null
    embeddings), null_norm (mean L2 norm of the projected null embedding's tokens), dense and pruned."""
    from ..measure.discrepancy import finite

    bench = prepare(options)
    name, entry, level, fitted, removed = removal(options, bench)
    row, meter = bench.encoder.row, bench.meter(bench.prompts)
    (found,) = meter.measure([removed])
    result = {
        "encoder": name,
        "skipped": level.skipped,
        "sparsity": row.sparsity(entry.shares(level)),
        "standins": len(fitted.standins),
        "D": found.finite,  # JSON has no infinity
        "D_cond": finite(found.conditional),
        "D_null": finite(found.null),
        "null_norm": {"dense": meter.null_norm(), "pruned": finite(found.null_norm)},
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"{name}: {changes(entry, level, len(row), len(fitted.standins))}, sparsity {result['sparsity']:.1%}")
    print(f"D_cond    {found.conditional:.6g}")
    print(f"D_null    {found.null:.6g}")
    print(f"null_norm {result['null_norm']['dense']:.6g} dense, {found.null_norm:.6g} pruned")


def fitted_beside(path: str, name: str, entry, level):
    """The stand-ins and units of a level of the plan at `path`. Where their file is missing: none, and a word on
    stderr; StandInError for a level that is nothing without them."""
    from ..files import companion as standin_file

    fitted, problem = standin_file.of_level([Path(path).parent], name, entry, level, standin_file.beside(path))
    if problem and entry.narrowed(level):
        raise standin_file.StandInError(problem)
    if problem:
        print(f"skrr: {problem}", file=sys.stderr)
    return fitted


def named_entry(options, plan: Plan, bench: "Bench") -> str:
    """The name of the plan's entry for the encoder. Raises PlanError where that is made for another."""
    from ..files.narrow import check

    usual = bench.encoder.name if bench.encoder.name in plan.encoders else next(iter(plan.encoders))
    name = options.name or usual
    check(bench.encoder.row, plan.encoder(name), name)
    return name


def removal(options, bench: "Bench"):
    """The name of the plan's entry for the encoder, the entry, its level asked for, what is there of its companion,
    and all of it as an assignment."""
    plan = Plan.read(options.plan)
    name = named_entry(options, plan, bench)
    entry = plan.encoder(name)
    level = entry.choose(options.sparsity)
    fitted = fitted_beside(options.plan, name, entry, level)
    return name, entry, level, fitted, fitted.assignment(entry, level)


def run_repair(options) -> None:
    """Fit linear stand-ins to a plan that is there already, in one pass over the prompts for each of its levels, and at
    further sizes; with --widths, narrow sub-blocks to the sizes of its levels instead, which takes a measurement."""
    from ..files import companion
    from ..search.settings import Settings, sizes_of

    check_writable(options.out, "--out")
    plan, fitting = Plan.read(options.plan), parsed_standins(options.standins, options.tune)
    if fitting.ranks:
        raise UsageError("--standins auto: repair fits one rank; give it, like 16")
    levels = parsed_levels(options.levels)
    bench = prepare(options, fitting, options.widths)
    name = named_entry(options, plan, bench)
    entry = plan.encoder(name)
    first = companion.beside(options.plan)
    orders = {} if options.widths else companion.of_entry([first.parent], name, entry, first)
    report = (lambda progress: None) if options.quiet or not bench.team.leads else Reporter()
    if options.widths:
        job = job_of(options, bench, sizes_of(entry, levels), fitting, "widths")
    else:
        job = job_of(options, bench, Settings(), fitting, "standins")
    facts = [job.facts(), options.dtype, bench.encoder.row.parameter_counts, bench.tokens, inputs_sha256(bench)]
    bench.team.agree(repr([*facts, plan.to_json(), levels]))
    if options.widths:
        found = job.run(report)
    else:
        found = job.repair(entry, orders, levels, report)
    if bench.team.leads:
        alone = options.widths and plan.encoders.keys() == {name}
        provenance = job.plan(found.entry).provenance if alone else plan.provenance
        made = Plan(encoders={**plan.encoders, name: found.entry}, provenance=provenance)
        plan, written = write_plan(options.out, made, {name: found.standins}, {name: found.orders})
        if not options.quiet:
            print("", file=sys.stderr)
        print(describe_plan(plan))
        print(f"written to {written}", flush=True)
    bench.team.part()


def run_encode(options) -> None:
    """Write each prompt's conditioning (last hidden state, float32 [tokens, width]) as the encoder gives it, pruned and
    repaired by a plan where one is given: keys 0, 1, ... by prompt, without blank lines, and null for the empty one."""
    from safetensors.torch import save

    from ..encoder.rewire import rewire
    from ..files import companion as standin_file
    from ..measure.calibration import grouped

    check_writable(options.out, "--out")
    bench = prepare(options)
    encoder = bench.encoder
    if options.plan:
        *_, removed = removal(options, bench)
        rewire(encoder.module, encoder.row, removed)
    found = {}
    ids = [encoder.tokenize(prompt) for prompt in bench.prompts]
    for group in grouped([len(own) for own in ids], lambda length: 512 // length):
        ((hidden, _),) = encoder.batch([ids[i] for i in group]).run(encoder.module)
        found |= {str(i): row.float().cpu().clone() for i, row in zip(group, hidden, strict=True)}
    ((null, _),) = encoder.batch([encoder.tokenize("")]).run(encoder.module)
    found["null"] = null[0].float().cpu()
    data = save(found)
    standin_file.write(options.out, data)
    print(f"{len(ids)} prompts and the empty one written to {options.out} ({len(data) / 1e6:.1f} MB)")


def run_apply(options) -> None:
    """Write a copy of an encoder's .safetensors without what a plan skips: kept tensors bit for bit, and the plan."""
    from ..files.encoder_file import Checkpoint
    from ..files.narrow import check, narrowing
    from ..files.pruned import write_pruned

    plan, source = Plan.read(options.plan), Checkpoint(options.encoder)
    check_writable(options.out, "--out")
    layout = source.layout
    shape = (layout.family, layout.blocks, layout.width)
    alike = [n for n, e in plan.encoders.items() if (e.family, e.blocks, e.width) == shape]
    name = options.name or (alike[0] if alike else next(iter(plan.encoders)))
    entry = plan.encoder(name)
    check(layout, entry, name)
    level = entry.choose(options.sparsity)
    fitted = fitted_beside(options.plan, name, entry, level)
    written = write_pruned(source, options.out, name, plan, level.skipped, fitted=fitted)
    gone = layout.sparsity(entry.shares(level))
    before = source.path.stat().st_size
    changed = changes(entry, level, 2 * layout.blocks, len(fitted.standins))
    print(f"{name}: {changed}, {gone:.1%} of its parameters left out")
    if whole := narrowing(layout, entry, level, fitted.units).whole:
        print(f"{len(whole)} projections of narrowed sub-blocks can't be cut, as they are quantised: they stay whole")
    print(f"{options.out}: {written:,} bytes of {before:,} ({written / before:.1%})")


def run_verify(options) -> None:
    """Check a pruned encoder file, or one whose zeros are not stored: its metadata, that the right tensors are left
    out, and every byte of the others."""
    from ..files.pruned import verify

    found = verify(options.file)
    record = found.record
    if found.packed:
        weights = [found.stored(key).count for key in found.packed]
        how = f" by {found.sparse.method}" if found.sparse and found.sparse.method else ""
        print(f"{options.file}: whole; {len(weights)} packed weights{how}, {sum(weights):,} places in all")
        if found.sparse is None:
            print("another program has written it, without a hash: only its packed weights could be checked")
    if record is None:
        return
    print(f"{options.file}: whole; {record.encoder} of {record.source['name']} without {len(record.dropped)} tensors,")
    more = f", {len(record.narrowed)} tensors narrowed" if record.narrowed else ""
    print(f"{record.skipped} steps of its plan taken{more}, and {len(record.unread)} unread sub-blocks left out")
    if record.header_sha256 is None:
        print("it was written by an earlier Skrr, without a hash of its header: that could not be checked")


@dataclass(frozen=True)
class Bench:
    """What the commands work on. tokens: in a batch, at most; padding: of prompts; calibration: prompts -> as they are
    measured and fitted on; race: in the order of a race."""

    encoder: "Encoder"
    prompts: list[str]
    projection: "TextProjection | None"
    team: "Team"
    tokens: int
    padding: "Padding"
    calibration: "Callable[..., Calibration]"

    def meter(self, prompts: Sequence[str], race: bool = False) -> "Meter":
        """Measures on prompts."""
        from ..measure.meter import Meter

        return Meter(self.calibration(prompts, race), self.projection, team=self.team)


def prepare(options, fitting=None, widths: bool = False) -> Bench:
    """Encoder, prompts and projection from the options. fitting: of stand-ins, where some are fitted: prompts of all
    kinds are generated then; widths: whether they are fitted at several widths."""
    import torch

    from ..encoder.trace import Tracer
    from ..files.folder import MAX_PADDING, gigabytes, load, padding
    from ..measure.calibration import Calibration
    from ..measure.processes import join
    from ..measure.projection import from_file
    from ..memory import batch_tokens, free_memory
    from ..standins.fit import fit_bytes, least_bytes
    from ..standins.widths import TARGETS

    if options.memory is not None and not 0.001 <= options.memory < 10**6:
        raise UsageError(f"--memory {options.memory}: give gigabytes, like 4")
    if options.count is not None and options.count < 1:
        raise UsageError(f"--count {options.count}: give at least 1")
    if options.pad is not None and not 0 <= options.pad <= MAX_PADDING:
        raise UsageError(f"--pad {options.pad}: give a number of tokens from 0 to {MAX_PADDING}, like 77")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no such device here; use --device cpu")
    team = join(options.device)
    if options.prompts:
        prompts = read_prompts(options.prompts)
    else:
        prompts = broad_prompts(options.count or 512) if fitting else generate_prompts(options.count or 128)
    projection = from_file(options.projection).to(options.device) if options.projection else None
    memory = free_memory(options.device) if options.memory is None else int(options.memory * 1e9)
    shares = 2 * team.sharing
    budget = None if options.memory is None and options.device == "cpu" else memory // shares
    encoder = load(options.encoder, getattr(torch, options.dtype), options.device, options.tokenizer, budget, shares)
    if projection is not None and projection.width != encoder.row.width:
        raise UsageError(
            f"--projection takes embeddings {projection.width} wide, but this encoder's are {encoder.row.width} wide:"
            " give the denoiser that this encoder belongs to"
        )
    torch.set_grad_enabled(False)
    tracer = Tracer(encoder.module, encoder.row)
    share = memory // shares
    if fitting:
        beside = memory // team.sharing - (budget or 0)  # weights without a budget lie beside all of the memory
        targets = TARGETS if widths else 1  # fitted to one place together
        least = least_bytes(encoder.row.width, targets)
        if beside < least:
            raise UsageError(
                f"fitting stand-ins takes {least / 1e9:.2g} GB beside the weights: give --memory"
                f" {gigabytes(shares * least)} (GB) or more"
            )
        share = min(share, beside - fit_bytes(encoder.row.width, targets)) // 2  # stand-ins take prompts of their own
    tokens = batch_tokens(memory, encoder.row.width, options.device)

    padded = padding(encoder.row.family, projection and projection.denoiser, options.pad)

    def calibration(chosen: Sequence[str], race: bool = False) -> Calibration:
        batches = encoder.batches(chosen, tokens, race, padded)
        (null,) = encoder.batches([""], padding=padded)
        return Calibration(encoder.module, tracer, batches, null, share)

    return Bench(encoder, prompts, projection, team, tokens, padded, calibration)


def parsed_levels(text: str) -> tuple[float, ...]:
    """ "0.2,0.3" as numbers."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UsageError(f"--levels {text}: give numbers separated by commas, like 0.2,0.3") from None


def spare_inputs(options) -> None:
    """Refuse, before any work, an output that is one of the inputs or another output, however it is spelled or linked.
    Raises UsageError, PlanError."""
    from ..files.companion import beside

    out, state = getattr(options, "out", None), getattr(options, "resume", None)
    outputs = [("--out", out)] if out else []
    if options.command in (run_search, run_repair):
        outputs += [("--out", str(beside(out))), *([("--resume", state)] if state else [])]
    for number, (option, path) in enumerate(outputs):
        for writer, other in outputs[:number]:
            # before either is there only their names tell, and some file systems take a and A for the same
            if same_file(path, other) or os.path.realpath(path).casefold() == os.path.realpath(other).casefold():
                raise UsageError(f"{option} {path}: is what {writer} writes; name another file for the state")
        for reader, file in inputs(options) if os.path.exists(path) else ():
            if same_file(path, file):
                raise UsageError(f"{option} {path}: is the source file of {reader} ({file}): name another")


def same_file(path: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file that is there."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def inputs(options) -> Iterator[tuple[str, Path]]:
    """The files that a command reads, each with its option. Raises PlanError."""
    from ..files.companion import beside, digests, find

    given = {name: getattr(options, name, None) for name in ("encoder", "tokenizer", "prompts", "projection", "plan")}
    for name, path in given.items():
        if path is not None:
            yield f"--{name}", Path(path)
    for name in ("encoder", "tokenizer"):
        path = Path(given[name] or "")
        for file in (path if path.is_dir() else path.parent).iterdir() if given[name] and path.exists() else ():
            if file.name in CONFIGURATION or (path.is_dir() and file.suffix in WEIGHTS):
                yield f"--{name}", file
    if given["plan"] is not None:
        folder, first = Path(given["plan"]).parent, beside(given["plan"])
        for digest in digests(Plan.read(given["plan"])):
            if (file := find([folder], digest, first)) is not None:
                yield "--plan", file


def check_writable(path: str, option: str) -> None:
    """Refuse an output that can't be written before hours are spent on it."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UsageError(f"{option} {path}: its folder does not exist; make it first")
    if os.path.isdir(path):
        raise UsageError(f"{option} {path}: is a folder; name a file")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{option} {path}: nothing can be written there ({error.strerror}); name another") from None


class Reporter:
    """Progress on stderr: a line that moves on a terminal, a line each step elsewhere."""

    def __init__(self):
        self.shown, self.line = 0.0, ""

    def __call__(self, progress) -> None:
        now = time.monotonic()
        moving = sys.stderr.isatty()
        if now - self.shown < 0.5 if moving else progress.line == self.line:
            return
        self.shown, self.line = now, progress.line
        left = "" if progress.seconds_left is None else f", about {duration(progress.seconds_left)} left"
        within = f"candidate {progress.candidate} of {progress.candidates}, " if progress.candidates else ""
        text = f"{progress.line} [{within}{progress.done:.0%}{left}]"
        print(f"\r{text:<110.110}" if moving else text, end="" if moving else "\n", file=sys.stderr, flush=True)
