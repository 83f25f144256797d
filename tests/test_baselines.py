"""The baselines against their definitions, computed here by hand."""

import copy
import json

import pytest
import small
import torch

from skrr_engine.cli.parser import main
from skrr_engine.encoder import families
from skrr_engine.encoder.actions import SKIP, assignment
from skrr_engine.encoder.rewire import rewire, undo
from skrr_engine.encoder.trace import Tracer
from skrr_engine.measure.calibration import Calibration
from skrr_engine.measure.discrepancy import COSINE
from skrr_engine.measure.meter import Meter
from skrr_engine.search import baselines
from skrr_engine.search.resume import State

IDS = small.prompts([6, 9, 9, 7], seed=5)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def cosine_meter(name, module):
    tracer = Tracer(module, families.find(module))
    batches = [small.batch(name, ids) for ids in IDS]
    return Meter(Calibration(module, tracer, batches, small.batch(name, [[1]])), criterion=baselines.ANGLE_OF_OUTPUT)


def angle(name, module, removed) -> float:
    """Mean of 1 - cosine over all tokens, by whole forwards."""
    row = families.find(module)
    dense = [small.forward(name, ids)(module)[0] for ids in IDS]
    replaced = rewire(module, row, removed)
    pruned = [small.forward(name, ids)(module)[0] for ids in IDS]
    undo(module, replaced)
    found = [1 - torch.cosine_similarity(p.double(), d.double(), dim=-1) for p, d in zip(pruned, dense, strict=True)]
    return float(torch.cat(found).mean())


def test_shortgpt():
    module = small.build("llama", 5)
    meter = small.meter("llama", module, IDS, [1])
    states = [
        module(input_ids=torch.tensor(ids), use_cache=False, output_hidden_states=True).hidden_states for ids in IDS
    ]
    blocks = {}
    for block in range(4):  # the last state that transformers gives is normed, so the last block can't be compared
        pairs = [torch.cosine_similarity(s[block].double(), s[block + 1].double(), dim=-1)[0] for s in states]
        blocks[block] = 1 - float(torch.cat(pairs).mean())
    influence = baselines.block_influence(meter)
    assert influence[:4] == pytest.approx([blocks[b] for b in range(4)], abs=1e-9)
    order = baselines.shortgpt_order(meter)
    ranked = sorted(range(5), key=lambda b: influence[b])
    assert order == [i for b in ranked for i in (2 * b, 2 * b + 1)]


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_finercut_is_the_greedy_loop(name):
    module = small.build(name, 4)
    meter = cosine_meter(name, module)
    row = meter.tracer.row
    order = baselines.finercut_order(meter, 0.4)
    expected: list[int] = []
    while row.sparsity(expected) < 0.4:
        rest = [i for i in range(len(row)) if i not in expected]
        expected.append(min(rest, key=lambda i: (angle(name, module, assignment([*expected, i])), i)))
    assert order == expected
    found = meter.measure([assignment(order)])[0]
    assert found.conditional == pytest.approx(angle(name, module, assignment(order)), rel=1e-6) and found.null == 0


def test_cosine_keeps_the_null_term():
    module = small.build("t5", 3)
    tracer = Tracer(module, families.find(module))
    batches, null = [small.batch("t5", ids) for ids in IDS], small.batch("t5", [[1]])
    found = Meter(Calibration(module, tracer, batches, null), criterion=COSINE).measure([{1: SKIP}])[0]
    assert found.null > 0 and found.conditional == pytest.approx(angle("t5", module, {1: SKIP}), rel=1e-6)


def test_random_is_seeded():
    meter = small.meter("t5", small.build("t5", 4), IDS, [1])
    one, again, other = (baselines.random_order(meter, seed) for seed in (1, 1, 2))
    assert one == again != other and sorted(one) == list(range(8))


def test_levels_have_skrrs_discrepancy():
    meter = small.meter("t5", small.build("t5", 5), IDS, [1])
    plan = baselines.plan_of(meter, baselines.random_order(meter), [0.2, 0.4], "random")
    assert [level.reuse for level in plan.levels] == [{}, {}] and plan.extensions == {"search": {"mode": "random"}}
    for level in plan.levels:
        order = plan.order[: level.skipped]
        assert meter.tracer.row.sparsity(order) >= 0.2
        assert level.discrepancy == meter.measure([assignment(order)])[0].total


def test_laco():
    """Blocks 2 and 3 are merged into block 1; a refusal leaves the weights as they were."""
    module = small.build("llama", 4)
    row = families.find(module)
    before = copy.deepcopy(module.state_dict())
    asked = []

    def never(removed):
        asked.append(list(removed))
        return 0.0

    assert baselines.laco(row, never, 0.3, span=3) == []
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items()) and asked[0] == [4, 5, 6, 7]
    removed = baselines.laco(row, lambda removed: 1.0, 0.3, span=3)
    assert removed == [4, 5, 6, 7]
    key = "layers.{}.mlp.up_proj.weight"
    theta = [before[key.format(i)] for i in range(4)]
    wanted = theta[1] + (theta[2] - theta[1]) + (theta[3] - theta[1])
    torch.testing.assert_close(module.state_dict()[key.format(1)], wanted)
    assert torch.equal(module.state_dict()[key.format(0)], theta[0])


@pytest.fixture
def arguments(tmp_path, tokenizer_folder):
    """Of a search on a small T5, up to its method."""
    small.build("t5", 4).save_pretrained(tmp_path / "encoder")
    (tmp_path / "prompts.txt").write_text("a red cube\na dog\n")
    arguments = ["search", "--encoder", str(tmp_path / "encoder"), "--tokenizer", str(tokenizer_folder)]
    arguments += ["--out", str(tmp_path / "plan.json"), "--prompts", str(tmp_path / "prompts.txt"), "--sparsity", "0.3"]
    return [*arguments, "--method"]


@pytest.mark.parametrize("method", ["finercut", "shortgpt", "random"])
def test_command_line(method, tmp_path, arguments, capsys):
    assert main([*arguments, method]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["provenance"]["source"] == method and plan["encoders"]["t5"]["levels"][-1]["sparsity"] >= 0.3
    told = capsys.readouterr().err
    assert ("step 1 of" in told) == (method == "finercut")
    if method != "finercut":
        assert main([*arguments, method, "--resume", str(tmp_path / "state")]) == 1
        assert "--resume" in capsys.readouterr().err


def test_finercut_goes_on_where_it_stopped(tmp_path, arguments, capsys, monkeypatch):
    def stopping(state, beam, save=State.save):
        save(state, beam)
        raise KeyboardInterrupt

    arguments += ["finercut"]
    assert main(arguments) == 0
    whole = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").unlink()
    arguments += ["--resume", str(tmp_path / "state")]
    steps = len(whole["encoders"]["t5"]["order"])
    with monkeypatch.context() as patch:
        patch.setattr(State, "save", stopping)
        for _ in range(steps):
            assert main(arguments) == 130 and (tmp_path / "state").exists()
    capsys.readouterr()
    assert main(arguments) == 0 and "measuring every sub-block" not in capsys.readouterr().err
    assert json.loads((tmp_path / "plan.json").read_text()) == whole and not (tmp_path / "state").exists()
