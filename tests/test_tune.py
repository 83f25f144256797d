"""Stand-ins tuned together on D: the gradient beside autograd's own, and what it does."""

import copy

import pytest
import small
import torch

from skrr_engine.encoder import families
from skrr_engine.encoder.actions import SKIP, Narrow, Reuse
from skrr_engine.encoder.rewire import rewire
from skrr_engine.encoder.standin import StandIn, StandInModule, standin_of
from skrr_engine.encoder.trace import Tracer
from skrr_engine.encoder.units import units_of
from skrr_engine.measure.calibration import Batch, Calibration
from skrr_engine.measure.meter import Meter
from skrr_engine.search import repair
from skrr_engine.search.job import Job
from skrr_engine.search.repair import filled
from skrr_engine.search.resume import State
from skrr_engine.search.settings import Settings
from skrr_engine.standins import tune
from skrr_engine.standins.fit import Fitting

LENGTHS = (7, 9, 12)
"""Of the batches, eight prompts each."""


def calibrated(name: str, module, seed: int = 0, memory: int | None = None) -> Calibration:
    alike = ([ids for (ids,) in small.prompts([length] * 8, seed)] for length in LENGTHS)
    batches = [small.batch(name, ids) for ids in alike]
    tracer = Tracer(module, families.find(module))
    return Calibration(module, tracer, batches, small.batch(name, [[2]]), memory)


def removed(calibration: Calibration, name: str) -> dict:
    """Something of each kind, with stand-ins of rank 2."""
    row, narrowed = calibration.tracer.row, (2, 3) if name in small.NARROWED else (2,)
    half = {place: Narrow(torch.arange(0, units_of(row, place).count, 2)) for place in narrowed}
    return filled(calibration, {1: SKIP, 3: SKIP, **half, 4: SKIP}, Fitting(rank=2)) | {7: Reuse(5)}


def gradients(calibration: Calibration, actions: dict, projection=None) -> dict:
    """Of D on one step's prompts: place -> down's, up's and bias'."""
    tuning = tune.Tuning(calibration, projection, actions, lambda share: None)
    for own in tuning.learned.values():
        for p in own:
            p.requires_grad_(True)
    tuning.gradient()
    return {place: [p.grad for p in own] for place, own in tuning.learned.items()}


def expected(calibration: Calibration, actions: dict, projection=None) -> dict:
    """The same through the rewired encoder's own forward. All prompts of a step are `LENGTHS`', drawn as they are."""
    tuning = tune.Tuning(calibration, projection, actions, lambda share: None)
    twin = copy.deepcopy(calibration.encoder).requires_grad_(False)
    rewire(twin, families.find(twin), tuning.loose)
    lot, numbers = tune.random.Random(0), range(1, len(tuning.pieces))
    chosen = []
    while sum(tuning.pieces[n].prompts for n in chosen) < tune.PROMPTS:
        chosen += lot.choices(numbers, [tuning.pieces[n].prompts for n in numbers])

    def read(module, number):
        ((t, _),) = tuning.pieces[number].run(module)
        return t if projection is None else projection(t)

    with torch.enable_grad():
        for module in twin.modules():
            if isinstance(module, StandInModule):
                module.requires_grad_(True)
        for group in ([0], chosen):
            pairs = [(read(calibration.encoder, n).detach(), read(twin, n)) for n in group]
            (sum((a - b).square().sum() for a, b in pairs) / sum(a.numel() for a, _ in pairs)).backward()
    found = {}
    for module in twin.modules():
        if isinstance(module, StandInModule):
            (place,) = (p for p, own in tuning.learned.items() if own[0].data_ptr() == module.down.weight.data_ptr())
            found[place] = [module.down.weight.grad, module.up.weight.grad, module.up.bias.grad]
    return found


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", small.BUILDERS)
def test_the_gradient_is_that_of_the_encoders_own_forward(name):
    calibration = calibrated(name, small.build(name))
    torch.manual_seed(0)
    projection = torch.nn.Linear(calibration.tracer.row.width, 5).requires_grad_(False)
    actions = removed(calibration, name)
    for through in (None, projection):
        own, other = gradients(calibration, actions, through), expected(calibration, actions, through)
        assert own.keys() == other.keys() == {1, 2, 3, 4}
        for place, grads in own.items():
            for a, b in zip(grads, other[place], strict=True):
                assert b.norm() > 0 and (a - b).norm() < 1e-3 * b.norm()


def test_tokens_that_are_not_read_do_not_count(fitted):
    """Whatever they hold of the encoder."""
    plain, actions = fitted

    def batch(ids: list, hidden: int) -> Batch:
        def run(module, times: int = 1):
            ((t, _),) = small.batch("llama", ids).run(module, times)
            more = 3 * t[:, :1].expand(-1, hidden, -1)
            mask = torch.ones(t.shape[0], t.shape[1] + hidden)
            mask[:, t.shape[1] :] = 0
            return [(torch.cat([t, more], dim=1), mask)] if hidden else [(t, None)]

        return Batch(run, len(ids))

    found = []
    for hidden in (0, 5):
        ids = [[own for (own,) in small.prompts([length] * 2)] for length in (7, 9)]
        batches, null = [batch(own, hidden) for own in ids], batch([[2]], hidden)
        found.append(gradients(Calibration(plain.encoder, plain.tracer, batches, null), actions))
    for place, grads in found[0].items():
        assert all(torch.equal(a, b) for a, b in zip(grads, found[1][place], strict=True))


@pytest.fixture(scope="module")
def fitted():
    """An encoder, its calibration, and an assignment with fitted stand-ins."""
    with torch.no_grad():
        calibration = calibrated("llama", small.build("llama"))
        return calibration, removed(calibration, "llama")


def test_tuning_lowers_the_discrepancy_and_changes_no_weight(fitted):
    calibration, actions = fitted
    weights = copy.deepcopy(calibration.encoder.state_dict())
    before = {place: standin_of(action).down.clone() for place, action in actions.items() if standin_of(action)}
    ticks = []
    made = tune.tuned(calibration, None, actions, 12, ticks.append)
    assert ticks == sorted(ticks) and 0 <= ticks[0] < 0.01 and 0.9 < ticks[-1] < 1
    first, second = Meter(calibration).measure([actions, made])
    assert second.total < 0.98 * first.total
    assert all(torch.equal(weights[key], tensor) for key, tensor in calibration.encoder.state_dict().items())
    assert made[7] == Reuse(5) and made[2].units is actions[2].units
    for place, down in before.items():
        standin = standin_of(made[place])
        assert torch.equal(standin_of(actions[place]).down, down) and not torch.equal(standin.down, down)
        assert standin.nbytes == standin_of(actions[place]).nbytes and not standin.down.requires_grad


def test_the_same_on_every_run_and_whatever_memory_there_is(fitted):
    calibration, actions = fitted
    little = calibrated("llama", calibration.encoder, memory=2**16)
    found = [tune.tuned(c, None, actions, 2) for c in (calibration, calibration, little)]
    for place in (1, 2, 3, 4):
        first, *others = (standin_of(made[place]) for made in found)
        assert all(torch.equal(first.up, other.up) and torch.equal(first.bias, other.bias) for other in others)


def test_weights_of_inference_mode(fitted):
    """ComfyUI loads and runs within it; its tensors can't be part of a gradient as they are."""
    calibration, actions = fitted
    plain = tune.tuned(calibration, None, actions, 2)
    with torch.inference_mode():
        module = copy.deepcopy(calibration.encoder)
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
        inside = calibrated("llama", module)
        kept = dict(module.named_parameters())
        assert all(parameter.is_inference() for parameter in kept.values())
        made = tune.tuned(inside, None, actions, 2)
        assert all(parameter is kept[name] for name, parameter in module.named_parameters())
    for place in (1, 2, 3, 4):
        assert torch.equal(standin_of(made[place]).up, standin_of(plain[place]).up)


def test_out_of_memory_is_tried_again_with_less_held(fitted, monkeypatch):
    calibration, actions = calibrated("llama", fitted[0].encoder, memory=2**22), fitted[1]
    tuning = tune.Tuning(calibration, None, actions, lambda share: None)
    add, tries = tuning._add, []

    def refusing(*given):
        tries.append((calibration.memory, tuning.goals.capacity))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return add(*given)

    monkeypatch.setattr(tuning, "_add", refusing)
    found = tuning.run(1)
    assert tries == [(2**22, 2**20), (2**21, 2**19)]
    plain = tune.tuned(fitted[0], None, actions, 1)
    assert torch.equal(standin_of(found[1]).up, standin_of(plain[1]).up)


def test_what_is_drawn_does_not_depend_on_batches(fitted):
    """Nor on how many of them were halved."""
    calibration, actions = fitted
    ids = [own for (own,) in small.prompts([7] * 8)]

    def batch(ids: list) -> Batch:
        half = len(ids) // 2
        return Batch(small.batch("llama", ids).run, len(ids), lambda: (batch(ids[:half]), batch(ids[half:])))

    found = []
    for size in (8, 3):
        batches = [batch(ids[i : i + size]) for i in range(0, 8, size)]
        own = Calibration(calibration.encoder, calibration.tracer, batches, small.batch("llama", [[2]]))
        found.append(tune.tuned(own, None, actions, 2))
    for place in (1, 2, 3, 4):
        first, second = (standin_of(made[place]) for made in found)
        assert torch.equal(first.up, second.up) and torch.equal(first.bias, second.bias)


def test_a_level_that_can_not_be_tuned_or_gains_nothing_stays_as_fitted(fitted, monkeypatch):
    calibration, actions = fitted
    bare = {place: SKIP for place in (1, 4)}
    meter, told = Meter(calibration), []

    def level(steps: int) -> tuple:
        told.clear()
        return repair.fit_level(calibration, meter, bare, Fitting(rank=2, tuning=steps), lambda s, w: told.append(w))

    plain, before = level(0)
    tuned, after = level(8)
    assert after < before and "tuning" in told and not torch.equal(tuned[1].up, plain[1].up)

    def none(self, *args):
        raise RuntimeError("derivative for aten::_scaled_mm is not implemented\nmore")

    monkeypatch.setattr(tune.Tuning, "gradient", none)
    same, d = level(8)
    assert d == before and torch.equal(same[1].up, plain[1].up)
    assert told[-1] == "not tuned, as the gradient can't be taken: derivative for aten::_scaled_mm is not implemented:"
    shifted = {p: StandIn(s.norm, s.down, s.up, s.bias + 1) for p, s in plain.items()}
    monkeypatch.setattr(repair, "tuned", lambda *args: shifted)
    same, d = level(8)
    assert d == before and torch.equal(same[1].bias, plain[1].bias)


class Stop(Exception):
    """Whoever watches the work ends it."""


def test_an_interrupted_tuning_goes_on_where_it_stood(fitted, tmp_path):
    calibration, actions = fitted
    whole = tune.tuned(calibration, None, actions, 12)
    kept = tune.Kept(tmp_path / "it.tuning", "key")

    def stopping(share: float) -> None:
        if share > 0.7:
            raise Stop

    with pytest.raises(Stop):
        tune.tuned(calibration, None, actions, 12, stopping, kept)
    shares = []
    again = tune.tuned(calibration, None, actions, 12, shares.append, kept)
    assert shares[0] >= 5 / 12, "it began anew"
    for place in (1, 2, 3, 4):
        for part in ("down", "up", "bias"):
            assert torch.equal(*(getattr(standin_of(made[place]), part) for made in (whole, again)))
    shares.clear()
    tune.tuned(calibration, None, actions, 12, shares.append, kept)
    assert not shares, "all steps were done"
    kept.forget()
    assert not kept.path.exists()


@pytest.mark.parametrize("damage", ["another key", "cut short", "not finite", "other shapes", "no numbers"])
def test_what_is_kept_of_another_tuning_is_not_gone_on_with(fitted, tmp_path, damage):
    calibration, actions = fitted
    path = tmp_path / "it.tuning"
    tune.tuned(calibration, None, actions, 5, kept=tune.Kept(path, "another key" if damage == "another key" else "key"))
    data = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(data[:-7])
    elif damage == "not finite":
        path.write_bytes(data[:-4] + torch.tensor([float("nan")]).numpy().tobytes())
    elif damage == "no numbers":
        path.write_bytes(b"{}")
    elif damage == "other shapes":
        actions = {place: action for place, action in actions.items() if place != 1}
    plain = tune.tuned(calibration, None, actions, 2)
    found = tune.tuned(calibration, None, actions, 2, kept=tune.Kept(path, "key"))
    for place in (2, 3, 4):
        assert torch.equal(standin_of(found[place]).up, standin_of(plain[place]).up)


def test_a_search_goes_on_with_its_tuning(fitted, tmp_path):
    """Beside its state; what was kept is gone when all levels are there."""
    calibration, _ = fitted
    fitting = Fitting(rank=2, tuning=10)
    texts = [str(number) for number in range(16)]
    job = Job("it", lambda prompts, race: calibration, texts, Settings(0.3), None, fitting, "widths")
    state, tables, seen = State(tmp_path / "state.json", "key"), [], []

    def stopping(progress) -> None:
        if "tuning" in progress.line:
            seen.append(progress)
            if list(tmp_path.glob("*.tuning")):
                raise Stop

    with pytest.raises(Stop):
        job.run(stopping, tables.append, (), state)
    first = len(seen)
    found = job.run(lambda p: seen.append(p) if "tuning" in p.line else None, tables.append, tables[-1], state)
    assert 0 < len(seen) - first < 1.5 * first and not list(tmp_path.glob("*.tuning"))
    plain = job.run(lambda p: None, tables.append, tables[-1])
    (end,) = found.standins
    assert all(torch.equal(own.up, plain.standins[end][place].up) for place, own in found.standins[end].items())
