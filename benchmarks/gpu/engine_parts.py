"""The parts that need no ComfyUI: the search, stand-ins, running out of memory, NCCL, half precision."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from pathlib import Path

import torch

from skrr_engine.encoder import families
from skrr_engine.encoder.actions import assignment
from skrr_engine.encoder.trace import Tracer
from skrr_engine.files.folder import Encoder, streamed
from skrr_engine.files.offload import Files
from skrr_engine.measure.calibration import Batch, Calibration, grouped
from skrr_engine.measure.meter import Meter
from skrr_engine.measure.processes import Team
from skrr_engine.measure.projection import RECIPES, build
from skrr_engine.memory import batch_tokens, free_memory
from skrr_engine.plan import model as plans
from skrr_engine.search import reuse
from skrr_engine.search.run import search
from skrr_engine.search.settings import Settings
from skrr_engine.standins import fit as standin
from skrr_engine.standins.fit import Fitting

from . import common
from .common import GB, Card, Work, emit, target

MODES = {"racing": 0.05, "exact": 0.0}


class Enough(Exception):
    """Ends a search whose time is up."""


class Prompts(Calibration):
    """Prompts that count how often memory ran out on them."""

    shrinks = 0

    def shrink(self, *args, **kwargs):
        self.shrinks += 1
        return super().shrink(*args, **kwargs)


class Counting(Meter):
    """A meter that counts sub-block forwards over all prompts' tokens."""

    forwards = 0.0

    @property
    def shrinks(self) -> int:
        """How often it ran out of memory."""
        return self.calibration.shrinks

    def lowest(self, *args, **kwargs):
        try:
            return super().lowest(*args, **kwargs)
        finally:
            self.forwards += self.spent

    def flops(self) -> float:
        """Of what was counted: two for each weight of a mean sub-block and token; attention's scores are left out."""
        counts = self.tracer.row.parameter_counts
        return self.forwards * sum(self._tokens) * 2 * sum(counts) / len(counts)


def projection_for(card: Card, width: int, features: int):
    """PixArt's two linear layers with random weights."""
    draw = torch.Generator(card.device).manual_seed(1)
    sizes = {"y_embedder.y_proj.fc1": (features, width), "y_embedder.y_proj.fc2": (features, features)}

    def fetch(key: str):
        out, into = sizes[key.rpartition(".")[0]]
        shape = (out, into) if key.endswith("weight") else (out,)
        return torch.randn(shape, generator=draw, device=card.device) * into**-0.5

    return build(RECIPES[0], fetch)


def batches_of(encoder: Encoder, ids: list[list[int]], tokens: int, race: bool) -> list[Batch]:
    """As Encoder.batches makes them of prompts."""
    groups = grouped([len(own) for own in ids], lambda length: tokens // length, race)
    return [encoder.batch([ids[i] for i in group]) for group in groups]


def meter_for(work: Work, encoder: Encoder, memory: int, race: bool, prompts: int, seed: int = 0, tracer=None, **more):
    """A meter on random prompts, as the command line makes it with `--memory` (of which the meter gets `memory`)."""
    card, row = work.card, encoder.row
    ids = common.token_ids(prompts, work.sizes.tokens, work.sizes.search.vocab, seed)
    batches = batches_of(encoder, ids, batch_tokens(2 * memory, row.width, card.device), race)
    projection = projection_for(card, row.width, 16 if work.rehearse else 1152)
    tracer = tracer or Tracer(encoder.module, row)
    return Counting(Prompts(encoder.module, tracer, batches, encoder.batch([[1]]), memory), projection, **more)


def own_encoder(module) -> Encoder:
    return Encoder("t5xxl", module, families.find(module), lambda prompt: [1])


@functools.cache
def resident(card: Card, sizes) -> Encoder:
    """T5 in fp16 on the card (in float32 on the CPU, which knows little half precision), made once a process."""
    return own_encoder(common.t5_on_card(card, sizes, torch.float16 if card.cuda else torch.float32))


@functools.cache
def gemm_rate(card: Card, tokens: int, width: int, out: int, dtype=torch.float16) -> float:
    """FLOP/s of a matrix product on random data, in the best of five series of ten."""
    dtype = dtype if card.cuda else torch.float32
    x = torch.randn(tokens, width, device=card.device, dtype=dtype)
    w = torch.randn(out, width, device=card.device, dtype=dtype)
    act = functools.partial(torch.nn.functional.linear, x, w)
    series = lambda: [act() for _ in range(10)]  # noqa: E731
    return 20 * tokens * width * out / card.seconds(series, 5)


def own_rate(work: Work, dtype=torch.float16) -> float:
    """That of the search's own products: the feed-forward's, on as many tokens as a batch has."""
    sizes, tokens = work.sizes.search, 2048 if work.card.cuda else 120
    return gemm_rate(work.card, tokens, sizes.width, sizes.ffn, dtype)


def rates(work: Work) -> None:
    """What the card does at best: everything else is held against it."""
    card, n = work.card, 8192 if work.card.cuda else 256
    a = torch.empty((1 << 32) if card.cuda else 1 << 20, dtype=torch.uint8, device=card.device).random_()
    copied = 2 * a.nbytes / card.seconds(functools.partial(torch.empty_like(a).copy_, a), 5)
    del a
    found = {str(dtype).removeprefix("torch."): gemm_rate(card, n, n, n, dtype) / 1e12
             for dtype in (torch.float16, torch.bfloat16, torch.float32)}  # fmt: skip
    shape = {"fp16, the search's shape": own_rate(work) / 1e12, "fp32": own_rate(work, torch.float32) / 1e12}
    emit(what="rates", name="what the card does", tflops=found, own_tflops=shape, copy_gb_s=copied / GB)


def timed_search(work: Work, meter: Counting, settings: Settings, seconds: float) -> dict:
    """A search for so many seconds: its removals' times, and, where it did not end, what it expects to take."""
    steps, last, start = [], [], time.monotonic()

    def report(progress) -> None:
        last[:] = [progress]
        if time.monotonic() - start > seconds:
            raise Enough

    def save(beam) -> None:
        work.card.sync()
        steps.append(time.monotonic() - start)

    entry = None
    with contextlib.suppress(Enough):
        entry = search(meter, settings, report, save)
    work.card.sync()
    taken = time.monotonic() - start
    left = 0.0 if entry else (last[0].seconds_left if last else None)
    found = {"seconds": taken, "removals": len(steps), "first_s": steps[0] if steps else None}
    found |= {"second_s": steps[1] - steps[0] if len(steps) > 1 else None, "ended": entry is not None}
    found |= {"expected_removals": last[0].steps if last else None, "whole_s": None if left is None else taken + left}
    if entry:
        found |= {"reuse_s": taken - steps[-1], "D": entry.levels[-1].discrepancy, "order": entry.order}
    return found


def search_part(work: Work, mode: str) -> None:
    """The search on the resident encoder."""
    card = work.card
    card.clean()
    memory = free_memory(card.device) // 2 if card.cuda else 1 << 28
    encoder, settings = resident(card, work.sizes.search), Settings(delta=MODES[mode])
    base = card.allocated()
    card.reset_peak()
    meter = meter_for(work, encoder, memory, mode == "racing", work.sizes.prompts)
    found = timed_search(work, meter, settings, work.left * (0.75 if mode == "racing" else 0.8))
    rate, share = meter.flops() / found["seconds"], meter.flops() / found["seconds"] / own_rate(work)
    found |= {"tflops": rate / 1e12, "gemm_share": share, "peak_gb": (card.peak() - base) / GB}
    found |= {"memory_gb": memory / GB, "shrinks": meter.shrinks}
    targets = [target("share of the GEMM rate", share, 0.6, at_most=False)]
    targets.append(target("peak beside the weights, of what it may take", (card.peak() - base) / memory, 1.0, True))
    if mode == "racing":
        targets.append(target("whole search, seconds", found["whole_s"], 600, at_most=True))
    emit(what="search", name=mode, mode=mode, **found, targets=card.targets(*targets))
    if not found["ended"]:
        one_reuse(work, meter, settings)


def one_reuse(work: Work, meter: Counting, settings: Settings) -> None:
    """The re-uses of one level of the shipped plan: with a length that this encoder has."""
    order = [i for i in level()[0] if i < len(meter.tracer.row)]
    start, forwards, skipped = time.monotonic(), meter.forwards, []

    def lowest(candidates, keep):
        skipped.append(len(candidates))
        if work.left < 2:
            raise Enough
        return meter.lowest(candidates, keep, settings.reuse_delta(len(order)))

    with contextlib.suppress(Enough):
        reuse.search(lowest, order, len(meter.tracer.row), settings.rounding)
        skipped.append(0)
    work.card.sync()
    seconds, done = time.monotonic() - start, len(skipped) - 1
    emit(what="re-use", name=f"re-uses of a level, {'racing' if settings.delta else 'exact'}", seconds=seconds,
         forwards=meter.forwards - forwards, whole_s=seconds * (len(order) + 1) / max(done, 1),
         ended=skipped[-1] == 0)  # fmt: skip


def level() -> tuple[tuple[int, ...], dict[int, int]]:
    """What the shipped plan removes at 42 %, in order, and its re-uses."""
    entry = plans.Plan.read(plans.shipped()[common.PLAN]).encoder("t5xxl")
    chosen = max((lv for lv in entry.levels if lv.sparsity <= common.SPARSITY), key=lambda lv: lv.skipped)
    return entry.order[: chosen.skipped], chosen.reuse


def profile_part(work: Work) -> None:
    """Where the time of a step goes: the same step plainly, under torch's profiler and under Python's."""
    import cProfile
    import io
    import pstats

    card, encoder = work.card, resident(work.card, work.sizes.search)
    memory = 16 * 10**9 if card.cuda else 1 << 28
    start = [assignment((i,)) for i in range(len(encoder.row))]
    deep = [assignment((*range(2, 8), i)) for i in range(8, len(encoder.row))]

    def step() -> tuple[float, int]:
        """Seconds of a racing step behind an earlier one, as most are, on a few prompts."""
        meter = meter_for(work, encoder, memory, True, 16)
        meter.lowest(start, 3, 0.05)
        card.sync()
        begun = time.perf_counter()
        meter.lowest(deep, 3, 0.05)
        card.sync()
        return time.perf_counter() - begun, meter.shrinks

    step()
    plain, _ = step()
    busy = None
    if card.cuda:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        meter = meter_for(work, encoder, memory, True, 16)
        meter.lowest(start, 3, 0.05)
        card.sync()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
            meter.lowest(deep, 3, 0.05)
            card.sync()
        averages = profiled.key_averages()
        busy = sum(e.self_device_time_total for e in averages if e.device_type == DeviceType.CUDA) / 1e6
        work.write("profile_device.txt", averages.table(sort_by="self_device_time_total", row_limit=30))
        work.write("profile_host.txt", averages.table(sort_by="self_cpu_time_total", row_limit=30))
    watched = cProfile.Profile()
    watched.runcall(step)
    text = io.StringIO()
    pstats.Stats(watched, stream=text).sort_stats("tottime").print_stats(30)
    work.write("profile_python.txt", text.getvalue())
    idle = None if busy is None else max(0.0, 1 - busy / plain)
    emit(what="python", name="share of a step in which the card waits for Python", seconds=plain, busy_s=busy,
         share=idle,
         targets=card.targets(target("share of time in Python", idle, 0.1, at_most=True)))  # fmt: skip


class Reading(Files):
    """Counts what is read. total: bytes; seconds: that reading took."""

    total, seconds = 0, 0.0

    def read(self, key: str):
        start = time.perf_counter()
        found = super().read(key)
        self.seconds += time.perf_counter() - start
        self.total += found.nbytes
        return found


def streamed_part(work: Work, limited: bool) -> None:
    """`--memory 6`: an encoder that does not fit, read from its file for every batch; limited: on a card of 8 GB."""
    card, sizes = work.card, work.sizes.search
    resident.cache_clear()
    card.clean()
    path = common.t5_file(card, sizes, "fp16", common.scratch(12 * 10**9 if card.cuda else 10**8))
    memory = 6 * 10**9 if card.cuda else 4 * 10**5
    with card.limited(8 * 10**9) if limited else contextlib.nullcontext():
        base = card.allocated()
        card.reset_peak()
        files = Reading([path])
        dtype = torch.float16 if card.cuda else torch.float32
        module, row, bring = streamed(path, files, dtype, str(card.device), memory // 2)
        encoder = Encoder("t5xxl", module, row, lambda prompt: [1], bring)
        meter = meter_for(work, encoder, memory // 2, True, work.sizes.prompts)
        found = timed_search(work, meter, Settings(), work.left * 0.9)
        peak = (card.peak() - base) / GB
        done = meter.forwards / max(len(row) * (len(row) + 1) / 2, 1)
        emit(what="search", name="racing, --memory 6, streamed" + (", on a card of 8 GB" if limited else ""),
             mode="streamed", **found, tflops=meter.flops() / found["seconds"] / 1e12, peak_gb=peak,
             memory_gb=memory / GB, read_gb=files.total / GB, reading_s=files.seconds, done_of_a_step=done,
             shrinks=meter.shrinks,
             targets=card.targets(target("peak, GB", peak, memory / GB, at_most=True)))  # fmt: skip


def standins_part(work: Work) -> None:
    """Stand-ins for all places of the shipped plan at 42 %."""
    card, encoder = work.card, resident(work.card, work.sizes.search)
    order = [i for i in level()[0] if i < len(encoder.row)]
    card.clean()
    memory = free_memory(card.device) // 4 if card.cuda else 1 << 28
    base = card.allocated()
    card.reset_peak()
    meter = meter_for(work, encoder, memory, False, work.sizes.fitted)
    start, done = time.monotonic(), [0.0]

    def tick(share: float) -> None:
        done[0] = share
        if work.left < 3:
            raise Enough

    found = {}
    with contextlib.suppress(Enough):
        found, _ = standin.fit(meter.calibration, assignment(order), Fitting(16 // (1 + work.rehearse)), tick=tick)
    card.sync()
    seconds = time.monotonic() - start
    peak = (card.peak() - base) / GB
    d = {}
    if found:
        scores = meter.measure([assignment(order), assignment(order, standins=found)])
        d = {"D_bare": scores[0].total, "D_repaired": scores[1].total}
    emit(what="stand-ins", name=f"{len(order)} places, {work.sizes.fitted} prompts", seconds=seconds,
         whole_s=seconds if found else seconds / max(done[0], 1e-3), ended=bool(found), peak_gb=peak,
         memory_gb=memory / GB, shrinks=meter.shrinks, **d,
         targets=card.targets(
             target("peak, of what it may take", peak * GB / memory, 1.0, at_most=True)))  # fmt: skip


def memory_part(work: Work) -> None:
    """A search on a card that is too small for what it was told it may take: it must halve, go on and find the plan."""
    card = work.card
    resident.cache_clear()
    sizes = common.T5(64, 96, 4, 16, 200, 6) if work.rehearse else common.T5(1024, 2816, 16, 64, 4000, 8)
    encoder = own_encoder(common.t5_on_card(card, sizes, torch.float16 if card.cuda else torch.float32))
    ids = common.token_ids(64 if card.cuda else 8, work.sizes.tokens, sizes.vocab)
    settings = Settings(sparsity=0.3, delta=0.0, beam=2)
    memory = 32 * 10**9 if card.cuda else 1 << 28

    def run(most: int | None) -> tuple[dict, int, int]:
        with card.limited(most) if most else contextlib.nullcontext():
            card.reset_peak()
            batches = [encoder.batch(ids)]  # one batch of all: there is something to halve
            tracer = Tracer(encoder.module, encoder.row)
            meter = Counting(Prompts(encoder.module, tracer, batches, encoder.batch([[1]]), memory))
            start = time.monotonic()
            entry = search(meter, settings)
            card.sync()
            found = {"order": entry.order, "reuse": entry.levels[-1].reuse, "D": entry.levels[-1].discrepancy}
            return {**found, "seconds": time.monotonic() - start}, meter.shrinks, card.peak()

    card.clean()
    free, shrinks, peak = run(None)
    card.clean()
    base = card.allocated()
    tight, halved, peak_tight = run(int(base + 0.4 * (peak - base))) if card.cuda else run(None)
    same = (free["order"], free["reuse"]) == (tight["order"], tight["reuse"])
    emit(what="out of memory", name="two fifths of what a search takes", shrinks_free=shrinks, shrinks=halved,
         same_plan=same, peak_gb=peak / GB, limited_peak_gb=peak_tight / GB, D=free["D"], D_limited=tight["D"],
         seconds=free["seconds"], limited_s=tight["seconds"], order=tight["order"],
         targets=card.targets(target("halvings", halved, 1, at_most=False),
                              target("same plan", float(same), 1, at_most=False)))  # fmt: skip


class Lone(int):
    """A size of one process that goes the way of several."""

    def __eq__(self, other) -> bool:
        return False

    __hash__ = int.__hash__


def nccl_part(work: Work) -> None:
    """One process through the very calls that several make, over NCCL; started anew by `torchrun`."""
    import subprocess
    import sys

    if "WORLD_SIZE" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-addr", "127.0.0.1",
                   "--master-port", "29533", str(Path(__file__).with_name("prove.py")), "--child", "nccl"]  # fmt: skip
        command += ["--rehearse"] if work.rehearse else []
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(work.left - 1, 5))
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"what"')]
        if not lines:
            raise RuntimeError(f"torchrun gave nothing: {done.stderr[-1500:]}")
        print(lines[-1], flush=True)
        return
    import torch.distributed as dist

    card = work.card
    dist.init_process_group("nccl" if card.cuda else "gloo")
    try:
        team = Team(0, Lone(1), str(card.device))
        team.agree("the same everywhere")
        sizes = common.T5(64, 96, 4, 16, 200, 4)
        encoder = own_encoder(common.t5_on_card(card, sizes, torch.float32))
        ids = common.token_ids(12, 10, sizes.vocab)
        found = {}
        for name, members in (("alone", None), ("team", team)):
            batches, tracer = batches_of(encoder, ids, 60, True), Tracer(encoder.module, encoder.row)
            prompts = Prompts(encoder.module, tracer, batches, encoder.batch([[1]]), 1 << 28)
            meter = Counting(prompts, team=members)
            found[name] = search(meter, Settings(sparsity=0.3))
        shared = card.seconds(lambda: team.shared(range(144), lambda own: torch.zeros(len(own), 9).double().numpy()))
        emit(what="nccl", name=f"one process over {dist.get_backend()}", same_plan=found["alone"] == found["team"],
             exchange_ms=shared * 1000)  # fmt: skip
    finally:
        dist.destroy_process_group()


def trained(work: Work):
    """A small T5 encoder trained for seconds to fill in masked words of captions, and captions it has not seen, as
    token ids."""
    from skrr_engine.files.folder import import_transformers
    from skrr_engine.measure.prompts import of_kind

    transformers, card = import_transformers(), work.card
    captions = [c.lower().replace(",", " ,").replace(".", " .").split() for c in of_kind("captions", 3000, 0)]
    words = {w: n + 4 for n, w in enumerate(sorted({w for c in captions for w in c}))}
    ids = [[*(words[w] for w in c[:31]), 1] for c in captions]
    config = transformers.T5Config(
        d_model=256, d_ff=512, d_kv=32, num_heads=8, num_layers=8, vocab_size=len(words) + 4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.T5EncoderModel(config).to(card.device).train()
    table = module.get_input_embeddings().weight
    torch.nn.init.normal_(table)
    held, ids = ids[:64], ids[64:]
    steps = 20 if work.rehearse else 600
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.01)
    draw, start, loss = torch.Generator().manual_seed(0), time.monotonic(), None
    with torch.enable_grad():
        for step in range(steps):
            if work.left < work.seconds * 0.5:
                break
            chosen = [ids[int(i)] for i in torch.randint(len(ids), (16 if work.rehearse else 128,), generator=draw)]
            length = max(map(len, chosen))
            given = torch.tensor([c + [0] * (length - len(c)) for c in chosen])
            hidden = (torch.rand(given.shape, generator=draw) < 0.2) & (given > 1)
            inputs = given.masked_fill(hidden, 2).to(card.device)
            out = module(input_ids=inputs, attention_mask=(inputs > 0).long()).last_hidden_state
            wanted, place = given.to(card.device), hidden.to(card.device)
            loss = torch.nn.functional.cross_entropy(out[place] @ table.T * 256**-0.5, wanted[place])
            for group in optimiser.param_groups:
                group["lr"] = 1e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimiser.step()
    told = {"loss": float(loss.detach()), "chance": math.log(len(words)), "trained_s": time.monotonic() - start}
    return module.eval().requires_grad_(False), held, told


def precision_part(work: Work) -> None:
    """Whether half precision changes a plan: searches of one trained encoder in three, each plan measured in
    float32."""
    import copy

    card = work.card
    resident.cache_clear()
    module, ids, told = trained(work)
    whole = own_encoder(module)

    def meter(encoder: Encoder, race: bool) -> Counting:
        batches = batches_of(encoder, ids, 2048 if card.cuda else 200, race)
        tracer = Tracer(encoder.module, encoder.row)
        return Counting(Prompts(encoder.module, tracer, batches, encoder.batch([[1]]), 2 * 10**9))

    truth = meter(whole, False)
    for mode, delta in MODES.items():
        found = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            encoder = whole if dtype is torch.float32 else own_encoder(copy.deepcopy(module).to(dtype))
            start = time.monotonic()
            entry = search(meter(encoder, delta > 0), Settings(delta=delta, beam=2 if work.rehearse else 3))
            level = entry.levels[-1]
            (d,) = truth.measure([assignment(entry.order, level.reuse)])
            found[str(dtype).removeprefix("torch.")] = {
                "order": entry.order, "reuse": level.reuse, "D": level.discrepancy, "D_in_float32": d.total,
                "seconds": time.monotonic() - start,
            }  # fmt: skip
        exact = found["float32"]
        for own in found.values():
            own["same_sub_blocks"] = set(own["order"]) == set(exact["order"])
            own["same_order"], own["same_reuse"] = own["order"] == exact["order"], own["reuse"] == exact["reuse"]
            own["D_beside_float32"] = own["D_in_float32"] / exact["D_in_float32"] if exact["D_in_float32"] else None
        emit(what="precision", name=f"plans of a small trained encoder, {mode}", mode=mode, **told, plans=found)


PARTS = {
    "rates": rates,
    "racing": functools.partial(search_part, mode="racing"),
    "python": profile_part,
    "exact": functools.partial(search_part, mode="exact"),
    "streamed": functools.partial(streamed_part, limited=False),
    "streamed-8gb": functools.partial(streamed_part, limited=True),
    "standins": standins_part,
    "oom": memory_part,
    "nccl": nccl_part,
    "precision": precision_part,
}
