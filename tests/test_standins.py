"""Linear stand-ins: the fits against plain linear algebra, walks against forwards, files, and the search by them."""

import json
import math
import os
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

from skrr_engine.cli.parser import main
from skrr_engine.encoder import families
from skrr_engine.encoder.actions import KEEP, SKIP, Reuse, assignment
from skrr_engine.encoder.rewire import rewire, undo
from skrr_engine.encoder.standin import NORMS, StandIn, StandInModule
from skrr_engine.encoder.trace import Tracer
from skrr_engine.errors import SearchError
from skrr_engine.files import companion as standin_file
from skrr_engine.files.companion import Fitted, StandInError
from skrr_engine.measure.calibration import Batch, Calibration
from skrr_engine.measure.elimination import ROUNDING
from skrr_engine.measure.meter import Meter
from skrr_engine.measure.walk import Walk, forwards
from skrr_engine.plan.model import EncoderPlan, Level, Plan, Provenance
from skrr_engine.plan.text import PlanError
from skrr_engine.search import skip, with_standins
from skrr_engine.search.settings import Settings
from skrr_engine.search.skip import SkipList
from skrr_engine.standins import fit as standin
from skrr_engine.standins.fit import Fitting, Gram

IDS = [[5, 9, 33, 4, 60, 7, 8, 21, 99, 3, 2], [8, 7, 6, 5, 4, 3, 10, 11, 12, 13, 2]]
LENGTHS = [7, 9, 7, 12, 5, 9, 11, 8, 6, 10]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def noise(name: str, rank: int = 3, seed: int = 0, width: int = 32) -> StandIn:
    """A stand-in of random numbers for a family."""
    generator = torch.Generator().manual_seed(seed)
    norm = families.by_name(small.family_of(name)).norm
    shapes = ((rank, width), (width, rank), (width,))
    return StandIn(norm, *(torch.randn(shape, generator=generator) * 0.2 for shape in shapes))


def by_hand(standin: StandIn, x: torch.Tensor) -> torch.Tensor:
    """`x + norm(x) down up + bias`, in float64, from the definition."""
    x = x.double()
    centred = x - x.mean(dim=-1, keepdim=True) if standin.norm == "layer" else x
    normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return x + normed @ standin.down.double().T @ standin.up.double().T + standin.bias.double()


@pytest.mark.parametrize("name", small.BUILDERS)
def test_walk_equals_forward_and_definition(name):
    """At block 0's attention, in the middle and at the end, beside a skip and a re-use."""
    module = small.build(name)
    row = families.find(module)
    removed = {0: noise(name, 3), 3: noise(name, 5, 1), 4: SKIP, 5: Reuse(1), 7: noise(name, 1, 2)}
    run = small.batch(name, IDS).run
    tracer = Tracer(module, row)
    trace = tracer.trace(run)
    ((_, walked),) = Walk(tracer)(trace, [removed])
    keys, before = list(module.state_dict()), run(module)[0][0]
    replaced = rewire(module, row, removed)
    added = sum(p.numel() for m in module.modules() if isinstance(m, StandInModule) for p in m.parameters())
    assert added == sum(32 * (2 * s.rank + 1) for s in removed.values() if isinstance(s, StandIn))
    assert (
        sum(p.numel() for p in module.parameters()) == row.total - sum(row.parameter_counts[i] for i in removed) + added
    )
    rewired = run(module)
    undo(module, replaced)
    assert torch.equal(walked[0][0], rewired[0][0]), "the walk differs from the rewired encoder's own forward"
    assert list(module.state_dict()) == keys and torch.equal(run(module)[0][0], before)

    x = trace.x
    for i in range(len(row)):
        action = removed.get(i, KEEP)
        if isinstance(action, StandIn):
            x = by_hand(action, x).float()
        elif action != SKIP:
            x = row.sub_blocks[i if action == KEEP else action.target].apply(x, trace.calls[i])
    (expected,) = tracer.read(trace, {row.blocks: x})
    torch.testing.assert_close(walked[0][0], expected[0], rtol=1e-4, atol=1e-5)


def test_candidates_share_states_only_with_the_same_stand_in():
    module = small.build("t5")
    tracer = Tracer(module, families.find(module))
    trace = tracer.trace(small.batch("t5", IDS).run)
    one, other = noise("t5", 3), noise("t5", 3)
    candidates = [{3: one}, {3: other}, {3: one, 6: SKIP}, {3: SKIP}]
    steps = []
    found = dict(Walk(tracer)(trace, candidates, 0, lambda: steps.append(1)))
    assert len(steps) == forwards(8, candidates) == 3 + 3 * 4 + 1
    for i, candidate in enumerate(candidates):
        ((_, alone),) = Walk(tracer)(trace, [candidate])
        assert torch.equal(found[i][0][0], alone[0][0])
    for i, reading in Walk(tracer)(trace, candidates, stack=10**6):
        torch.testing.assert_close(reading[0][0], found[i][0][0], rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0][0][0], found[1][0][0]) and not torch.equal(found[0][0][0], found[3][0][0])


def problem(tokens: int = 400, width: int = 24, rank: int = 5, seed: int = 0):
    """Features, targets that a low rank explains but for noise, and weights, float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z, weights = draw(tokens, width), draw(tokens).exp()
    r = z @ draw(width, rank) @ draw(rank, width) + 3 * draw(width) + 0.3 * draw(tokens, width)
    return z, r, weights


def gram_of(z, r, weights, pieces: int = 1) -> Gram:
    gram = Gram.of(z.shape[1], "cpu")
    for part in torch.arange(len(z)).chunk(pieces):
        gram.add(z[part], r[part], weights[part])
    return gram


@pytest.mark.parametrize("pieces", [1, 7])
def test_full_rank_is_the_weighted_ridge_regression(pieces):
    z, r, weights = problem()
    ridge = 0.05
    down, up, bias = standin.solve(gram_of(z, r, weights, pieces), 24, ridge)
    mean_z, mean_r = (weights @ z) / weights.sum(), (weights @ r) / weights.sum()
    root = weights.sqrt().unsqueeze(1)
    a, b = (z - mean_z) * root, (r - mean_r) * root
    strength = ridge * (a.square().sum() / 24) * torch.eye(24, dtype=torch.float64)
    wanted = torch.linalg.solve(a.T @ a + strength, a.T @ b)
    torch.testing.assert_close(down @ up, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(bias, mean_r - mean_z @ wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
def test_low_rank_is_the_best_of_its_rank(rank):
    """Reduced-rank regression: no cut of the full map by other directions fits better (here by its SVD, weighted)."""
    z, r, weights = problem()
    gram = gram_of(z, r, weights)
    fit = standin.solve(gram, rank, 1e-6)
    down, up, bias = standin.solve(gram, 24, 1e-6)
    full = down @ up
    root = weights.sqrt().unsqueeze(1)
    mean_z = (weights @ z) / weights.sum()
    _, _, v = torch.linalg.svd((z - mean_z) * root @ full, full_matrices=False)
    cut = full @ v[:rank].T @ v[:rank]
    mean_r = (weights @ r) / weights.sum()
    best = (((r - z @ cut - (mean_r - mean_z @ cut)) * root).square()).sum()
    found = (((r - z @ fit[0] @ fit[1] - fit[2]) * root).square()).sum()
    assert found.item() == pytest.approx(best.item(), rel=1e-3)  # sums of a batch are float32
    assert gram.error(fit) == pytest.approx(found.item(), rel=1e-3)
    plain = torch.linalg.svd(full)
    other = plain.U[:, :rank] * plain.S[:rank] @ plain.Vh[:rank]
    worse = (((r - z @ other - (mean_r - mean_z @ other)) * root).square()).sum()
    assert found <= worse * (1 + 1e-9)


def test_stored_stand_in_is_the_fit():
    """float16 factors of equal size; huge channels, as T5 has them, do not overflow."""
    z, r, weights = problem()
    r[:, 3] *= 1e5
    down, up, bias = standin.solve(gram_of(z, r, weights), 5, 1e-4)
    stored = standin.stand_in((down, up, bias), "rms")
    assert stored.down.dtype == stored.up.dtype == torch.float16 and stored.bias.dtype == torch.float32
    assert stored.nbytes == 2 * 2 * 5 * 24 + 4 * 24 and stored.rank == 5
    product = stored.up.double() @ stored.down.double()
    assert (product - (down @ up).T).norm() < 2e-3 * (down @ up).norm()


def test_a_linear_sub_block_is_repaired_exactly():
    """Block 1's feed-forward is made one linear map of the normed stream: its stand-in leaves next to nothing."""
    module = small.build("llama")
    mlp = module.layers[1].mlp
    matrix = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(4, 32)
    mlp.forward = lambda x: x @ matrix
    meter = small.meter("llama", module, small.prompts([20] * 30), [2])
    skipped, _ = meter.measure([{3: SKIP}, {}])
    found, _ = standin.fit(meter.calibration, {3: SKIP}, Fitting(rank=4, ridges=(1e-6,)))
    (repaired,) = meter.measure([found])
    assert repaired.total < 1e-4 * skipped.total


@pytest.mark.parametrize("name", ["t5", "clip", "llama", "gemma3"])
def test_fits_in_any_memory_and_helps(name):
    """Streams that are held and those that are computed anew give the same stand-ins, which lower D on new prompts."""
    module = small.build(name)
    prompts = small.prompts(LENGTHS * 6)
    meter = small.meter(name, module, prompts, [2])
    removed = {3: SKIP, 6: SKIP, 4: Reuse(2)}
    roomy, trials = standin.fit(meter.calibration, removed, Fitting(rank=4), tried={1, 5})
    assert set(roomy) == {3, 6} and set(trials) == {1, 5}
    meter.calibration.memory = 0
    tight, again = standin.fit(meter.calibration, removed, Fitting(rank=4), tried={1, 5})
    for a, b in ((roomy, tight), ({k: t.standin for k, t in trials.items()}, {k: t.standin for k, t in again.items()})):
        for place, s in a.items():
            assert torch.equal(s.down, b[place].down) and torch.equal(s.up, b[place].up)
            assert torch.equal(s.bias, b[place].bias)
    fresh = small.meter(name, module, small.prompts(LENGTHS, seed=9), [2])
    skipped, repaired = fresh.measure([removed, assignment(removed, {4: 2}, roomy)])
    assert repaired.total < skipped.total


def test_fits_halve_the_batches_where_memory_runs_out():
    module = small.build("t5", 4)
    row = families.find(module)
    batches = [sum(small.prompts([6] * 8, seed), []) for seed in range(3)]
    refused, calls, least = [], [], 2

    def scarce(sub_block):
        apply = sub_block.apply

        def applied(x, call):
            if len(x) > least:
                refused.append(len(x))
                raise torch.OutOfMemoryError("as CUDA says it")
            calls.append(len(x))
            return apply(x, call)

        return applied

    def batch(ids):
        half = len(ids) // 2
        return Batch(small.batch("t5", ids).run, len(ids), lambda: (batch(ids[:half]), batch(ids[half:])))

    def meter():
        return Meter(Calibration(module, Tracer(module, row), [batch(ids) for ids in batches], batch([[2]])))

    removed, tried = {2: SKIP, 3: SKIP, 5: SKIP}, {4}
    wanted = standin.fit(meter().calibration, removed, Fitting(3), tried)
    short = meter()
    for sub_block in row.sub_blocks:
        sub_block.apply = scarce(sub_block)
    found = standin.fit(short.calibration, removed, Fitting(3), tried)
    assert refused == [8, 4]
    for index in removed:
        x = torch.randn(2, 6, 32)
        torch.testing.assert_close(found[0][index].apply(x), wanted[0][index].apply(x), rtol=1e-2, atol=1e-2)
    assert found[1][4].harm == pytest.approx(wanted[1][4].harm, rel=1e-3)
    assert len(calls) < 200, "nothing was held any more"
    batches = [[[5, 6, 2]]]
    least = 0
    with pytest.raises(torch.OutOfMemoryError):  # nothing left to halve
        standin.fit(meter().calibration, removed, Fitting(3))


def test_each_fit_corrects_what_earlier_ones_left():
    """The stand-in of a later place is fitted on the pruned stream, not on the dense one."""
    module = small.build("t5")
    meter = small.meter("t5", module, small.prompts(LENGTHS * 6), [2])
    both, _ = standin.fit(meter.calibration, {1: SKIP, 5: SKIP}, Fitting(rank=8))
    alone, _ = standin.fit(meter.calibration, {5: SKIP}, Fitting(rank=8))
    first, _ = standin.fit(meter.calibration, {1: SKIP}, Fitting(rank=8))
    assert torch.equal(first[1].down, both[1].down) and not torch.equal(alone[5].down, both[5].down)
    together, apart = meter.measure([both, {**first, **alone}])
    assert together.total < apart.total


def test_harm_is_what_the_stream_behind_loses():
    module = small.build("llama")
    meter = small.meter("llama", module, small.prompts([8] * 10), [2])
    fitting = Fitting(rank=2, null=1e-12, held_out=0)
    _, trials = standin.fit(meter.calibration, {2: SKIP}, fitting, tried={5})
    found, _ = standin.fit(meter.calibration, {2: SKIP}, fitting)
    row, total = meter.tracer.row, 0.0
    for trace in meter.calibration.traces():
        dense = pruned = trace.x
        for i in range(6):
            before, dense = pruned, row.sub_blocks[i].apply(dense, trace.calls[i])
            pruned = found[i].apply(pruned) if i in found else row.sub_blocks[i].apply(pruned, trace.calls[i])
        weights = 1 / dense.double().square().mean(dim=-1)
        for stream, sign in ((trials[5].standin.apply(before), 1), (pruned, -1)):
            total += sign * float(((stream.double() - dense.double()).square().sum(dim=-1) * weights).sum())
    assert trials[5].harm == pytest.approx(total, rel=2e-2)  # the stored factors are float16


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_search_is_the_naive_greedy_loop(name, monkeypatch):
    """Every candidate fitted and measured on its own, the least added discrepancy per parameter wins."""
    monkeypatch.setattr(with_standins, "SCREENED", 99)
    module = small.build(name, layers=3)
    fitted = small.meter(name, module, small.prompts(LENGTHS * 3), [2]).calibration
    ranked = small.meter(name, module, small.prompts(LENGTHS, seed=5), [2])
    fitting, row = Fitting(rank=3, swaps=0), fitted.tracer.row
    settings = Settings(0.4, (), 1, False, 0.0)
    order: list[int] = []
    while row.sparsity(order) < 0.4:
        now = standin.fit(fitted, assignment(order), fitting)[0]
        current = ranked.measure([now])[0].total if order else 0.0
        costs = {}
        for i in range(len(row)):
            if i not in order:
                now, trials = standin.fit(fitted, assignment(order), fitting, tried={i})
                (d,) = ranked.measure([{**now, i: trials[i].standin}])
                costs[i] = (d.total - current) / row.parameter_counts[i]
        order.append(min(costs, key=lambda i: (costs[i], i)))
    searched = with_standins.search(fitted, ranked, settings, fitting)
    assert list(searched.entry.order) == order
    (level,) = searched.entry.levels
    (wanted,) = ranked.measure([assignment(order, standins=searched.standins[len(order)])])
    assert level.discrepancy == wanted.total and level.reuse == {} and set(searched.standins[len(order)]) == set(order)
    assert len(searched.entry.extensions["search"]["steps"]) == len(order)


def test_equals_but_for_rounding():
    """The lowest place goes, and nothing is exchanged for it."""
    scores = {7: 1.0, 3: 1.000001, 5: 1.000002, 1: 1.1}
    assert skip.lowest(scores, ROUNDING) == 3 and skip.lowest(scores, ROUNDING, 5) == 5
    assert skip.lowest(scores, ROUNDING, 1) == 3 and skip.lowest(scores, 0.0, 5) == 7
    assert skip.lowest({4: math.inf, 2: math.inf}, ROUNDING) == 2


def test_states_of_repairs_that_are_gone_are_let_go():
    module = small.build("t5")
    meter = small.meter("t5", module, small.prompts(LENGTHS * 3), [2])
    for _ in range(3):
        fitted, _ = standin.fit(meter.calibration, {2: SKIP, 5: SKIP}, Fitting(3))
        meter.lowest([fitted, {**fitted, 6: SKIP}], 1)
        held = {action for place in meter._states._held for action in place.fitted}
        assert held == set(fitted.values())


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_exchange_is_the_best_of_its_kind(name, monkeypatch):
    """One removed sub-block comes back, another of its kind goes, where that lowers D: against trying all of them."""
    monkeypatch.setattr(with_standins, "SCREENED", 99)
    module = small.build(name)
    fitted = small.meter(name, module, small.prompts(LENGTHS * 3), [2]).calibration
    ranked = small.meter(name, module, small.prompts(LENGTHS, seed=5), [2])
    fitting, tried = Fitting(rank=3), 0
    for order in ((0, 1, 6), (2, 5, 3), (7, 4)):
        search = with_standins.Search(fitted, ranked, Settings(0.3, (), 1, False, 0.0), fitting, lambda progress: None)
        search.skips = SkipList(order, 0.0)
        (place,) = search.least_at_home(1)
        assert place in order
        left = [i for i in order if i != place]
        costs = {}
        for i in range(place % 2, 8, 2):
            if i not in left:
                now, trials = standin.fit(fitted, assignment(left), fitting, tried={i})
                costs[i] = ranked.measure([{**now, i: trials[i].standin}])[0].total
        best = min(costs, key=lambda i: (costs[i], i))
        found = search.exchanged(place)
        assert (found is None) == (best == place)
        if found is not None:
            assert found.order == (*left, best) and found.discrepancy == costs[best] < costs[place]
            tried += 1
    assert tried, "no exchange was worth it: the test shows nothing"


def test_search_goes_on_where_it_was_stopped():
    module = small.build("t5")
    fitted = small.meter("t5", module, small.prompts(LENGTHS * 2), [2]).calibration
    ranked = small.meter("t5", module, small.prompts(LENGTHS, seed=5), [2])
    settings, fitting, saved, lines = Settings(0.4, (0.2,), 1, True, 0.05), Fitting(rank=2), [], []
    whole = with_standins.search(fitted, ranked, settings, fitting, lines.append, saved.append)
    lengths = [len(beam[0].order) for beam in saved]
    assert lengths == list(range(1, len(saved) + 1)), "a save after each step"
    assert all(0 <= p.done < 1 for p in lines) and lines[-1].line.startswith("step ")
    again = with_standins.search(fitted, ranked, settings, fitting, beam=saved[1])
    assert again.entry.order == whole.entry.order
    assert [x.sparsity for x in whole.entry.levels] == [x.sparsity for x in again.entry.levels]
    assert len(whole.entry.levels) == 2 and whole.entry.levels[0].reuse is not None
    with pytest.raises(SearchError, match="can't be reached"):
        with_standins.search(fitted, ranked, Settings(0.99, (), 1, False, 0.0), fitting)


def test_what_a_tick_raises_ends_a_fit():
    """Between any two batches: in ComfyUI that is the Stop button."""
    meter = small.meter("llama", small.build("llama"), small.prompts(LENGTHS), [2])
    shares = []

    def tick(share: float) -> None:
        shares.append(share)
        if len(shares) == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        standin.fit(meter.calibration, {3: SKIP, 6: SKIP}, Fitting(rank=2), tick=tick)
    assert len(shares) == 17 and shares == sorted(shares) and 0 <= shares[0] <= shares[-1] < 1
    assert len({round(share, 6) for share in shares}) == 2, "a tick for every batch, 11 of them, at every place"


def test_a_stopped_search_claims_no_discrepancy():
    from skrr_engine.search.run import unfinished

    row = families.find(small.build("t5"))
    entry = unfinished(row, SkipList((3, 6), 0.5, (0.2, 0.5)), Settings(0.4), standins=True)
    assert [level.discrepancy for level in entry.levels] == [None, None] and "steps" not in entry.extensions["search"]


def test_auto_takes_the_least_rank_that_is_enough():
    module = small.build("llama")
    fitted = small.meter("llama", module, small.prompts([10] * 40), [2]).calibration
    ranked = small.meter("llama", module, small.prompts([10] * 10, seed=3), [2])
    fitting = Fitting(ranks=(1, 2, 4, 8, 16))
    searched = with_standins.best_rank(fitted, ranked, [3, 6], Settings(0.1, (), 1, False, 0.0), fitting, {})
    (standins,) = searched.standins.values()
    (rank,) = {s.rank for s in standins.values()}
    order, found = list(standins), {}
    for r in fitting.ranks:
        fits, _ = standin.fit(fitted, assignment(order), Fitting(rank=r))
        found[r] = ranked.measure([fits])[0].total
    assert rank == min(r for r, d in found.items() if d <= with_standins.ENOUGH * min(found.values()))


def made(tmp_path: Path, name: str = "t5", rank: int = 3) -> tuple[Plan, dict[int, StandIn], Path]:
    """A plan with stand-ins and a re-use to fall back on, its file written."""
    standins = {3: noise(name, rank), 6: noise(name, rank + 1, 1)}
    standins = {i: StandIn(s.norm, s.down.half(), s.up.half(), s.bias) for i, s in standins.items()}
    level = Level(skipped=3, reuse={3: 5}, sparsity=0.2)
    entry = EncoderPlan(family=small.family_of(name), blocks=4, width=32, order=(3, 6, 0), levels=(level,))
    plan = Plan(encoders={name: entry}, provenance=Provenance(source="test"))
    plan, data = standin_file.encoded(plan, {name: {3: standins}})
    path = tmp_path / "plan.json"
    plan.write(path)
    standin_file.write(standin_file.beside(path), data)
    return plan, standins, path


def test_file_and_plan(tmp_path):
    plan, standins, path = made(tmp_path)
    again = Plan.read(path)
    assert again == plan
    entry, (level,) = again.encoder("t5"), again.encoder("t5").levels
    assert level.standins.ranks == {3: 3, 6: 4}
    assert level.standins.nbytes(32) == sum(s.nbytes for s in standins.values())
    file = standin_file.beside(path)
    assert file.name == "plan.standins.safetensors" and list(load_file(file))[0].startswith("t5.3.")
    found, problem = standin_file.of_level([tmp_path], "t5", entry, level)
    assert problem == "" and set(found.standins) == {3, 6} and not found.units
    for place, s in found.standins.items():
        assert (
            s.norm == "rms" and torch.equal(s.down, standins[place].down) and torch.equal(s.bias, standins[place].bias)
        )
    file.rename(tmp_path / "another name.standins.safetensors")
    found, _ = standin_file.of_level([tmp_path], "t5", entry, level)
    assert found.standins.keys() == {3, 6}, "files are known by their hash"
    (tmp_path / "another name.standins.safetensors").unlink()
    found, problem = standin_file.of_level([tmp_path], "t5", entry, level)
    assert found == Fitted() and "missing" in problem and "\n" not in problem


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: t.pop("t5.3.6.up"), "t5.3.6.up: expected floats"),
        (lambda t, m: t.update({"t5.3.3.down": torch.zeros(3, 31)}), r"expected floats \[3, 32\], found .* \[3, 31\]"),
        (lambda t, m: t.update({"t5.3.3.bias": torch.zeros(32, dtype=torch.int8)}), "found torch.int8"),
        (lambda t, m: t.update({"t5.3.3.bias": torch.full((32,), math.nan)}), "not finite"),
        (lambda t, m: m.update(version="3"), "no stand-ins that this Skrr can read"),
        (lambda t, m: m.update(norms="t5:batch"), "no stand-ins for t5"),
        (lambda t, m: m.update(norms=""), "no stand-ins for t5"),
    ],
)
def test_broken_files(tmp_path, change, words):
    """A file with the right hash and the wrong things in it: one line that names it."""
    plan, _, path = made(tmp_path)
    file = standin_file.beside(path)
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(file)
    change(tensors, metadata)
    save_file(tensors, file, metadata)
    text = path.read_text().replace(plan.encoder("t5").levels[0].standins.sha256, standin_file.sha256(file))
    plan = Plan.from_json(text)
    entry = plan.encoder("t5")
    with pytest.raises(StandInError, match=words) as caught:
        standin_file.of_level([tmp_path], "t5", entry, entry.levels[0])
    assert "\n" not in str(caught.value) and "plan.standins.safetensors" in str(caught.value)


def test_not_safetensors_and_another_hash(tmp_path):
    plan, _, path = made(tmp_path)
    entry = plan.encoder("t5")
    file = standin_file.beside(path)
    with pytest.raises(StandInError, match="can't be read as safetensors"):
        (tmp_path / "x.standins.safetensors").write_bytes(b"nonsense")
        digest = standin_file.sha256(tmp_path / "x.standins.safetensors")
        level = entry.levels[0].model_copy(
            update={"standins": entry.levels[0].standins.model_copy(update={"sha256": digest})}
        )
        standin_file.of_level([tmp_path], "t5", entry, level)
    with pytest.raises(StandInError, match="no stand-ins that this Skrr can read; update Skrr, or get it again$"):
        save_file(
            {"x": torch.zeros(1)}, tmp_path / "y.standins.safetensors", {"format": "skrr-standins", "version": "9"}
        )
        digest = standin_file.sha256(tmp_path / "y.standins.safetensors")
        level = entry.levels[0].model_copy(
            update={"standins": entry.levels[0].standins.model_copy(update={"sha256": digest})}
        )
        standin_file.read(tmp_path / "y.standins.safetensors", "t5", entry, level)
    with pytest.raises(StandInError, match="not the stand-ins that this plan names"):
        standin_file.read(tmp_path / "x.standins.safetensors", "t5", entry, entry.levels[0])
    os.truncate(file, 100)
    assert standin_file.of_level([tmp_path], "t5", entry, entry.levels[0])[0] == Fitted()


@pytest.mark.parametrize(
    ("standins", "words"),
    [
        ({"sha256": "x", "ranks": {"3": 4}}, r"standins.sha256: expected 64 hexadecimal digits"),
        ({"sha256": "a" * 64, "ranks": {"5": 4}}, r"standins.ranks.5: expected one of the 3 sub-blocks"),
        ({"sha256": "a" * 64, "ranks": {"3": 33}}, r"standins.ranks.3: expected at most 32, the width"),
        ({"sha256": "a" * 64, "ranks": {"3": 0}}, r"standins.ranks.*: expected an object like"),
        ({"sha256": "a" * 64, "ranks": {}}, r"standins.ranks: expected an object like"),
        ({"sha256": "a" * 64, "ranks": {"03": 4}}, r"standins.ranks.*: expected an object like"),
        ({"ranks": {"3": 4}}, r"standins.sha256: missing"),
        ({"sha256": "a" * 64, "ranks": {"3": 4}, "path": "../x"}, r"standins.path: unknown field"),
        ([], r"standins: expected an object"),
    ],
)
def test_broken_plans(tmp_path, standins, words):
    _, _, path = made(tmp_path)
    raw = json.loads(path.read_text())
    raw["encoders"]["t5"]["levels"][0]["standins"] = standins
    with pytest.raises(PlanError, match=words) as caught:
        Plan.from_json(json.dumps(raw))
    assert "\n" not in str(caught.value)


PROMPTS = ["a red cube", "two blue cats under a table", "a dog", "a cat", "two dogs", "a cube", "a blue table", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder) -> Path:
    """A small T5 as a transformers folder, prompts.txt in it, and the same as one file."""
    path = tmp_path_factory.mktemp("encoder")
    module = small.build("t5", 4)
    module.save_pretrained(path)
    for file in tokenizer_folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    (path / "prompts.txt").write_text("\n".join([*PROMPTS, *(f"{p} and {q}" for p in PROMPTS for q in PROMPTS)]))
    state = {k: v.contiguous() for k, v in module.state_dict().items() if k != "encoder.embed_tokens.weight"}
    save_file(state, path / "whole_file.safetensors")
    return path


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory) -> Path:
    """A plan with stand-ins from the command line."""
    out = tmp_path_factory.mktemp("plan") / "mine.json"
    options = [
        "--sparsity",
        "0.4",
        "--levels",
        "0.2",
        "--standins",
        "4",
        "--quiet",
        "--prompts",
        folder / "prompts.txt",
    ]
    assert main(["search", "--encoder", str(folder), "--out", str(out), *map(str, options)]) == 0
    return out


def test_command_line_search(found, folder, capsys):
    plan = Plan.read(found)
    entry = plan.encoder("t5")
    assert len(entry.levels) == 2 and all(level.standins is not None for level in entry.levels)
    assert plan.provenance.source == "search" and entry.extensions["search"]["rank"] == 4
    assert main(["show", str(found)]) == 0
    assert "stand-ins" in capsys.readouterr().out


def test_command_line_discrepancy(found, folder, tmp_path, capsys):
    """Measured with the stand-ins where their file is beside the plan, else as skip and re-use, and said so."""
    options = ["--encoder", str(folder), "--prompts", str(folder / "prompts.txt"), "--json"]
    assert main(["discrepancy", *options, "--plan", str(found)]) == 0
    repaired = json.loads(capsys.readouterr().out)
    (tmp_path / "alone.json").write_text(found.read_text())
    assert main(["discrepancy", *options, "--plan", str(tmp_path / "alone.json")]) == 0
    alone = capsys.readouterr()
    assert "stand-ins (*.standins.safetensors) is missing" in alone.err and alone.err.count("\n") <= 2
    bare = json.loads(alone.out)
    assert repaired["D"] < bare["D"] and repaired["standins"] > 0 and bare["standins"] == 0


def test_encode_by_hand(found, folder, tmp_path, capsys):
    """Each prompt's conditioning, dense and pruned and repaired, against plain transformers."""
    from skrr_engine.files.folder import load

    lines = folder / "few.txt"
    lines.write_text("\n".join(PROMPTS))
    encoder = load(str(folder))
    for plan in (None, found):
        out = tmp_path / "out.safetensors"
        options = ["--plan", str(plan)] if plan else []
        assert main(["encode", "--encoder", str(folder), "--prompts", str(lines), "--out", str(out), *options]) == 0
        got = load_file(out)
        assert set(got) == {*map(str, range(len(PROMPTS))), "null"}
        if plan:
            entry = Plan.read(plan).encoder("t5")
            level = entry.levels[-1]
            fitted, _ = standin_file.of_level([plan.parent], "t5", entry, level)
            rewire(encoder.module, encoder.row, fitted.assignment(entry, level))
        for key, prompt in (*((str(i), p) for i, p in enumerate(PROMPTS)), ("null", "")):
            ids = torch.tensor([encoder.tokenize(prompt)])
            wanted = encoder.module(input_ids=ids).last_hidden_state[0]
            assert got[key].dtype == torch.float32 and got[key].shape == wanted.shape
            torch.testing.assert_close(got[key], wanted, rtol=1e-4, atol=1e-5)
    assert main(["encode", "--encoder", str(folder), "--out", str(tmp_path / "no" / "x"), "--prompts", str(lines)]) == 1


def test_apply_writes_them_into_the_file(found, folder, tmp_path, capsys):
    from skrr_engine.files.encoder_file import Checkpoint

    out = tmp_path / "pruned.safetensors"
    whole = folder / "whole_file.safetensors"
    assert main(["apply", "--encoder", str(whole), "--plan", str(found), "--out", str(out), "--name", "t5"]) == 0
    assert main(["verify", str(out)]) == 0
    entry = Plan.read(found).encoder("t5")
    level = entry.levels[-1]
    wanted = standin_file.of_level([found.parent], "t5", entry, level)[0].standins
    pruned = Checkpoint(out)
    standins = pruned.fitted.standins
    assert standins.keys() == wanted.keys() == level.standins.ranks.keys()
    for place, s in wanted.items():
        assert torch.equal(standins[place].down, s.down) and torch.equal(standins[place].up, s.up)
    assert pruned.layout.total == Checkpoint(whole).layout.total, "stand-ins count as no part of the dense encoder"
    assert not any("standins" in key for key in pruned.entries)
    raw = bytearray(out.read_bytes())
    raw[-1] ^= 1
    out.write_bytes(raw)
    assert main(["verify", str(out)]) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--standins", "many"], "--standins many: give a rank, like 16, or auto"),
        (["--standins", "0"], "a rank of 0 makes no sense"),
        (["--method", "standins"], "--method standins: fits stand-ins; give their rank"),
        (["--standins", "4", "--prompts", "FEW"], "8 prompts are too few"),
    ],
)
def test_command_line_errors(folder, tmp_path, capsys, options, words):
    (folder / "few.txt").write_text("\n".join(PROMPTS))
    options = [str(folder / "few.txt") if o == "FEW" else o for o in options]
    assert main(["search", "--encoder", str(folder), "--out", str(tmp_path / "p.json"), *options]) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in err and not (tmp_path / "p.json").exists()


def test_resume(folder, found, tmp_path):
    """The state of a search with stand-ins is its own: another rank starts anew, with a clear word."""
    from skrr_engine.search.resume import State

    state = tmp_path / "state"
    options = [
        "--encoder",
        str(folder),
        "--prompts",
        str(folder / "prompts.txt"),
        "--sparsity",
        "0.4",
        "--levels",
        "0.2",
    ]
    options += ["--quiet", "--resume", str(state), "--out", str(tmp_path / "p.json")]
    saved = []
    original = State.save
    try:
        State.save = lambda self, beam: (original(self, beam), saved.append(self.path.read_bytes()))
        assert main(["search", *options, "--standins", "4"]) == 0
    finally:
        State.save = original
    assert not state.exists() and len(saved) > 2
    first = (tmp_path / "p.json").read_text()
    assert Plan.from_json(first).encoder("t5").order == Plan.read(found).encoder("t5").order
    state.write_bytes(saved[1])
    assert main(["search", *options, "--standins", "4"]) == 0
    assert Plan.read(tmp_path / "p.json").encoder("t5").order == Plan.from_json(first).encoder("t5").order
    state.write_bytes(saved[1])
    assert main(["search", *options, "--standins", "2"]) == 1


def test_norms_are_those_of_the_families():
    norms = {f.name: f.norm for f in families.FAMILIES}
    assert norms.pop("clip") == "layer" and {*norms.values()} == {"rms"}
    x = torch.randn(2, 5, 32) * 7 + 3
    for norm, apply in NORMS.items():
        out = apply(x)
        torch.testing.assert_close(out.square().mean(dim=-1), torch.ones(2, 5), rtol=1e-4, atol=1e-4)
        assert (out.mean(dim=-1).abs().max() < 1e-5) == (norm == "layer")


def test_path_keeps_its_trail():
    assert SkipList((1, 2), 0.5, (0.1, 0.5)) == SkipList((1, 2), 0.5)
