"""Narrowed sub-blocks in files: every family, every precision, against the dense file's own rows and columns."""

import json
import re
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file, save, save_file

import skrr_engine
from skrr_engine.cli.parser import main
from skrr_engine.encoder import families
from skrr_engine.encoder.row import EncoderError
from skrr_engine.encoder.standin import StandIn
from skrr_engine.encoder.units import units_of
from skrr_engine.errors import SkrrError
from skrr_engine.files import companion, encoder_file
from skrr_engine.files.companion import Fitted, StandInError
from skrr_engine.files.encoder_file import Checkpoint, CheckpointError
from skrr_engine.files.narrow import Piece, check, narrowing
from skrr_engine.files.pruned import verify, write_pruned
from skrr_engine.plan.model import EncoderPlan, Level, Plan, Provenance, StandIns, Units
from skrr_engine.plan.text import PlanError
from skrr_engine.plan.words import describe_plan

PREFIX = {"t5gemma": "model.encoder.", "clip": "text_model.", "llama": "model.", "gemma": "model."}
"""What ComfyUI's names begin with and transformers' do not."""
INS = r"(q|k|v|wi_0|wi_1|wi|q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)"
OUTS = r"(o|wo|o_proj|down_proj|out_proj|fc2)"
NEURONS, WIDTH = 64, 32


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def heads(name: str) -> int:
    return 4 if small.family_of(name) in ("t5", "clip") else 2


def tensors_of(name: str, module=None) -> dict[str, torch.Tensor]:
    """A small encoder's tensors as ComfyUI's files name them."""
    prefix = PREFIX.get(small.family_of(name), "")
    state = (small.build(name) if module is None else module).state_dict()
    named = {k if k.startswith(prefix) else prefix + k: t for k, t in state.items()}
    return {k: t.clone() for k, t in named.items() if k != "encoder.embed_tokens.weight"}


def place_of(name: str, key: str) -> int | None:
    """The sub-block of a tensor, by eye."""
    found = re.search(r"(?:block|layers)\.(\d+)\.(.+)", key)
    if found is None or (name == "t5" and "relative_attention_bias" in key):
        return None
    inner = found[2]
    second = r"layer\.1|mlp|layer_norm2|(pre|post)_feedforward_layernorm"
    second += "" if small.family_of(name) == "gemma" else "|post_attention_layernorm"
    return 2 * int(found[1]) + bool(re.match(second, inner))


def make_plan(name: str, entry_name: str = "enc") -> tuple[Plan, bytes, dict[int, torch.Tensor]]:
    """A plan that narrows attentions and feed-forwards in two steps, removes some, and re-uses and repairs, at two
    levels; its companion's bytes; the orders of its units."""
    few = heads(name)
    generator = torch.Generator().manual_seed(3)
    units = Units(sha256="0" * 64, attention=few, feed_forward=NEURONS)
    order = ((1, 40), (0, few - 1), 5, (3, 17), (1, 1), 2, (6, 1))
    orders = {place: torch.randperm(units.of(place), generator=generator) for place in (0, 1, 3, 6)}
    levels = (
        Level(skipped=3, reuse={5: 7}, sparsity=0.05),
        Level(skipped=7, reuse={5: 7}, sparsity=0.2),
    )
    entry = EncoderPlan(
        family=small.family_of(name), blocks=4, width=WIDTH, order=order, levels=levels, units=units
    )  # fmt: skip
    norm = families.by_name(small.family_of(name)).norm
    noise = lambda *shape: torch.randn(shape, generator=generator) * 0.1  # noqa: E731
    standins = {
        n: {place: StandIn(norm, noise(3, WIDTH).half(), noise(WIDTH, 3).half(), noise(WIDTH)) for place in places}
        for n, places in ((3, (0, 1)), (7, (1, 2, 3)))
    }
    plan = Plan(encoders={entry_name: entry}, provenance=Provenance(source="test"))
    plan, data = companion.encoded(plan, {entry_name: standins}, {entry_name: orders})
    return plan, data, orders


def written(folder: Path, name: str) -> tuple[Path, Plan, dict[int, torch.Tensor]]:
    """The plan and its companion as files."""
    plan, data, orders = make_plan(name)
    path = folder / "plan.json"
    plan.write(path)
    companion.write(companion.beside(path), data)
    return path, plan, orders


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes."""
    return tensor.contiguous().flatten().view(torch.uint8)


def kept_rows(units: torch.Tensor, length: int, count: int) -> torch.Tensor:
    return torch.tensor([u * (length // count) + i for u in sorted(units.tolist()) for i in range(length // count)])


def by_hand(name: str, dense: dict, plan: Plan, orders: dict, skipped: int, whole=lambda layer: False) -> dict:
    """What a pruned file must hold of the dense tensors: bytes of each, and shapes."""
    entry = plan.encoder("enc")
    left = entry.left(skipped)
    found = {}
    for key, tensor in dense.items():
        place = place_of(name, key)
        if left.get(place) == 0:
            continue
        layer, _, kind = key.rpartition(".")
        if place in left and not whole(layer):
            count = entry.units.of(place)
            units = orders[place][: left[place]]
            inward, outward = re.search(rf"\.{INS}$", layer), re.search(rf"\.{OUTS}$", layer)
            plain = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
            if inward and kind in ("weight", "bias", "weight_scale"):
                tensor = plain[kept_rows(units, len(plain), count)].view(tensor.dtype)
            elif outward and kind == "weight":
                columns = kept_rows(units, plain.shape[1], count)
                tensor = torch.stack([plain[:, c] for c in columns], dim=1).view(tensor.dtype)
        found[key] = tensor
    return found


def assert_same(got: dict, wanted: dict) -> None:
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert got[key].dtype == tensor.dtype and got[key].shape == tensor.shape, key
        assert torch.equal(raw(got[key]), raw(tensor)), f"{key} is not bit for bit"


def quantise(tensors: dict, form: str) -> dict:
    """Every projection of the blocks in a form, as files hold it."""
    found = {}
    for key, t in tensors.items():
        layer = key.removesuffix(".weight")
        if not (key.endswith(".weight") and re.search(rf"\.({INS}|{OUTS})$", layer)):
            found[key] = t.half() if form not in ("float32", "float16", "bfloat16") else t.to(getattr(torch, form))
            continue
        marker = lambda **say: torch.tensor(list(json.dumps(say).encode()), dtype=torch.uint8)  # noqa: E731
        if form in ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
            found[key] = t.to(getattr(torch, form))
        elif form == "scaled_fp8":
            scale = t.abs().max() / 448
            found[key], found[f"{layer}.scale_weight"] = (t / scale).to(torch.float8_e4m3fn), scale.reshape(())
        elif form.startswith("int8"):
            scale = t.abs().amax(dim=1, keepdim=True) / 127
            found[key], found[f"{layer}.weight_scale"] = (t / scale).round().to(torch.int8), scale
            rotated = {"convrot": True, "convrot_groupsize": 16} if form == "int8_rotated" else {}
            found[f"{layer}.comfy_quant"] = marker(format="int8_tensorwise", **rotated)
        elif form == "nvfp4":
            found[key] = torch.randint(0, 256, (t.shape[0], t.shape[1] // 2), dtype=torch.uint8)
            found[f"{layer}.weight_scale"] = torch.rand(t.shape[0], t.shape[1] // 16).to(torch.float8_e4m3fn)
            found[f"{layer}.weight_scale_2"] = torch.rand(())
            found[f"{layer}.comfy_quant"] = marker(format="nvfp4")
        elif form == "mxfp8":
            found[key] = t.to(torch.float8_e4m3fn)
            found[f"{layer}.weight_scale"] = torch.randint(0, 9, (t.shape[0], t.shape[1] // 32), dtype=torch.uint8)
            found[f"{layer}.comfy_quant"] = marker(format="mxfp8")
    return {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn), **found} if form == "scaled_fp8" else found


WHOLE = {
    "nvfp4": lambda layer: True,
    "mxfp8": lambda layer: True,
    "int8_rotated": lambda layer: bool(re.search(rf"\.{OUTS}$", layer)),
}
FORMS = [
    "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "scaled_fp8", "int8", "int8_rotated", "nvfp4",
    "mxfp8",
]  # fmt: skip
CASES = [*(("t5", form) for form in FORMS), *((name, form) for name in small.NARROWED for form in ("float16", "int8"))]


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize(("name", "form"), dict.fromkeys(CASES))
def test_apply(tmp_path, capsys, name, form, level):
    """What stays is bit for bit the dense file's rows and columns; sizes are those that are told; it is found whole."""
    path, plan, orders = written(tmp_path, name)
    dense = quantise(tensors_of(name), form)
    source, out = tmp_path / "dense.safetensors", tmp_path / "pruned.safetensors"
    save_file({k: t.contiguous() for k, t in dense.items()}, source)
    entry = plan.encoder("enc")
    chosen = entry.levels[level]
    options = ["--plan", str(path), "--encoder", str(source), "--out", str(out), "--sparsity", str(chosen.sparsity)]
    assert main(["apply", *options]) == 0 and main(["verify", str(out)]) == 0
    told = capsys.readouterr().out
    wanted = by_hand(name, dense, plan, orders, chosen.skipped, WHOLE.get(form, lambda layer: False))
    got = load_file(out)
    companions = {key: t for key, t in got.items() if key.startswith(encoder_file.STANDINS)}
    assert_same({key: t for key, t in got.items() if key not in companions}, wanted)

    narrowed = entry.narrowed(chosen)
    fitted, _ = companion.of_level([tmp_path], "enc", entry, chosen)
    assert ("projections of narrowed sub-blocks can't be cut" in told) == (form in WHOLE)
    assert f"{len(narrowed)} narrowed" in told and fitted.units.keys() == narrowed.keys()
    layout, opened = Checkpoint(source).layout, Checkpoint(out)
    size = int.from_bytes(out.read_bytes()[:8], "little")
    left = layout.total_bytes - layout.bytes_of(entry.shares(chosen))
    more = chosen.standin_bytes(WIDTH) + sum(4 * entry.units.of(place) for place in narrowed)
    assert out.stat().st_size == 8 + size + left + more
    assert sum(t.nbytes for t in companions.values()) == more

    for key, tensor in dense.items():
        assert opened.entries[key].shape == tuple(tensor.shape), "a pruned file shows the dense encoder's shapes"
        if key in wanted:
            assert torch.equal(raw(opened.tensor(key)), raw(wanted[key])) and opened.entries[key].kept
            assert opened.stored(key).shape == tuple(wanted[key].shape)
    assert opened.layout.total_bytes == layout.total_bytes
    assert all(opened.layout.unit_bytes[place] == layout.unit_bytes[place] for place in narrowed)
    assert set(opened.record.narrowed) == {k for k in wanted if wanted[k].shape != dense[k].shape}
    again = opened.fitted
    assert all(torch.equal(again.units[place], orders[place]) for place in narrowed)
    assert all(torch.equal(again.standins[p].down, s.down) for p, s in fitted.standins.items())


@pytest.mark.parametrize("name", small.NARROWED)
def test_a_file_holds_what_an_encoder_in_memory_does(tmp_path, name):
    """The verbs: what a pruned encoder's state dict holds is what the pruned file does."""
    _, plan, _ = written(tmp_path, name)
    entry = plan.encoder("enc")
    fitted, _ = companion.of_level([tmp_path], "enc", entry, entry.levels[-1])
    module = small.build(name)
    source, out = tmp_path / "dense.safetensors", tmp_path / "pruned.safetensors"
    save_file(tensors_of(name), source)
    assert skrr_engine.write_pruned(source, out, plan, fitted=fitted) == out.stat().st_size
    assert skrr_engine.prune(module, plan, fitted=fitted) is module
    left = {key: t for key, t in tensors_of(name, module).items() if "standin" not in key}
    assert_same({key: t for key, t in load_file(out).items() if not key.startswith(encoder_file.STANDINS)}, left)
    for act in (lambda **more: skrr_engine.prune(small.build(name), plan, **more),
                lambda **more: skrr_engine.write_pruned(source, tmp_path / "never", plan, **more)):  # fmt: skip
        with pytest.raises(EncoderError, match="narrows sub-blocks: give its companion file's content"):
            act()
    with pytest.raises(CheckpointError, match="stand-ins of other places than the level's"):
        skrr_engine.write_pruned(source, tmp_path / "never", plan, fitted=Fitted(units=fitted.units))
    assert not (tmp_path / "never").exists()


# What is read


class Counting:
    """A file whose reads are counted."""

    def __init__(self, file):
        self.file, self.spans, self.at = file, [], 0

    def seek(self, at):
        self.at = at
        return self.file.seek(at)

    def readinto(self, view):
        got = self.file.readinto(view)
        self.spans.append((self.at, got))
        self.at += got
        return got

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize(("columns", "apart"), [(20_000, True), (64, False)])
def test_rows_alone_are_read(tmp_path, columns, apart):
    """Of wide rows only those that stay; narrow ones in one go with what lies between, but not beyond the last one."""
    tensor = torch.randn(64, columns, dtype=torch.float16)
    save_file({"a.weight": tensor}, tmp_path / "x.safetensors")
    source = Checkpoint(tmp_path / "x.safetensors")
    source._file = counted = Counting(source._file)
    index = torch.tensor([3, 4, 9, 30, 31, 32, 50])
    got = source.piece("a.weight", Piece(index, 0, header_entry(tensor[index])))
    assert torch.equal(raw(got), raw(tensor[index]))
    read, row, start = sum(count for _, count in counted.spans), 2 * columns, source.start("a.weight")
    assert read == row * (7 if apart else 48) and len(counted.spans) == (4 if apart else 1)
    assert min(at for at, _ in counted.spans) == start + 3 * row


def header_entry(tensor: torch.Tensor):
    return encoder_file.Entry({torch.float16: "F16", torch.uint8: "U8"}[tensor.dtype], tuple(tensor.shape))


@pytest.mark.parametrize("seed", range(6))
def test_any_rows(tmp_path, monkeypatch, seed):
    """Of every share, at every gap, in pieces of every size."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(0, 256, (997, 24), generator=generator, dtype=torch.uint8)
    save_file({"b": torch.zeros(5), "a": tensor, "c": torch.ones(7)}, tmp_path / "x.safetensors")
    source = Checkpoint(tmp_path / "x.safetensors")
    for gap in (0, 24, 100, 5000):
        for at_once in (1, 100, 1000, 1 << 20):
            monkeypatch.setattr(encoder_file, "GAP", gap)
            monkeypatch.setattr(encoder_file, "AT_ONCE", at_once)
            count = int(torch.randint(1, 998, (), generator=generator))
            index = torch.randperm(997, generator=generator)[:count].sort().values
            assert torch.equal(source.piece("a", Piece(index, 0, header_entry(tensor[index]))), tensor[index])


def test_apply_reads_rows_of_in_projections(tmp_path, monkeypatch):
    """Of the bytes of what is narrowed, in-projections give only what stays, and nothing of what is removed is read."""
    monkeypatch.setattr(encoder_file, "GAP", 0)
    _, plan, orders = written(tmp_path, "t5")
    dense = tensors_of("t5")
    save_file(dense, tmp_path / "dense.safetensors")
    source = Checkpoint(tmp_path / "dense.safetensors")
    layout, entry = source.layout, plan.encoder("enc")
    level = entry.levels[-1]
    fitted, _ = companion.of_level([tmp_path], "enc", entry, level)
    monkeypatch.setattr(source, "sha256", lambda: "0" * 64)
    source._file = counted = Counting(source._file)
    write_pruned(source, tmp_path / "out.safetensors", "enc", plan, level.skipped, fitted=fitted)
    stays = by_hand("t5", dense, plan, orders, level.skipped)
    outs = [key for key in stays if re.search(rf"\.{OUTS}\.weight$", key)]
    assert sum(count for _, count in counted.spans) == sum(
        dense[key].nbytes if key in outs else tensor.nbytes for key, tensor in stays.items()
    )
    gone = [(source.start(key), dense[key].nbytes) for key in layout.dropped((2, 5))]
    assert not any(at < start + size and start < at + got for start, size in gone for at, got in counted.spans)


# What does not fit


def units_changed(plan: Plan, **units) -> Plan:
    """The plan with other numbers of units; its order stays possible."""
    entry = plan.encoder("enc")
    made = EncoderPlan(**{**dict(entry), "units": entry.units.model_copy(update=units)})
    return plan.model_copy(update={"encoders": {"enc": made}})


@pytest.mark.parametrize(
    ("name", "units", "words"),
    [
        ("t5", {"attention": 8}, r"expected units.attention 8, found 4 at sub-block 0 of the encoder 'enc'; choose a"),
        ("umt5", {"attention": 16}, r"expected units.attention 16, found 4 at sub-block 0"),
        ("qwen3", {"attention": 4}, r"expected units.attention 4, found 2 at sub-block 0"),
        ("gemma3", {"attention": 16}, r"expected units.attention 16, found 2 at sub-block 0"),
        ("clip", {"attention": 5}, r"expected units.attention 5, found (4|a projection of length 32) at sub-block 0"),
        ("llama", {"attention": 3}, r"expected units.attention 3, found (2|a projection of length \d+) at sub-block 0"),
        ("t5", {"feed_forward": 128}, r"expected units.feed_forward 128, found 64 at sub-block 1"),
        ("llama", {"feed_forward": 61}, r"expected units.feed_forward 61, found 64 at sub-block 1"),
        ("gemma2", {"feed_forward": 10240}, r"expected units.feed_forward 10240, found 64 at sub-block 1"),
    ],
)
def test_units_of_another_encoder(tmp_path, capsys, name, units, words):
    """A plan for another number of units is refused, for encoders in memory and in files, and nothing is changed."""
    path, plan, _ = written(tmp_path, name)
    plan = units_changed(plan, **units)
    plan.write(path)
    module, source = small.build(name), tmp_path / "dense.safetensors"
    save_file(tensors_of(name), source)
    before, state = list(module.modules()), {k: t.clone() for k, t in module.state_dict().items()}
    some = Fitted(units={p: torch.arange(plan.encoder("enc").units.of(p)) for p in (0, 1, 3, 6)})
    row, layout = families.find(module), Checkpoint(source).layout
    for act in [
        lambda: check(row, plan.encoder("enc"), "enc"),
        lambda: check(layout, plan.encoder("enc"), "enc"),
        lambda: skrr_engine.prune(module, plan, fitted=some),
        lambda: skrr_engine.write_pruned(source, tmp_path / "out", plan, fitted=some),
        lambda: write_pruned(Checkpoint(source), tmp_path / "out", "enc", plan, 7, fitted=some),
    ]:
        with pytest.raises(PlanError, match=words) as caught:
            act()
        assert "\n" not in str(caught.value) and str(caught.value).endswith("choose a plan made for this encoder")
    assert main(["apply", "--plan", str(path), "--encoder", str(source), "--out", str(tmp_path / "out")]) == 1
    assert re.search(words, capsys.readouterr().err) and not (tmp_path / "out").exists()
    assert list(module.modules()) == before
    assert all(torch.equal(t, state[k]) for k, t in module.state_dict().items())
    with pytest.raises(PlanError, match="choose a plan made for this encoder"):
        narrowing(layout, plan.encoder("enc"), plan.encoder("enc").levels[0], some.units)


def test_units_of_what_goes_in_the_end(tmp_path):
    """A sub-block that is narrowed first and removed later is looked at, too."""
    units = Units(sha256="0" * 64, attention=8, feed_forward=NEURONS)
    level = Level(skipped=1, reuse={}, sparsity=0.1)
    entry = EncoderPlan(family="t5", blocks=4, width=WIDTH, order=((2, 5), 2), units=units, levels=(level,))
    for shape in (families.find(small.build("t5")), Layouts.of("t5")):
        with pytest.raises(PlanError, match="expected units.attention 8, found 4 at sub-block 2"):
            check(shape, entry, "enc")


def test_heads_that_a_file_leaves_open():
    """CLIP's and Llama's files don't say how many heads they have; modules do."""
    for name in ("clip", "llama", "mistral", "qwen2", "gemma2"):
        assert Layouts.of(name).heads(0) is None
    for name in ("t5", "umt5", "qwen3", "gemma3"):
        row = families.find(small.build(name))
        assert [Layouts.of(name).heads(block) for block in range(4)] == [units_of(row, 2 * b).count for b in range(4)]


class Layouts:
    """Layouts of small encoders, without a file."""

    @staticmethod
    def of(name: str):
        from skrr_engine.files.layout import layout_of

        entries = {
            key: encoder_file.Entry("F32", tuple(tensor.shape)) for key, tensor in tensors_of(name).items()
        }  # fmt: skip
        return layout_of(entries)


def test_companion_missing(tmp_path, capsys):
    """A plan of widths is nothing without its companion: no file is written, and one line says what to do."""
    path, _, _ = written(tmp_path, "t5")
    companion.beside(path).unlink()
    save_file(tensors_of("t5"), tmp_path / "dense.safetensors")
    arguments = ["--plan", str(path), "--encoder", str(tmp_path / "dense.safetensors")]
    assert main(["apply", *arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "units and stand-ins (*.standins.safetensors) is missing" in error and error.count("\n") == 1
    assert "put the file beside the plan" in error and not (tmp_path / "out").exists()


# Companions from strangers


def changed_companion(folder: Path, change) -> tuple[EncoderPlan, Level, Path]:
    """A companion whose tensors `change` has changed, under its right hash."""
    path, plan, _ = written(folder, "t5")
    file = companion.beside(path)
    tensors = load_file(file)
    change(tensors)
    data = save(tensors, {"format": "skrr-standins", "version": "2", "norms": "enc:rms"})
    file.write_bytes(data)
    entry = plan.encoder("enc")
    digest = companion.sha256(file)
    levels = tuple(
        level.model_copy(update={"standins": StandIns(sha256=digest, ranks=level.standins.ranks)})
        for level in entry.levels
    )
    entry = entry.model_copy(
        update={"levels": levels, "units": entry.units.model_copy(update={"sha256": digest})}
    )  # fmt: skip
    return entry, entry.levels[-1], file


ONE = "enc.units.1"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(ONE), r"enc.units.1: expected torch.int32 \[64\], found missing"),
        (lambda t: t.update({ONE: t[ONE].long()}), r"expected torch.int32 \[64\], found torch.int64 \[64\]"),
        (lambda t: t.update({ONE: t[ONE].float()}), "found torch.float32"),
        (lambda t: t.update({ONE: t[ONE][:63].clone()}), r"found torch.int32 \[63\]"),
        (lambda t: t.update({ONE: t[ONE].reshape(8, 8)}), r"found torch.int32 \[8, 8\]"),
        (lambda t: t.update({ONE: torch.zeros(1 << 16, dtype=torch.int32)}), r"found torch.int32 \[65536\]"),
        (lambda t: t.update({ONE: torch.zeros(64, dtype=torch.int32)}), "expected each unit from 0 to 63 once"),
        (lambda t: t.update({ONE: t[ONE] + 1}), "expected each unit from 0 to 63 once"),
        (lambda t: t.update({ONE: -t[ONE]}), "expected each unit from 0 to 63 once"),
        (lambda t: t[ONE].__setitem__(0, 2**31 - 1), "expected each unit from 0 to 63 once"),
        (lambda t: t.pop("enc.7.1.up"), "enc.7.1.up: expected floats"),
    ],
)
def test_units_from_strangers(tmp_path, change, words):
    entry, level, _ = changed_companion(tmp_path, change)
    with pytest.raises(StandInError, match=words) as caught:
        companion.of_level([tmp_path], "enc", entry, level)
    assert "\n" not in str(caught.value) and "get it again" in str(caught.value)


def test_two_files_for_one_level(tmp_path):
    entry, level, _ = changed_companion(tmp_path, lambda t: None)
    assert companion.of_level([tmp_path], "enc", entry, level)[1] == ""
    other = entry.model_copy(update={"units": entry.units.model_copy(update={"sha256": "1" * 64})})
    with pytest.raises(StandInError, match="names two files for one level"):
        companion.of_level([tmp_path], "enc", other, level)


# Pruned files from strangers


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """A narrowed T5."""
    folder = tmp_path_factory.mktemp("pruned")
    _, plan, _ = written(folder, "t5")
    save_file(tensors_of("t5"), folder / "dense.safetensors")
    entry = plan.encoder("enc")
    fitted, _ = companion.of_level([folder], "enc", entry, entry.levels[-1])
    write_pruned(Checkpoint(folder / "dense.safetensors"), folder / "pruned.safetensors", "enc", plan, 7, fitted=fitted)
    return folder / "pruned.safetensors"


def rewritten(path: Path, out: Path, record=lambda record: None, tensors=lambda tensors: None) -> Path:
    """A pruned file whose record and tensors were changed by someone who puts every hash right again."""
    from skrr_engine.disk import safetensors as header
    from skrr_engine.disk.safetensors import Entry, tensor_bytes

    opened = Checkpoint(path)
    found = {key: opened.tensor(key) for key in opened._header.entries}
    tensors(found)
    metadata = dict(opened.metadata)
    own = json.loads(metadata["skrr"])
    record(own)
    entries = {key: Entry(header.NAMES[t.dtype], tuple(t.shape)) for key, t in found.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (-item[1].itemsize, item[0])))
    data = b"".join(bytes(chunk) for key in entries for chunk in tensor_bytes(found[key]))
    import hashlib

    own["data_sha256"] = hashlib.sha256(data).hexdigest()
    metadata["skrr"] = json.dumps(own)
    own["header_sha256"] = encoder_file._header_sha256(entries, metadata)
    metadata["skrr"] = json.dumps(own)
    out.write_bytes(header.write(entries, metadata) + data)
    return out


Q, WO, KEPT = (
    f"encoder.block.0.layer.{k}.weight" for k in ("0.SelfAttention.q", "1.DenseReluDense.wo", "0.layer_norm")
)


def test_rewritten_is_verified(pruned, tmp_path):
    """What the others change is what they are refused for."""
    assert rewritten(pruned, tmp_path / "x.safetensors").read_bytes()
    verify(tmp_path / "x.safetensors")
    verify(rewritten(pruned, tmp_path / "y.safetensors", lambda record: record.update(refitted=[WO])))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (lambda r: r["narrowed"].pop(Q), "does not agree with its plan"),
        (lambda r: r.pop("narrowed"), "expected units.feed_forward 64, found 1 at sub-block 1"),
        (lambda r: r["narrowed"].update({Q: ["F16", [32, 32]]}), "not narrower"),
        (lambda r: r["narrowed"].update({Q: ["F32", [64, 32]]}), "does not agree with its plan"),
        (lambda r: r["narrowed"].update({Q: ["F32", [8, 32]]}), "not narrower"),
        (lambda r: r["narrowed"].update({Q: ["F32", [32, 64]]}), "not narrower"),
        (lambda r: r["narrowed"].update({Q: ["F32", [32]]}), "not narrower"),
        (lambda r: r["narrowed"].update({Q: ["F32", [1 << 60, 32]]}), "impossible shape"),
        (lambda r: r["narrowed"].update({Q: "F32"}), "metadata is damaged"),
        (lambda r: r["narrowed"].update({KEPT: ["F32", [64]]}), "does not agree|expected width"),
        (lambda r: r["narrowed"].update({"shared.weight": ["F32", [200, 32]]}), "does not agree with its plan"),
        (lambda r: r["narrowed"].update({"nothing": ["F32", [4]]}), "not there"),
        (lambda r: r.update(narrowed=[Q]), "metadata is damaged"),
        (lambda r: r.update(narrowed=None), "metadata is damaged"),
        (lambda r: r.update(refitted=["shared.weight"]), "refitted names what is not narrowed"),
        (lambda r: r.update(refitted=Q), "refitted names what is not narrowed"),
        (lambda r: r.update(refitted=[[]]), "refitted names what is not narrowed"),
        (lambda r: r.update(refitted=None), "refitted names what is not narrowed"),
        (lambda r: r.update(skipped=3), "does not agree with its plan|expected floats|missing"),
        (lambda r: r.update(skipped=0), "does not agree with its plan"),
        (lambda r: r.update(unread=[1]), "unread names a sub-block that is there"),
    ],
)
def test_records_from_strangers(pruned, tmp_path, record, words):
    """Whoever changes what a pruned file says of its narrowed tensors, and puts the hashes right, is found out."""
    path = rewritten(pruned, tmp_path / "x.safetensors", record)
    with pytest.raises(SkrrError, match=words) as caught:
        verify(path)
    assert "\n" not in str(caught.value)


UNITS = f"{encoder_file.STANDINS}enc.units.1"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (lambda t: t.pop(UNITS), "enc.units.1: expected torch.int32 .*found missing"),
        (lambda t: t.update({UNITS: t[UNITS].long()}), "found torch.int64"),
        (lambda t: t.update({UNITS: t[UNITS][:60].clone()}), "found torch.int32"),
        (lambda t: t[UNITS].fill_(5), "expected each unit"),
        (lambda t: [t.pop(key) for key in list(t) if "skrr_standins" in key], "does not agree with its plan"),
        (lambda t: t.update({Q: t[Q][:7].clone()}), "does not agree with its plan"),
        (lambda t: t.update({WO: t[WO].repeat(1, 2)}), "does not agree with its plan"),
        (lambda t: t.update({Q: t[Q].half()}), "not narrower"),
        (lambda t: t.pop(Q), "not there"),
    ],
)
def test_tensors_from_strangers(pruned, tmp_path, tensors, words):
    path = rewritten(pruned, tmp_path / "x.safetensors", tensors=tensors)
    with pytest.raises(SkrrError, match=words) as caught:
        verify(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["units", "narrow", "kept", "standin"])
def test_a_changed_byte_is_found(pruned, tmp_path, where):
    """Wherever it stands; a changed order of units is one, too."""
    opened, data = Checkpoint(pruned), bytearray(pruned.read_bytes())
    key = {"units": UNITS, "narrow": Q, "kept": "shared.weight", "standin": f"{encoder_file.STANDINS}enc.7.2.up"}[where]
    start = opened.start(key)
    if where == "units":
        data[start : start + 4], data[start + 4 : start + 8] = data[start + 4 : start + 8], data[start : start + 4]
    else:
        data[start + 3] ^= 1
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="its tensors are not what was written"):
        verify(tmp_path / "x.safetensors")


# Odd ends


def test_refitted(tmp_path):
    """An out-projection of its own is written instead of the columns, and told; nothing else may be."""
    _, plan, _ = written(tmp_path, "t5")
    save_file(tensors_of("t5"), tmp_path / "dense.safetensors")
    entry = plan.encoder("enc")
    fitted, _ = companion.of_level([tmp_path], "enc", entry, entry.levels[-1])
    own, out = torch.randn(WIDTH, 1), tmp_path / "out.safetensors"

    def write(refitted):
        source = Checkpoint(tmp_path / "dense.safetensors")
        return write_pruned(source, out, "enc", plan, 7, fitted=fitted, refitted=refitted)

    write({WO: own})
    assert verify(out).record.refitted == {WO} and torch.equal(Checkpoint(out).tensor(WO), own)
    for key, tensor in [
        (WO, own.half()), (WO, torch.randn(WIDTH, 2)), (WO, own.to(torch.cfloat)), ("shared.weight", own),
        ("nothing", own),
    ]:  # fmt: skip
        with pytest.raises(CheckpointError, match="can't be refitted; save it without refit"):
            write({key: tensor})


def test_unread_and_narrowed(tmp_path):
    """An unread sub-block that the plan narrows stays narrow; others go."""
    _, plan, _ = written(tmp_path, "t5")
    save_file(tensors_of("t5"), tmp_path / "dense.safetensors")
    entry = plan.encoder("enc")
    fitted, _ = companion.of_level([tmp_path], "enc", entry, entry.levels[-1])
    out = tmp_path / "out.safetensors"
    write_pruned(Checkpoint(tmp_path / "dense.safetensors"), out, "enc", plan, 7, (4, 6, 7), fitted)
    record = verify(out).record
    layout = Checkpoint(tmp_path / "dense.safetensors").layout
    assert record.unread == (4,) and set(record.dropped) == layout.dropped((2, 4, 5)), "7 is re-used, 6 is narrowed"
    assert any("block.3.layer.0" in key for key in record.narrowed)


def test_blocks_that_a_file_lacks(tmp_path):
    """A file that others have cut off behind block 2, and a plan that narrows block 3: nothing of that is there."""
    _, plan, orders = written(tmp_path, "t5")
    dense = {key: t for key, t in tensors_of("t5").items() if "block.3." not in key}
    save_file(dense, tmp_path / "dense.safetensors")
    entry = plan.encoder("enc")
    level = entry.levels[-1].model_copy(update={"reuse": {}})
    entry = entry.model_copy(update={"levels": (entry.levels[0].model_copy(update={"reuse": {}}), level)})
    plan = plan.model_copy(update={"encoders": {"enc": entry}})
    fitted, _ = companion.of_level([tmp_path], "enc", entry, level)
    out = tmp_path / "out.safetensors"
    with pytest.raises(PlanError, match="expected blocks 4, found 3"):
        write_pruned(Checkpoint(tmp_path / "dense.safetensors"), out, "enc", plan, 7, (), fitted)
    write_pruned(Checkpoint(tmp_path / "dense.safetensors"), out, "enc", plan, 7, (), fitted, blocks=4)
    found = verify(out)
    assert found.layout.blocks == 4 and not any("block.3." in key for key in found.entries)
    wanted = by_hand("t5", dense, plan, orders, 7)
    assert_same({k: t for k, t in load_file(out).items() if not k.startswith(encoder_file.STANDINS)}, wanted)


NORM = "encoder.block.0.layer.1.layer_norm.weight"


def test_spare_tensors_stay_away(tmp_path):
    """What the encoder does not use is not written, narrowed or not."""
    _, plan, _ = written(tmp_path, "t5")
    save_file(tensors_of("t5"), tmp_path / "dense.safetensors")
    entry = plan.encoder("enc")
    fitted, _ = companion.of_level([tmp_path], "enc", entry, entry.levels[-1])
    out = tmp_path / "out.safetensors"
    write_pruned(Checkpoint(tmp_path / "dense.safetensors"), out, "enc", plan, 7, (), fitted, spare={WO, NORM})
    assert not {WO, NORM} & verify(out).entries.keys()


def test_show(tmp_path, capsys):
    """What goes, what is narrowed to how much, and what stands in; no list of all steps."""
    path, plan, _ = written(tmp_path, "t5")
    assert main(["show", str(path)]) == 0
    assert capsys.readouterr().out.rstrip() == describe_plan(plan)
    assert describe_plan(plan).splitlines() == [
        "plan from test",
        "enc: t5, 4 blocks, 32 wide; 7 steps, sub-blocks narrowed to some of their 4 heads or 64 neurons",
        "    1 skipped,   2 narrowed: sparsity 5.0%, re-use 5>7, 2 linear stand-ins of rank 3",
        "    2 skipped,   4 narrowed: sparsity 20.0%, re-use 5>7, 3 linear stand-ins of rank 3",
        "",
        "  attention      75%    ~    2  25%",
        "  feed-forward    2%  27%   >3    3",
    ]


def test_encode_and_discrepancy(tmp_path, tokenizer_folder, capsys):
    """The command line's conditionings and D are those of the encoder that the verbs make, and of the file that `apply`
    writes."""
    from skrr_engine.files.folder import load

    path, plan, _ = written(tmp_path, "t5")
    entry = plan.encoder("enc")
    folder = tmp_path / "encoder"
    small.build("t5").save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / "prompts.txt").write_text("a red cube\ntwo blue cats under a table\na dog")
    common = [
        "--encoder",
        str(folder),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--plan",
        str(path),
        "--name",
        "enc",
    ]
    assert main(["encode", *common, "--out", str(tmp_path / "out.safetensors")]) == 0
    got = load_file(tmp_path / "out.safetensors")
    encoder = load(str(folder))
    fitted, _ = companion.of_level([tmp_path], "enc", entry, entry.levels[-1])
    skrr_engine.prune(encoder.module, plan, fitted=fitted)
    for key, prompt in (("0", "a red cube"), ("1", "two blue cats under a table"), ("null", "")):
        wanted = encoder.module(input_ids=torch.tensor([encoder.tokenize(prompt)])).last_hidden_state[0]
        torch.testing.assert_close(got[key], wanted, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert main(["discrepancy", *common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = families.find(small.build("t5"))
    assert found["sparsity"] == pytest.approx(row.sparsity(entry.shares(7))) and found["D"] > 0
    companion.beside(path).unlink()
    for command in (["encode", *common, "--out", str(tmp_path / "none")], ["discrepancy", *common]):
        assert main(command) == 1
        assert "units and stand-ins (*.standins.safetensors) is missing" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["clip", "qwen2"])
def test_a_bias_that_can_not_be_cut(tmp_path, name):
    """Where weights can be cut and biases not (as GGUF files may hold them), a projection stays whole and is used in
    part: the same conditioning."""
    from skrr_engine.encoder.rewire import BUILD, rewire
    from skrr_engine.encoder.standin import Linear
    from skrr_engine.encoder.units import Build, plain_cut

    _, plan, _ = written(tmp_path, name)
    entry = plan.encoder("enc")
    fitted, _ = companion.of_level([tmp_path], "enc", entry, entry.levels[-1])
    uncut = Build(Linear, plain_cut, lambda bias, index: None)
    whole = Build(Linear, lambda layer, index, dimension: None)
    found = []
    for build in (BUILD, uncut, whole):
        module = small.build(name)
        rewire(module, families.find(module), fitted.assignment(entry, entry.levels[-1]), build)
        found.append((small.forward(name, [[5, 9, 33, 4, 60, 2]])(module), sum(p.numel() for p in module.parameters())))
    for out, _ in found[1:]:
        torch.testing.assert_close(found[0][0], out, rtol=1e-4, atol=1e-5)
    assert found[0][1] < found[1][1] <= found[2][1]


def test_a_companion_file_is_the_same_for_the_same():
    """Its name is its hash: equal stand-ins and units, whatever their order, give equal bytes."""
    from safetensors.torch import load

    from skrr_engine.files.companion import safetensors_bytes

    tensors = {"b": torch.arange(3, dtype=torch.int32), "a": torch.ones(2, 2).half(), "c": torch.zeros(2)}
    metadata = {"format": "x", "version": "2", "norms": "t5:rms"}
    data = safetensors_bytes(tensors, metadata)
    assert data == safetensors_bytes(dict(reversed(tensors.items())), metadata)
    read = load(data)
    assert read.keys() == tensors.keys() and all(torch.equal(read[key], tensors[key]) for key in tensors)
