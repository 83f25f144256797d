"""The experiments' own numbers and tables, on made-up rows: nothing is painted here."""

import itertools

import numpy as np
import pytest
import small
import torch

from benchmarks import pages
from benchmarks.reproduce import __main__ as reproduce
from benchmarks.reproduce import criterion, lab, null_term, pairs, theory
from skrr_engine.encoder.actions import SKIP, Reuse
from skrr_engine.search import naive


def test_frechet():
    """Of samples with known means and covariances: |a - b|^2 + tr(A + B - 2 (A B)^(1/2))."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(400, 3))
    x = (x - x.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T  # exactly standard
    a, b = x * [1, 2, 3] + [0, 0, 5], x * [2, 2, 1] + [3, 0, 1]
    assert null_term.frechet(a, b) == pytest.approx(9 + 16 + 1 + 0 + 4)
    turn = np.array([[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]])
    assert null_term.frechet(a @ turn, b @ turn) == pytest.approx(null_term.frechet(a, b))
    assert null_term.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_looks_are_the_mean_brightness_of_squares():
    pictures = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    pictures[1, :8, 8:16] = (255, 0, 51)
    found = null_term.looks(pictures)
    assert found.shape == (2, 64) and not found[0].any()
    assert found[1, 1] == pytest.approx((1 + 0 + 0.2) / 3) and found[1].sum() == pytest.approx(found[1, 1])


def test_pairs_to_paint():
    """Only pairs with a high cosine are told apart by the null norm, growing and shrinking alike."""
    rows = [
        {"pair": pair, "cosine": c, "null_norm": n, "mse": m, "null": 0.0}
        for m, (pair, c, n) in enumerate(
            [((1, 3), 0.9, 1.1), ((7, 9), 0.9, 4.0), ((3, 5), 0.85, 0.1), ((5, 7), 0.85, 1.0), ((3, 7), 0.5, 90.0)]
        )
    ]
    found = pairs.chosen(rows)
    assert [row["pair"] for row in found["null norm as it was"]] == [(5, 7), (1, 3)]
    assert [row["pair"] for row in found["null norm far off"]] == [(3, 5), (7, 9)]
    assert {row["pair"] for row in found["any"]} == {row["pair"] for row in rows[: pairs.SHOWN]}
    assert [row["pair"] for row in pairs.disjoint([*rows[:1], {"pair": (3, 9)}, *rows[1:]])] == [(1, 3), (7, 9)]


def test_what_the_condition_says():
    """Counted by hand."""
    rows = [
        {"where": "alone", "place": place, "theta": theta, "moved": moved, "gain": gain}
        for place, theta, moved, gain in [(0, 0.9, 0.5, 0.5), (2, 1.4, 0.9, 0.9), (4, 1.3, 2, 2), (6, 0.8, 3, 3)]
    ]
    rows += [{"where": "plan 0", "place": 1, "theta": 1.4, "moved": 1, "gain": 1.5}]
    found = {s["name"]: s for s in theory.summary(rows)}
    alone = found["attention, alone"]
    assert (alone["tries"], alone["accepted"], alone["held accepted"], alone["held refused"]) == (4, 2, 1, 1)
    assert alone["moved"] == pytest.approx(1) and alone["moved tells"] == 1 and alone["theta tells"] == 0.25
    assert found["all"]["tries"] == 5 and found["within skip lists"]["accepted"] == 0


def test_tries_are_those_of_the_printed_algorithm():
    """Every sub-block alone against both neighbours; and along a skip list as algorithm 2 goes: what it accepts is what
    lowers D here, in turn."""
    with torch.no_grad():
        meter = small.meter("llama", small.build("llama"), small.prompts([6, 6]), [2])
        order = [2, 5, 1]
        rows = theory.tries(meter, [order])
        alone = [t for t in rows if t["where"] == "alone"]
        assert [(t["place"], t["target"]) for t in alone[:4]] == [(0, 2), (1, 3), (2, 0), (2, 4)] and len(alone) == 12
        skipped, reused = (meter.measure([{2: action}])[0].total for action in (SKIP, Reuse(4)))
        assert alone[3]["gain"] == pytest.approx(reused / skipped, rel=1e-4)
        mapping, _ = naive.reuse(lambda removed: meter.measure([removed])[0].total, order, 8)
        best = {}
        for t in (t for t in rows if t["where"] != "alone"):
            best[t["place"]] = min(best.get(t["place"], t), t, key=lambda t: t["gain"])
        assert mapping == {place: t["target"] for place, t in best.items() if t["gain"] < 1}
        slopes, *made = theory.bounds(meter, {"skip list at 42%": order})
        assert len(slopes["slopes"]) == 8 and all(row["holds"] for row in made)
        assert theory.show_bounds(made).count("\n") == 4


def test_what_is_not_there_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "CACHE", tmp_path)
    still, busy = lab.Lab(lab.QUICK, measuring=False), lab.Lab(lab.QUICK)
    assert lab.known(lambda: still.kept(("a", 1), lambda: {"x": 1})) == []
    assert busy.kept(("a", 1), lambda: {"x": 1})["x"] == 1
    (row,) = lab.known(lambda: still.kept(("a", 1), lambda: {"x": 2}))
    assert row["x"] == 1
    assert lab.known(lambda: still.kept(("a", 2), lambda: {"x": 2})) == []


def test_rows_are_grouped_by_level_and_name():
    rows = [
        {"level": level, "name": name, "seed": seed}
        for seed, level, name in itertools.product((0, 1), (0.42, 0.25), ("b", "a"))
    ]
    found = criterion.grouped(rows)
    assert list(found) == [(0.25, "b"), (0.25, "a"), (0.42, "b"), (0.42, "a")]
    assert all([row["seed"] for row in own] == [0, 1] for own in found.values())
    assert lab.spread([1.0]) == "1.00" and lab.spread([1.0, 2.0]) == "1.50 ± 0.71"


def test_every_table_has_its_place_on_the_page():
    text = reproduce.PAGE.read_text(encoding="utf-8")
    for experiment in reproduce.EXPERIMENTS.values():
        for mark in experiment.tables:
            assert text.count(f"<!-- {mark} -->") == 1, mark
    assert text.count(pages.END) == sum(len(e.tables) for e in reproduce.EXPERIMENTS.values())
