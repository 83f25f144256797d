"""The rooms of the code: which may import which, and that the page that shows them is up to date."""

import ast

import pytest

from docs import make_architecture as house


def place(order, name: str) -> int:
    return order.index(name.split(".")[1]) if "." in name else -1


def test_no_arrow_runs_back_in_the_engine():
    rooms = [f"skrr_engine.{name}" for name in house.ENGINE]
    back = [
        arrow
        for arrow in house.arrows()
        if house.room(arrow.source) in rooms
        and house.room(arrow.target) in rooms
        and place(house.ENGINE, house.room(arrow.target)) > place(house.ENGINE, house.room(arrow.source))
    ]
    assert back == [], "a room imports one to its right"


def test_the_engine_knows_nothing_of_its_host():
    assert not [a for a in house.arrows() if a.source.startswith("skrr_engine") and a.target.startswith("nodes")]
    others = {name: house.foreign(path) for name, path in house.modules().items()}
    host = {"comfy", "comfy_api", "folder_paths", "nodes", "server", "execution"}
    engine = {name: found for name, found in others.items() if name.startswith("skrr_engine")}
    assert {name: found & host for name, found in engine.items() if found & host} == {}
    assert {name for name, found in engine.items() if "transformers" in found} <= {"skrr_engine.files.folder"}
    drawing = {name: found for name, found in others.items() if name.startswith("nodes.drawing")}
    assert {name for name, found in drawing.items() if found & host} == set()
    light = ("skrr_engine.plan", "skrr_engine.errors", "skrr_engine.disk.atomic", "skrr_engine.measure.prompts")
    assert {name for name, found in engine.items() if name.startswith(light) and "torch" in found} == set()


def test_no_arrow_runs_back_in_the_nodes():
    """Drawings know neither host nor nodes, the host no nodes."""
    order = [f"nodes.{name}" if name else "nodes" for name in house.NODES]
    for arrow in house.arrows():
        source, target = house.room(arrow.source), house.room(arrow.target)
        if {source, target} <= set(order):
            assert order.index(target) <= order.index(source), arrow


@pytest.mark.parametrize("name, path", house.modules().items(), ids=str)
def test_every_module_says_what_it_is(name, path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_the_page_is_made_from_the_imports():
    assert house.PAGE.read_text(encoding="utf-8") == house.page(), "run: python docs/make_architecture.py"
    for _, where, _ in house.CHANGES:
        assert (house.ROOT / where).exists(), where
