"""The parts in the real ComfyUI: what it holds, dense and pruned, and what loading and encoding take."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from . import common
from .common import GB, ROOT, Work, emit, log, target

STUBS = ("av",)
"""Packages that ComfyUI imports at its start and no text encoder needs: too large to take along."""


class Anything(type):
    """A class with attributes of every name, classes like itself."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Stubs:
    """Import hook: modules with nothing in them, in place of STUBS that are not installed."""

    class Module(ModuleType):
        __path__: list = []

        def __getattr__(self, name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return Anything(name, (), {})

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in STUBS:
            return None
        return importlib.util.spec_from_loader(name, cls, is_package=True)

    @classmethod
    def create_module(cls, spec):
        return cls.Module(spec.name)

    @classmethod
    def exec_module(cls, module) -> None:
        return None


class Comfy:
    """ComfyUI in this process. root: its folder; cpu: whether it keeps off the GPU; dynamic: whether it has dynamic
    VRAM, as its main.py decides (None: it does not know that). Nothing may have imported torch before."""

    def __init__(self, root: Path, cpu: bool, dynamic: bool | None):
        if importlib.util.find_spec("av") is None:
            sys.meta_path.append(Stubs)
        sys.path[:0] = [str(ROOT / "tests")]
        import comfy_runtime

        comfy_runtime.install_torchvision_ops = lambda: None  # it writes into the environment, which is not ours
        self.runtime = comfy_runtime
        comfy_runtime.activate(root, Path(tempfile.mkdtemp(prefix="skrr-gpu-base-")))
        from comfy.cli_args import args

        args.cpu = cpu
        if dynamic is not None:
            args.disable_dynamic_vram = not dynamic
        self.dynamic = bool(dynamic) and not cpu and self._begin_dynamic()
        import comfy.lora
        import comfy.model_management
        import comfy.sd
        import comfy.utils
        import comfyui_version
        import folder_paths

        if self.dynamic:
            self.dynamic = self._enable_dynamic()
        self.comfy, self.version, self.folders = sys.modules["comfy"], comfyui_version.__version__, folder_paths
        self.management, self.init = comfy.model_management, comfy.sd.CLIP.__init__
        self.pack = comfy_runtime.load_pack(ROOT)

    @staticmethod
    def _begin_dynamic() -> bool:
        """The first half of what main.py does, before torch is imported."""
        import comfy_aimdo.control

        try:
            comfy_aimdo.control.init(simple_vram_headroom=None, nvml_pressure=True)
        except TypeError:  # an older comfy-aimdo
            comfy_aimdo.control.init()
        return True

    @staticmethod
    def _enable_dynamic() -> bool:
        """The second half; whether it works here."""
        import comfy.memory_management
        import comfy.model_management
        import comfy.model_patcher
        import comfy_aimdo.control

        devices = comfy.model_management.get_all_torch_devices()
        try:
            works = comfy_aimdo.control.init_devices((d.index, 0) for d in devices)
        except TypeError:
            works = comfy_aimdo.control.init_devices(d.index for d in devices)
        if works:
            comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
            comfy.memory_management.aimdo_enabled = True
        return bool(works)

    @property
    def way(self) -> str:
        """The version and its way with VRAM, for the page."""
        return f"ComfyUI {self.version}" + (", dynamic VRAM" if self.dynamic else "")

    def module(self, name: str):
        """A module of the pack, as `nodes.host.apply`."""
        return self.runtime.pack_module(self.pack, name)

    def sized(self, **configurations: dict) -> None:
        """In a rehearsal: have ComfyUI's own classes take these sizes from now on, and no others."""
        original = self.init

        def init(clip, *args, model_options=None, **kwargs):
            return original(clip, *args, model_options={**(model_options or {}), **configurations}, **kwargs)

        self.comfy.sd.CLIP.__init__ = init

    def show(self, folder: Path) -> None:
        """Let ComfyUI find the text encoders of a folder."""
        self.folders.add_model_folder_path("text_encoders", str(folder), is_default=True)
        self.folders.filename_list_cache.clear()

    def dense(self, path: Path, kind: str):
        """Load by ComfyUI's own loader."""
        return self.comfy.sd.load_clip([str(path)], clip_type=getattr(self.comfy.sd.CLIPType, kind.upper()))

    def choice(self, plan):
        return self.module("nodes.host.plans.inputs").Choice(plan, common.SPARSITY, 0.0)

    def plan(self, width: int):
        """The shipped plan, for an encoder of this width."""
        plans = self.module("skrr_engine.plan.model")
        plan = plans.Plan.read(plans.shipped()[common.PLAN])
        entry = plan.encoder("t5xxl").model_copy(update={"width": width})
        return plans.Plan(encoders={"t5xxl": entry}, provenance=plan.provenance)

    def narrowing(self, sizes: common.T5, folder: Path):
        """A plan with widths: half of most attentions' heads, a third of most feed-forwards' neurons, of both some
        whole and some gone, a stand-in at each place; its companion file goes into `folder`, which ComfyUI then
        knows."""
        import torch

        plans, companion = self.module("skrr_engine.plan.model"), self.module("skrr_engine.files.companion")
        standin = self.module("skrr_engine.encoder.standin").StandIn
        counts, draw = (sizes.heads, sizes.ffn), torch.Generator().manual_seed(4)
        left = {i: 0 if i % 12 > 9 else counts[i % 2] // (2 + i % 2) for i in range(2 * sizes.blocks) if i % 12 > 1}
        order = tuple((i, n) if n else i for i, n in left.items())
        entry = plans.EncoderPlan(
            family="t5", blocks=sizes.blocks, width=sizes.width, order=order,
            units=plans.Units(sha256="0" * 64, attention=counts[0], feed_forward=counts[1]),
            levels=(plans.Level(skipped=len(order), reuse={}, sparsity=common.SPARSITY),),
        )  # fmt: skip
        rank = max(1, sizes.heads // 4)
        shapes = ((rank, sizes.width), (sizes.width, rank), (sizes.width,))
        maps = {i: [torch.randn(shape, generator=draw) * 0.01 for shape in shapes] for i in left}
        standins = {i: standin("rms", down.half(), up.half(), bias) for i, (down, up, bias) in maps.items()}
        orders = {i: torch.randperm(counts[i % 2], generator=draw) for i, n in left.items() if n}
        plan = plans.Plan(encoders={"t5xxl": entry}, provenance=plans.Provenance(source="manual"))
        plan, data = companion.encoded(plan, {"t5xxl": {len(order): standins}}, {"t5xxl": orders})
        companion.write(folder / f"widths-{sizes.width}-{sizes.ffn}.standins.safetensors", data)
        self.folders.add_model_folder_path("skrr_plans", str(folder))
        return plan

    def pruned(self, clip, plan):
        """What Load Skrr Plan makes of a CLIP."""
        encoders, apply = self.module("nodes.host.clip.views"), self.module("nodes.host.clip.derive")
        view = encoders.views(clip)["t5xxl"]
        entry, _ = self.choice(plan).pruned("t5xxl", view, plan.encoder("t5xxl"))
        return apply.derive(clip, {"t5xxl": entry})

    def on_card(self, clip) -> None:
        self.management.load_models_gpu([clip.patcher])

    def unload(self, work: Work) -> None:
        """Everything off the card."""
        self.management.unload_all_models()
        self.management.cleanup_models()
        self.management.soft_empty_cache()
        work.card.clean()


def prompts(name: str, count: int, tokens: int, vocab: int) -> dict:
    """So many prompts of one length, as ComfyUI's tokenizers give them: one batch."""
    ids = common.token_ids(count, tokens, min(vocab, 32000))
    return {name: [[(token, 1.0) for token in own] for own in ids]}


class Bench:
    """Measures CLIPs of one encoder. base: bytes of the card in use before any was loaded."""

    def __init__(self, comfy: Comfy, work: Work, name: str, vocab: int):
        self.comfy, self.work, self.name = comfy, work, name
        self.one, self.eight = (prompts(name, count, work.sizes.tokens, vocab) for count in (1, 8))
        comfy.unload(work)
        self.base, self.tensors = work.card.used(), work.card.allocated()

    def measure(self, state: str, clip, **more) -> dict:
        """What a CLIP takes once it is loaded, and at most while it encodes; its encoding of one prompt."""
        card, line = self.work.card, {}
        if self.comfy.dynamic:  # what another CLIP left in its VRAM stays there until somebody needs the room
            self.comfy.unload(self.work)
        with card.watched() as peak:
            self.comfy.on_card(clip)
            out = clip.encode_from_tokens(self.one).float().cpu()
        line["first_peak_gb"] = self.over(peak)
        with card.watched() as peak:
            clip.encode_from_tokens(self.eight)
        line["eight_peak_gb"] = self.over(peak)
        line |= {
            "state": state, "counted_gb": clip.patcher.model_size() / GB, "loaded_gb": clip.patcher.loaded_size() / GB,
            "allocated_gb": (card.allocated() - self.tensors) / GB, "used_gb": (card.used() - self.base) / GB,
            "finite": bool(out.isfinite().all()),
        }  # fmt: skip
        return {**line, **more, "out": out}

    def over(self, peak: Mapping[str, int]) -> dict[str, float]:
        """Peaks above what was in use before."""
        return {"tensors": (peak["tensors"] - self.tensors) / GB, "card": (peak["used"] - self.base) / GB}

    def seconds(self, clip) -> dict[str, float]:
        """Medians of encoding one prompt and eight."""
        card = self.work.card
        times = 2 if card.rehearse else 10
        return {"one_s": card.seconds(lambda: clip.encode_from_tokens(self.one), times),
                "eight_s": card.seconds(lambda: clip.encode_from_tokens(self.eight), times)}  # fmt: skip


def timed(work: Work, act):
    """What `act` returns, and its seconds."""
    work.card.sync()
    start = time.perf_counter()
    out = act()
    work.card.sync()
    return out, time.perf_counter() - start


def compared(lines: list[dict]) -> None:
    """Note which of these encoded the same, to the last bit, as the line that each is `like`."""
    outs = {line["state"]: line["out"] for line in lines}
    for line in lines:
        if line.get("like") in outs:
            line["same_output"] = bool(line["out"].equal(outs[line["like"]]))


def report(comfy: Comfy, what: str, name: str, lines: list[dict], kept: float | None, **more) -> None:
    """Emit lines of one file, the dense one first. kept: the share of bytes that is left in the lines marked `left`."""
    compared(lines)
    held = "used_gb" if comfy.dynamic else "allocated_gb"
    targets, first = [], lines[0][held]
    for line in lines:
        line.pop("out")
        if kept and line.pop("left", False) and first:
            share = line[held] / first / kept
            targets.append(target(f"{line['state']}: VRAM, of the kept bytes' share", share, 1.02, at_most=True))
        if "same_output" in line:
            targets.append(target(f"{line['state']}: same output as {line['like']}", float(line["same_output"]), 1.0,
                                  at_most=False))  # fmt: skip
    emit(what=what, name=name, way=comfy.way, held=held, kept=kept, lines=lines, targets=targets, **more)


def lora_on(comfy: Comfy, clip, work: Work):
    """The CLIP with a random LoRA of rank 4 on attention and feed-forward of some blocks, kept and removed ones."""
    import torch

    draw, lora = torch.Generator().manual_seed(3), {}
    state = clip.cond_stage_model.state_dict()
    for name, key in comfy.comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}).items():
        if name.startswith("text_encoders.") and any(f"block.{b}." in key for b in (1, 2, 8)) and state[key].ndim == 2:
            out, into = state[key].shape
            lora[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=draw) * 0.02
            lora[f"{name}.lora_down.weight"] = torch.randn(4, into, generator=draw) * into**-0.5
    return comfy.comfy.sd.load_lora_for_models(None, clip, lora, 1.0, 1.0)[1]


def t5_part(work: Work, comfy: Comfy, kind: str, lora: bool = False, widths: bool = False) -> None:
    """T5-XXL: dense, by Load Skrr Plan, dense again, with a LoRA, and by Load CLIP (Skrr). widths: with a plan that
    narrows, not the shipped one."""
    card, sizes = work.card, work.sizes.t5
    path = common.t5_file(card, sizes, kind, common.scratch(12 * 10**9 if card.cuda else 5 * 10**7))
    if work.rehearse:
        comfy.sized(t5xxl_model_config=sizes.config)
    comfy.show(path.parent)
    plan = comfy.narrowing(sizes, path.parent) if widths else comfy.plan(sizes.width)
    with open(path, "rb") as file:  # warm, as the second time a workflow runs
        while file.read(1 << 26):
            pass
    bench = Bench(comfy, work, "t5xxl", sizes.vocab)

    def load_dense():
        clip = comfy.dense(path, "mochi")
        comfy.on_card(clip)
        return clip

    with card.watched() as peak:
        clip, load_s = timed(work, load_dense)
    lines = [bench.measure("dense", clip, load_peak_gb=bench.over(peak), load_s=load_s)]
    lines[0] |= bench.seconds(clip)
    small, apply_s = timed(work, functools.partial(comfy.pruned, clip, plan))
    lines.append(bench.measure("plan", small, apply_s=apply_s, left=True))
    lines[-1] |= bench.seconds(small)
    lines.append(bench.measure("dense again", clip, like="dense"))
    if lora:
        with_lora = lora_on(comfy, clip, work)
        both = comfy.pruned(with_lora, plan)
        lines.append(bench.measure("dense, LoRA", with_lora))
        lines.append(bench.measure("plan, LoRA", both, left=True))
        lines.append(bench.measure("dense after LoRA", clip, like="dense"))
        lines.append(bench.measure("plan after LoRA", small, like="plan", left=True))
        del with_lora, both
    seen = comfy.module("nodes.host.clip.views")
    pruning, views = seen.pruning(small), seen.views(clip)
    shape, entry = views["t5xxl"].shape, pruning["t5xxl"]
    shares = entry.shares
    kept = 1 - (shape.bytes_of(shares) - entry.standin_bytes) / shape.total_bytes
    lost = sum(shape.parameter_counts[i] * (1 - shares[i]) for i, by in entry.removed.items() if by.through(i) is None)
    work_kept = 1 - float(lost) / sum(shape.parameter_counts)
    del clip, small, pruning, views, entry
    comfy.unload(work)
    left_behind = (card.allocated() - bench.tensors) / GB

    def load_pruned():
        clip = comfy.module("nodes.host.files.load").load([path.name], "mochi", comfy.choice(plan))
        comfy.on_card(clip)
        return clip

    with card.watched() as peak:
        loaded, load_s = timed(work, load_pruned)
    loaded_line = bench.measure("loaded pruned", loaded, load_peak_gb=bench.over(peak), load_s=load_s, like="plan",
                                left=True)  # fmt: skip
    lines.append(loaded_line | bench.seconds(loaded))
    del loaded
    comfy.unload(work)
    by = {line["state"]: line for line in lines}
    dense = by["dense"]
    times = {
        state: {key: by[state][key] / dense[key] for key in ("load_s", "one_s", "eight_s") if key in by[state]}
        for state in ("plan", "loaded pruned")
    }
    name = f"T5-XXL {kind}" + (", widths" if widths else "")
    report(comfy, "memory", name, lines, kept, left_behind_gb=left_behind, file_gb=path.stat().st_size / GB)
    emit(what="time", name=name, way=comfy.way, kept_bytes=kept, kept_work=work_kept, apply_s=apply_s,
         dense={key: dense[key] for key in ("load_s", "one_s", "eight_s")}, ratios=times,
         targets=card.targets(
             target("encoding 8 prompts, of the kept work's share", times["loaded pruned"]["eight_s"] / work_kept, 1.1,
                    at_most=True)))  # fmt: skip


def widths_part(work: Work, comfy: Comfy) -> None:
    """T5-XXL with widths; and a small narrowed T5 on the card beside the same on the CPU, both in float32."""
    import torch

    t5_part(work, comfy, "fp16", widths=True)
    card, sizes, init = work.card, common.SMALL["old"], comfy.comfy.sd.CLIP.__init__
    path = common.t5_file(card, sizes, "fp16", common.scratch(5 * 10**7))
    plan, given = comfy.narrowing(sizes, path.parent), prompts("t5xxl", 4, work.sizes.tokens, sizes.vocab)
    comfy.sized(t5xxl_model_config=sizes.config)
    try:
        outs = []
        for device in (card.device, torch.device("cpu")):
            options = {"load_device": device, "offload_device": torch.device("cpu"), "dtype": torch.float32}
            kind = comfy.comfy.sd.CLIPType.MOCHI
            clip = comfy.comfy.sd.load_clip([str(path)], clip_type=kind, model_options=options)
            outs += [c.encode_from_tokens(given).float().cpu() for c in (clip, comfy.pruned(clip, plan))]
    finally:
        comfy.comfy.sd.CLIP.__init__ = init
    dense, small, _, wanted = outs
    off, changed = (float((a - b).norm() / b.norm()) for a, b in ((small, wanted), (small, dense)))
    emit(what="widths", name="a narrowed T5 on the card and on the CPU, float32", off=off, changed=changed,
         targets=[target("relative distance to the CPU's", off, 1e-3, at_most=True)])  # fmt: skip


def crowded_part(work: Work, comfy: Comfy, kind: str = "fp16") -> None:
    """The same where the card holds something else, so that ComfyUI can load the dense encoder only in part."""
    card, sizes = work.card, work.sizes.t5
    path = common.t5_file(card, sizes, kind, common.scratch(12 * 10**9 if card.cuda else 5 * 10**7))
    if work.rehearse:
        comfy.sized(t5xxl_model_config=sizes.config)
    comfy.show(path.parent)
    plan = comfy.plan(sizes.width)
    comfy.unload(work)
    leave = int(path.stat().st_size * 0.8 + 1.2e9)
    with card.crowded(leave):
        bench = Bench(comfy, work, "t5xxl", sizes.vocab)
        clip = comfy.dense(path, "mochi")
        lines = [bench.measure("dense, in part", clip)]
        lines[0] |= bench.seconds(clip)
        small = comfy.pruned(clip, plan)
        lines.append(bench.measure("plan, in part", small))
        lines[-1] |= bench.seconds(small)
        lines.append(bench.measure("dense again, in part", clip, like="dense, in part"))
        del clip, small
        comfy.unload(work)
        loaded = comfy.module("nodes.host.files.load").load([path.name], "mochi", comfy.choice(plan))
        lines.append(bench.measure("loaded pruned, in part", loaded, like="plan, in part"))
        lines[-1] |= bench.seconds(loaded)
        del loaded
        comfy.unload(work)
    report(comfy, "memory", f"T5-XXL {kind}, {leave / GB:.1f} GB free", lines, None, free_gb=leave / GB)


def nodes_search_part(work: Work, comfy: Comfy) -> None:
    """A search by Skrr Prune's own code, in ComfyUI's classes: a whole one of a small encoder, so that all of it runs
    on the card once; then the pace of a first removal of T5-XXL, in the float32 that ComfyUI computes text encoders
    in."""
    import torch

    module, card = comfy.module, work.card
    comfy.sized()
    builders = comfy.runtime.pack_module(comfy.runtime.load_pack(ROOT / "tests" / "comfy_nodes"), "builders")
    host, engine = module("nodes.host.search"), module("skrr_engine.search.settings")
    views = module("nodes.host.clip.views").views
    texts = module("skrr_engine.measure.prompts").of_kind("captions", 24 if card.cuda else 10, 0)
    clip = builders.flux(layers=5)
    settings = engine.Settings(sparsity=0.05, beam=2)
    plan, seconds = timed(
        work, lambda: host.find_plan(clip, None, views(clip)["t5xxl"], settings, texts, "gpu-proof", None)
    )
    level = plan.encoder("t5xxl").levels[-1]
    emit(what="node", name="Skrr Prune on a small T5", way=comfy.way, seconds=seconds, skipped=level.skipped,
         D=level.discrepancy, device=str(clip.patcher.load_device))  # fmt: skip
    if work.rehearse or work.left < 25:
        return
    path = common.t5_file(card, work.sizes.t5, "fp16", common.scratch(12 * 10**9))
    clip = comfy.dense(path, "mochi")
    conditioning = module("nodes.host.clip.prompts").Conditioning(clip, views(clip)["t5xxl"]).load()
    row, budget = views(clip)["t5xxl"].row, module("skrr_engine.memory")
    tracer = module("skrr_engine.encoder.trace").Tracer(conditioning.encoder, row, "transformer.")
    memory = int(comfy.management.get_free_memory(card.device) * 9 // 10)
    batches = conditioning.batches(texts * 2, budget.batch_tokens(memory, row.width, card.device), True)
    prompts = module("skrr_engine.measure.calibration").Calibration(
        conditioning.encoder, tracer, batches, conditioning.null(), memory
    )
    meter = module("skrr_engine.measure.meter").Meter(prompts)
    skip = module("skrr_engine.encoder.actions").SKIP
    candidates = [{i: skip} for i in range(len(row))]
    start, limit = time.monotonic(), work.left - 5

    class Enough(Exception):
        pass

    def tick(share: float) -> None:
        if time.monotonic() - start > limit:
            raise Enough

    with contextlib.suppress(Enough):
        meter.lowest(candidates, 3, 0.05, tick=tick)
    card.sync()
    seconds = time.monotonic() - start
    tokens = sum(meter._tokens)
    flops = meter.spent * tokens * 2 * sum(row.parameter_counts) / len(row)
    a = torch.randn(2048, 4096, device=card.device)
    w = torch.randn(10240, 4096, device=card.device)
    rate = 2 * 2048 * 4096 * 10240 / card.seconds(lambda: torch.nn.functional.linear(a, w), 5)
    emit(what="node", name="a first removal of T5-XXL in ComfyUI's classes", way=comfy.way, seconds=seconds,
         tokens=tokens, tflops=flops / seconds / 1e12, gemm_fp32_tflops=rate / 1e12,
         gemm_share=flops / seconds / rate)  # fmt: skip


QWEN3_8B = {"hidden": 4096, "ffn": 12288, "heads": 32, "kv": 8, "head": 128, "vocab": 151936, "blocks": 36}


def qwen3_shapes(sizes: dict) -> dict[str, tuple[int, ...]]:
    """The tensors of a Qwen3 file."""
    hidden, head = sizes["hidden"], sizes["head"]
    found = {"model.embed_tokens.weight": (sizes["vocab"], hidden), "model.norm.weight": (hidden,),
             "lm_head.weight": (sizes["vocab"], hidden)}  # fmt: skip
    for block in range(sizes["blocks"]):
        at = f"model.layers.{block}."
        found |= {f"{at}{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{at}self_attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
        found[f"{at}self_attn.q_proj.weight"] = (sizes["heads"] * head, hidden)
        found |= {f"{at}self_attn.{name}.weight": (sizes["kv"] * head, hidden) for name in ("k_proj", "v_proj")}
        found[f"{at}self_attn.o_proj.weight"] = (hidden, sizes["heads"] * head)
        found |= {f"{at}mlp.{name}.weight": (sizes["ffn"], hidden) for name in ("gate_proj", "up_proj")}
        found[f"{at}mlp.down_proj.weight"] = (hidden, sizes["ffn"])
    return found


def klein_part(work: Work, comfy: Comfy) -> None:
    """Qwen3-8B as Flux.2 Klein reads it: 9 of its 36 blocks are never read."""
    import torch

    from skrr_engine.disk.safetensors import Entry, write

    card = work.card
    small = {**QWEN3_8B, "ffn": 16, "heads": 2, "kv": 1}
    sizes = small if work.rehearse else QWEN3_8B
    if work.rehearse:
        narrow = {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
        comfy.sized(qwen3_8b_model_config=narrow)
    folder = common.scratch(18 * 10**9 if card.cuda else 3 * 10**9)
    for old in folder.rglob("t5xxl_*fp8.safetensors"):
        old.unlink()
    path, shapes = folder / "qwen3_8b.safetensors", qwen3_shapes(sizes)
    draw = torch.Generator(card.device).manual_seed(0)
    with open(path, "wb") as file:
        file.write(write({key: Entry("BF16", shape) for key, shape in shapes.items()}, {"format": "pt"}))
        for shape in shapes.values():
            t = torch.ones(shape, device=card.device, dtype=torch.bfloat16)
            if len(shape) == 2:
                t.normal_(generator=draw).mul_(shape[-1] ** -0.5)
            file.write(common.raw(t))
    comfy.show(folder)
    bench = Bench(comfy, work, "qwen3_8b", sizes["vocab"])
    clip, load_s = timed(work, lambda: comfy.dense(path, "flux2"))
    lines = [bench.measure("dense", clip, load_s=load_s)]
    lines[0] |= bench.seconds(clip)
    del clip
    comfy.unload(work)
    choice = comfy.module("nodes.host.plans.inputs").Choice(None, 1.0, 0.0)
    clip, load_s = timed(work, lambda: comfy.module("nodes.host.files.load").load([path.name], "flux2", choice))
    lines.append(bench.measure("loaded trimmed", clip, load_s=load_s, like="dense", left=True))
    lines[-1] |= bench.seconds(clip)
    entry = comfy.module("nodes.host.clip.views").pruning(clip)["qwen3_8b"]
    kept = 1 - entry.shape.bytes_of(entry.unread) / entry.shape.total_bytes
    del clip
    comfy.unload(work)
    path.unlink()
    report(comfy, "memory", "Qwen3-8B for Flux.2 Klein", lines, kept, unread=len(entry.unread))


PARTS = {
    "fp16": functools.partial(t5_part, kind="fp16", lora=True),
    "fp8": functools.partial(t5_part, kind="fp8"),
    "scaled-fp8": functools.partial(t5_part, kind="scaled_fp8"),
    "widths": widths_part,
    "in-part": crowded_part,
    "nodes": nodes_search_part,
    "klein": klein_part,
}


def begin(root: str, cpu: bool, dynamic: bool | None) -> Comfy:
    """ComfyUI for the parts of one process."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.getLogger().setLevel(logging.WARNING)
    comfy = Comfy(Path(root), cpu, dynamic)
    log(f"{comfy.way} is up")
    return comfy
