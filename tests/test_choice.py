"""What nodes are asked: inputs that other nodes give, names from other systems, one level for every asker, and when a
node runs again."""

import asyncio
import json
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_comfy import host  # noqa: F401 - a fixture
from test_saving import of_pack, plan_of, shelf  # noqa: F401 - fixtures

from skrr_engine.plan.model import EncoderPlan, Level, Plan, Provenance

NODES = [
    "SkrrPrune", "SkrrLoadPlan", "SkrrRepairPlan", "SkrrEditPlan", "SkrrCLIPLoader", "SkrrDualCLIPLoader",
    "SkrrTripleCLIPLoader", "SkrrQuadrupleCLIPLoader",
    "SkrrSaveEncoder", "SkrrTrimUnread", "SkrrSparsify", "SkrrSaveSparse", "SkrrLoadSparse", "SkrrMemoryReport",
    "SkrrCompare",
]  # fmt: skip


@pytest.fixture
def execution(comfy, pack):
    import execution

    return execution


def source(kind: str) -> type:
    """A node that gives a value of this type when it runs, and not before."""
    return type(
        "Source",
        (),
        {
            "RETURN_TYPES": (kind,),
            "FUNCTION": "give",
            "CATEGORY": "test",
            "INPUT_TYPES": classmethod(lambda cls: {"required": {}}),
            "give": lambda self: pytest.fail("nothing runs here"),
        },
    )


def awaited(coroutine: Coroutine):
    """What a coroutine gives, in a thread of its own: the browser's loop may be running in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()


def checked(execution, prompt: dict, out: str) -> tuple[bool, list[str], str]:
    """Whether ComfyUI takes a prompt, what it says about it, and the node's fingerprint."""

    class Known:
        def get_node(self, node_id):
            return prompt[node_id]

        def all_node_ids(self):
            return set(prompt)

        get_original_prompt = get_node

    valid, errors, _ = awaited(execution.validate_inputs("id", prompt, out, {}))
    prompt[out].pop("is_changed", None)  # ComfyUI keeps it there for the run
    changed = awaited(execution.IsChangedCache("id", Known(), None).get(out))
    return valid, [error["details"] for error in errors], changed


def linked(nodes, name: str, monkeypatch) -> tuple[dict, dict]:
    """A node's inputs, each from another node, and those nodes."""
    inputs, prompt = {}, {}
    own = nodes.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    for field, (kind, *_) in {**own["required"], **own.get("optional", {})}.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, f"SkrrSource{kind}", source(kind))
        prompt[field] = {"class_type": f"SkrrSource{kind}", "inputs": {}}
        inputs[field] = [field, 0]
    return inputs, prompt


@pytest.mark.parametrize("name", NODES)
def test_every_input_may_come_from_another_node(execution, shelf, name, monkeypatch, caplog):  # noqa: F811
    """ComfyUI hands None for such an input to what checks it and to what tells whether a node runs again."""
    import nodes

    inputs, prompt = linked(nodes, name, monkeypatch)
    assert inputs
    prompt["node"] = {"class_type": name, "inputs": inputs}
    valid, errors, changed = checked(execution, prompt, "node")
    assert valid and not errors and changed == changed, "what can't be told is NaN"
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_every_node_is_asked(pack, host):  # noqa: F811
    assert [node.define_schema().node_id for node in host("nodes").NODES] == NODES


@pytest.mark.parametrize(("given", "field"), [({"plan_json": ""}, "plan"), ({"plan": "none"}, "plan_json")])
def test_one_linked_input_beside_constants(execution, shelf, given, field, monkeypatch):  # noqa: F811
    import nodes

    (shelf["text_encoders"]).mkdir()
    save_file({"a": torch.zeros(1)}, shelf["text_encoders"] / "x.safetensors")
    inputs, prompt = linked(nodes, "SkrrCLIPLoader", monkeypatch)
    constants = {"clip_name": "x.safetensors", "type": "sd3", "sparsity": 0.4, **given}
    prompt["node"] = {"class_type": "SkrrCLIPLoader", "inputs": {**constants, field: inputs[field]}}
    valid, errors, before = checked(execution, prompt, "node")
    assert valid and not errors
    shelf["skrr_plans"].mkdir()
    (shelf["skrr_plans"] / "mine.json").write_text(plan_of(0, 3).to_json())
    assert checked(execution, prompt, "node")[2] != before, "it may be the plan that is meant"


# Names


def test_names_from_windows(execution, shelf, host, monkeypatch):  # noqa: F811
    """Folders in them are separated by a backslash there."""
    for kind, name in (("skrr_plans", "mine.json"), ("text_encoders", "clip.safetensors")):
        (shelf[kind] / "sub").mkdir(parents=True)
        (shelf[kind] / "sub" / name).write_text(plan_of(0, 3).to_json())
    inputs = {"clip_name": "sub\\clip.safetensors", "type": "sd3", "plan": "sub\\mine.json", "sparsity": 0.4}
    prompt = {"node": {"class_type": "SkrrCLIPLoader", "inputs": inputs}}
    assert checked(execution, prompt, "node")[:2] == (True, [])
    asked = []

    def load(names, *_):
        asked.append(names)
        raise InterruptedError

    node = host("nodes.load_clip").SkrrCLIPLoader
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id=None, extra_pnginfo=None))
    monkeypatch.setattr(host("nodes.host.files.load"), "load", load)
    with pytest.raises(InterruptedError):
        node.execute(inputs["plan"], 0.4, clip_name=inputs["clip_name"])
    assert asked == [["sub/clip.safetensors"]]
    answer = host("nodes.host.server").answer({"plan": inputs["plan"], "plan_json": "", "sparsity": 1})
    assert answer["map"][0]["order"] == [0, 3]
    for field, says in (("clip_name", "there is no text encoder"), ("plan", "there is no plan")):
        prompt["node"]["inputs"] = {**inputs, field: "sub\\..\\..\\secret"}
        valid, errors, _ = checked(execution, prompt, "node")
        assert not valid and says in errors[0]


# Levels


def asked_of_all(host, plan: Plan, sparsity: float) -> set:  # noqa: F811
    """What the map before a run, a run and the command line answer: lengths of levels, or errors."""
    from skrr_engine.cli import commands as cli

    pack_plan = of_pack(host, plan)
    shape = host("skrr_engine.encoder.row").Numbers(
        "clip", 4, 64, 1000, (50,) * 8, 4000, (200,) * 8, (40,) * 8, (160,) * 8
    )  # fmt: skip
    level = host("nodes.host.plans.inputs").Choice(pack_plan, sparsity, 0.0).level
    error = (host("skrr_engine.errors").SkrrError, cli.SkrrError)
    told = host("nodes.host.server").answer({"plan": "", "plan_json": plan.to_json(), "sparsity": sparsity})
    found = {told["error"] if "error" in told else len(told["map"][0]["order"])}
    for ask in (
        lambda: level("clip_l", shape, pack_plan.encoder("clip_l"))[0],
        lambda: plan.encoder("clip_l").choose(sparsity),
    ):
        try:
            found.add(ask().skipped)
        except error as problem:
            found.add(str(problem))
    return found


def test_one_answer_for_every_asker(host):  # noqa: F811
    """Also where the encoder's own numbers are not the plan's: then the plan's count."""
    levels = tuple(Level(skipped=n, reuse={}, sparsity=s) for n, s in ((2, 0.1), (3, 0.2), (4, 0.2), (5, 0.3)))
    entry = EncoderPlan(family="clip", blocks=4, width=64, order=(0, 3, 5, 6, 7), levels=levels)
    plan = Plan(encoders={"clip_l": entry}, provenance=Provenance(source="search"))
    for sparsity, expected in ((0.1, 2), (0.19, 2), (0.2, 4), (0.2999, 4), (0.3, 5), (1.0, 5)):
        assert asked_of_all(host, plan, sparsity) == {expected}
    for sparsity in (0.0, 0.05, 0.09, 0.0999):
        (said,) = asked_of_all(host, plan, sparsity)
        assert "the smallest has 0.1, ask for that or more" in said


def test_the_map_before_a_run_says_nothing_of_a_size(host):  # noqa: F811
    """Which level that comes to is told by the encoder's bytes."""
    routes, text = host("nodes.host.server"), plan_of(0, 3).to_json()
    asked = {"plan": "", "plan_json": text, "sparsity": 0.0, "size_gb": 2.5}
    assert routes.answer(asked) == {"map": [], "plan": text}
    for wrong in ({"size_gb": "2"}, {"sparsity": float("nan")}, {"sparsity": 10**400}, {"size_gb": -(10**400)}):
        assert "expected in the request" in routes.answer({**asked, **wrong})["error"]


# Running again


def test_only_its_own_stand_ins_make_a_node_run_again(shelf, host):  # noqa: F811
    fingerprint, folder = host("nodes.host.plans.inputs").fingerprint, shelf["skrr_plans"]
    folder.mkdir()
    text = plan_of(0, 3, standins=b"matrices").to_json()
    (folder / "mine.json").write_text(text)
    (folder / "plain.json").write_text(plan_of(0, 3).to_json())
    asked = [("none", ""), ("plain.json", ""), ("mine.json", ""), ("none", text), ("none", "{"), ("gone.json", "")]

    def all_of_them() -> list[str]:
        return [fingerprint(*each) for each in asked]

    before = all_of_them()
    (folder / "other.standins.safetensors").write_bytes(b"of another plan")
    assert all_of_them() == before
    (folder / "mine.standins.safetensors").write_bytes(b"matrices")
    with_its_own = all_of_them()
    assert [old == new for old, new in zip(before, with_its_own, strict=True)] == [True, True, False, False, True, True]
    (folder / "mine.standins.safetensors").write_bytes(b"damaged!")
    assert all_of_them() == before
    (folder / "plain.json").write_text(json.dumps(json.loads(plan_of(0, 5).to_json())))
    assert [old == new for old, new in zip(before, all_of_them(), strict=True)] == [True, False, *[True] * 4]
