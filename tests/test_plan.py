"""The plan format: what is read, what is refused and in which words, and the plans that Skrr ships."""

from __future__ import annotations

import copy
import json
import os
import pickle
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import paper_plans
from skrr_engine.disk.atomic import replacing
from skrr_engine.plan import model as plans
from skrr_engine.plan.model import EncoderPlan, Level, Plan, Provenance
from skrr_engine.plan.text import MAX_BYTES, MAX_DEPTH, PlanError
from skrr_engine.plan.words import describe_plan

REPO = Path(__file__).resolve().parents[1]
SCHEMA_FILE = REPO / "docs" / "plan.schema.json"
REWRITE_SCHEMA = (
    "python -c \"import json, pathlib, skrr_engine.plan.model as p; pathlib.Path('docs/plan.schema.json')"
    ".write_text(json.dumps(p.json_schema(), indent=2) + '\\n', encoding='utf-8')\""
)
REWRITE_PLANS = "python -m benchmarks.paper_plans"
MISSING = object()


def sample() -> dict[str, Any]:
    return {
        "format": "skrr-plan",
        "version": 1,
        "encoders": {
            "t5xxl": {
                "family": "t5",
                "blocks": 24,
                "width": 4096,
                "order": [46, 5, 6, 11],
                "levels": [
                    {"skipped": 2, "reuse": {"5": 7}, "sparsity": 0.04, "discrepancy": 0.0123},
                    {"skipped": 3, "reuse": {}, "sparsity": 0.05, "extensions": {"fit": [1, None, {"a": 0.5}]}},
                ],
                "extensions": {"by": "ä"},
            },
            "clip_l": {
                "family": "clip",
                "blocks": 12,
                "width": 768,
                "order": [3],
                "levels": [{"skipped": 1, "reuse": {"3": 5}, "sparsity": 0.1, "discrepancy": None}],
            },
        },
        "provenance": {
            "source": "search",
            "projection": "txt_in",
            "denoiser": "flux",
            "prompts": 128,
            "prompts_sha256": "0123456789abcdef" * 4,
            "beam": 3,
            "created_with": "skrr 0.1.0",
        },
    }


def changed(path: tuple, value: Any) -> dict[str, Any]:
    """The sample with one place set to `value`, or left out."""
    data = sample()
    place = data
    for part in path[:-1]:
        place = place[part]
    if value is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


def refusal(text: str | bytes, source: str = "the plan") -> str:
    """The message that a text is refused with: one line, of bounded length, that starts with the source."""
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text, source)
    return checked(caught.value)


def checked(error: PlanError) -> str:
    message = str(error)
    assert message.isprintable() and len(message) < 500, message
    assert ";" in message, f"no remedy: {message}"
    return message


T5 = ("encoders", "t5xxl")
FIRST = (*T5, "levels", 0)
FIRST_TEXT = "encoders.t5xxl.levels[0]"


# Reading


def test_reads_every_field():
    plan = Plan.from_json(json.dumps(sample()))
    t5 = plan.encoder("t5xxl")
    assert (plan.format, plan.version, list(plan.encoders)) == ("skrr-plan", 1, ["t5xxl", "clip_l"])
    assert (t5.family, t5.blocks, t5.width, t5.order) == ("t5", 24, 4096, (46, 5, 6, 11))
    assert t5.levels[0] == Level(skipped=2, reuse={5: 7}, sparsity=0.04, discrepancy=0.0123)
    assert t5.levels[1].extensions == {"fit": [1, None, {"a": 0.5}]}
    assert t5.levels[1].discrepancy is None
    assert t5.extensions == {"by": "ä"}
    assert plan.provenance.model_dump() == sample()["provenance"]


def test_reads_bytes_and_text_alike():
    text = json.dumps(sample(), ensure_ascii=False)
    assert Plan.from_json(text) == Plan.from_json(text.encode())


def test_whole_numbers_may_stand_for_fractions():
    level = Plan.from_json(json.dumps(changed((*T5, "levels", 1, "sparsity"), 1))).encoder("t5xxl").levels[1]
    assert level.sparsity == 1.0 and isinstance(level.sparsity, float)


def test_provenance_needs_a_source_only():
    plan = Plan.from_json(json.dumps(changed(("provenance",), {"source": "manual"})))
    assert plan.provenance == Provenance(source="manual")
    nulls = changed(("provenance",), dict.fromkeys(sample()["provenance"]) | {"source": "manual"})
    assert Plan.from_json(json.dumps(nulls)) == plan


@pytest.mark.parametrize("edge", ["T5-x_9", "a" * 32])
def test_reads_names_at_their_bounds(edge):
    assert edge in Plan.from_json(json.dumps(changed(("encoders", edge), sample()["encoders"]["clip_l"]))).encoders


INTEGER = ["3", True, False, 2.0, 2.5, None, -1, 10**30, [], {}]
MALFORMED = [
    # the envelope
    (("format",), "skrr", "format"),
    (("format",), None, "format"),
    (("format",), ["skrr-plan"], "format"),
    (("format",), MISSING, "format"),
    (("version",), 0, "version"),
    (("version",), 3, "version"),
    (("version",), 1.0, "version"),
    (("version",), True, "version"),
    (("version",), "1", "version"),
    (("version",), MISSING, "version"),
    (("encoders",), MISSING, "encoders"),
    (("encoders",), {}, "encoders"),
    (("encoders",), [], "encoders"),
    (("encoders",), None, "encoders"),
    (("provenance",), MISSING, "provenance"),
    (("provenance",), "search", "provenance"),
    (("extensions",), {}, "extensions"),
    (("self",), 1, "self"),
    (("[key]",), 1, "'[key]'"),
    # names
    (("encoders", ""), {}, "encoders.''"),
    (("encoders", "../t5"), {}, "encoders.'../t5'"),
    (("encoders", "t5\n"), {}, "encoders.'t5\\n'"),
    (("encoders", "5t"), {}, "encoders.5t"),
    (("encoders", "é"), {}, "encoders.'é'"),
    (("encoders", "a" * 33), {}, "encoders." + "a" * 33),
    (("encoders", "[key]"), {}, "encoders.'[key]'"),
    (("encoders", "b"), 3, "encoders.b"),
    (("encoders", "b"), {}, "encoders.b.family"),
    # the encoder
    *[((*T5, "family"), value, "encoders.t5xxl.family") for value in ("", "t 5", 5, None, "a" * 33, "t5\n", MISSING)],
    *[((*T5, "blocks"), value, "encoders.t5xxl.blocks") for value in [*INTEGER, 0, 513, MISSING]],
    *[((*T5, "width"), value, "encoders.t5xxl.width") for value in [*INTEGER, 0, 65_537, MISSING]],
    *[((*T5, "order"), value, "encoders.t5xxl.order") for value in ([], {}, "46", None, MISSING)],
    *[((*T5, "order", 1), value, "encoders.t5xxl.order[1]") for value in [*INTEGER, 48, 1024, 46]],
    *[((*T5, "levels"), value, "encoders.t5xxl.levels") for value in ([], {}, "x", None, MISSING)],
    *[((*T5, "levels", 0), value, FIRST_TEXT) for value in (None, 3, "x", [])],
    *[((*T5, "extensions"), value, "encoders.t5xxl.extensions") for value in (None, 3, "x", [])],
    ((*T5, "depth"), 3, "encoders.t5xxl.depth"),
    # the level
    *[((*FIRST, "skipped"), value, f"{FIRST_TEXT}.skipped") for value in [*INTEGER, 0, 8193, 5, MISSING]],
    *[((*FIRST, "sparsity"), value, f"{FIRST_TEXT}.sparsity") for value in ("0.1", True, None, -0.1, 1.01, 10**400)],
    ((*FIRST, "sparsity"), MISSING, f"{FIRST_TEXT}.sparsity"),
    *[((*FIRST, "discrepancy"), value, f"{FIRST_TEXT}.discrepancy") for value in ("0", False, -1e-9, {}, 10**400)],
    *[((*FIRST, "reuse"), value, f"{FIRST_TEXT}.reuse") for value in (None, [], [[5, 7]], "5", MISSING)],
    *[((*FIRST, "reuse", "5"), value, f"{FIRST_TEXT}.reuse.5") for value in [*INTEGER, 1024]],
    *[
        ((*FIRST, "reuse", key), 7, f"{FIRST_TEXT}.reuse.{shown}")
        for key, shown in (
            ("05", "05"), ("+5", "'+5'"), ("-5", "-5"), (" 5", "' 5'"), ("5.0", "'5.0'"), ("5\n", "'5\\n'"), ("", "''"),
            ("٥", "'٥'"), ("five", "five"), ("1024", "1024"), ("12345", "12345"), ("[key]", "'[key]'"),
        )
    ],
    *[((*FIRST, "extensions"), value, f"{FIRST_TEXT}.extensions") for value in (None, 3, "x", [])],
    ((*FIRST, "reused"), {}, f"{FIRST_TEXT}.reused"),
    # provenance
    *[(("provenance", "source"), value, "provenance.source") for value in ("", "a\nb", "a\u2028b", "x" * 201, 3, None)],
    (("provenance", "source"), MISSING, "provenance.source"),
    *[(("provenance", name), value, f"provenance.{name}") for name in ("projection", "denoiser", "created_with")
      for value in ("", "\x1b[0m", "x" * 201, 3)],
    *[(("provenance", name), value, f"provenance.{name}") for name in ("prompts", "beam")
      for value in ("3", True, 2.0, -1, 10**9 + 1)],
    *[(("provenance", "prompts_sha256"), value, "provenance.prompts_sha256")
      for value in ("", "0" * 63, "0" * 65, "A" * 64, "0" * 64 + "\n", 3)],
    (("provenance", "note"), "x", "provenance.note"),
    (("provenance", "extensions"), {}, "provenance.extensions"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "shown"), MALFORMED)
def test_refuses_a_malformed_field_and_names_it(path, value, shown):
    message = refusal(json.dumps(changed(path, value)))
    assert message.startswith(f"the plan: {shown}: "), message
    assert "expected " in message or "unknown field" in message


# What no JSON schema says: fields that contradict each other
CONTRADICTIONS = [
    ((*T5, "order"), [46, 5, 46], "encoders.t5xxl.order[2]", "once"),
    ((*T5, "order"), [46, 5, 48], "encoders.t5xxl.order[2]", "0 to 47"),
    ((*T5, "blocks"), 23, "encoders.t5xxl.order[0]", "0 to 45"),
    ((*FIRST, "skipped"), 3, "encoders.t5xxl.levels[1].skipped", "at least 4"),
    ((*T5, "levels", 1, "skipped"), 1, "encoders.t5xxl.levels[1].skipped", "at least 3"),
    ((*T5, "levels", 1, "skipped"), 5, "encoders.t5xxl.levels[1].skipped", "at most 4"),
    ((*T5, "levels", 1, "sparsity"), 0.039, "encoders.t5xxl.levels[1].sparsity", "at least 0.04"),
    ((*FIRST, "reuse", "5"), 6, f"{FIRST_TEXT}.reuse.5", "feed-forward sub-block (odd)"),
    ((*FIRST, "reuse", "46"), 7, f"{FIRST_TEXT}.reuse.46", "attention sub-block (even)"),
    ((*FIRST, "reuse", "5"), 49, f"{FIRST_TEXT}.reuse.5", "0 to 47"),
    ((*FIRST, "reuse", "5"), 5, f"{FIRST_TEXT}.reuse.5", "keeps"),
    ((*FIRST, "reuse", "6"), 8, f"{FIRST_TEXT}.reuse.6", "skips"),
    ((*FIRST, "reuse", "99"), 7, f"{FIRST_TEXT}.reuse.99", "skips"),
    ((*T5, "levels", 1, "reuse"), {"46": 6}, "encoders.t5xxl.levels[1].reuse.46", "keeps"),
    ((*T5, "levels", 1, "reuse"), {"11": 13}, "encoders.t5xxl.levels[1].reuse.11", "skips"),
]


@pytest.mark.parametrize(("path", "value", "shown", "says"), CONTRADICTIONS)
def test_refuses_contradictions(path, value, shown, says):
    message = refusal(json.dumps(changed(path, value)))
    assert message.startswith(f"the plan: {shown}: expected ") and says in message, message


def test_a_sub_block_that_a_later_level_skips_may_still_stand_in():
    data = changed((*FIRST, "reuse"), {"5": 11, "46": 6})
    assert Plan.from_json(json.dumps(data)).encoder("t5xxl").levels[0].reuse == {5: 11, 46: 6}


def test_levels_may_share_a_sparsity_but_not_a_length():
    assert Plan.from_json(json.dumps(changed((*T5, "levels", 1, "sparsity"), 0.04)))


def test_a_newer_version_is_what_the_message_is_about():
    data = changed(("version",), 3) | {"shape": "new"}
    del data["encoders"]
    assert "version: expected version 1 or 2 (newer plans need a newer Skrr), found 3" in refusal(json.dumps(data))


def test_messages_show_little_of_the_file():
    name = "\x1b[31m\n" + "x" * 5000
    message = refusal(json.dumps(changed(("provenance", name), name)), source="a\nb.json")
    assert message.startswith("a\\nb.json: provenance.'\\x1b[31m\\nxxxx") and len(message) < 200
    assert len(refusal(json.dumps(changed(("format",), "x" * 5000)))) < 200
    assert "beyond 64 bits" in refusal(json.dumps(changed((*T5, "width"), 10**400)))


def test_an_error_knows_its_parts():
    with pytest.raises(PlanError) as caught:
        Plan.from_json(json.dumps(changed((*FIRST, "reuse", "5"), 6)), "my.json")
    error = caught.value
    assert isinstance(error, ValueError) and error.__cause__ is None
    assert error.path == ("encoders", "t5xxl", "levels", 0, "reuse", "5") and error.source == "my.json"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# The text


def doubled(text: str, before: str, added: str) -> str:
    assert text.count(before) == 1
    return text.replace(before, added + before)


@pytest.mark.parametrize(
    ("before", "added", "shown"),
    [
        ('"version"', '"version": 1, ', "version"),
        ('"t5xxl"', '"t5xxl": {}, ', "encoders.t5xxl"),
        ('"5": 7', '"5": 9, ', f"{FIRST_TEXT}.reuse.5"),
        ('"5": 7', '"\\u0035": 9, ', f"{FIRST_TEXT}.reuse.5"),
        ('"a": 0.5', '"a": 1, ', "encoders.t5xxl.levels[1].extensions.fit[2].a"),
        ('"beam"', '"beam": 3, ', "provenance.beam"),
    ],
)
def test_refuses_doubled_fields_anywhere(before, added, shown):
    assert f"the plan: {shown}: expected every field once" in refusal(doubled(json.dumps(sample()), before, added))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize(
    ("before", "shown"),
    [
        ("0.0123", f"{FIRST_TEXT}.discrepancy"),
        ("0.04", f"{FIRST_TEXT}.sparsity"),
        ("0.5", "encoders.t5xxl.levels[1].extensions.fit[2].a"),
        ("128", "provenance.prompts"),
    ],
)
def test_refuses_numbers_that_are_not_finite(number, before, shown):
    text = json.dumps(sample())
    assert f"the plan: {shown}: expected a finite number" in refusal(text.replace(f": {before}", f": {number}"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected JSON, found a fault at line 1, column 1"),
        ("{", "line 1, column 2"),
        ('{"format": "skrr-plan",\n "version": 1,}', "line 2"),
        ("{} {}", "Extra data"),
        ("{'format': 1}", "expected JSON"),
        ('{"a": "\n"}', "expected JSON"),
        ("[]", "expected an object with format"),
        ("null", "found null"),
        ("3", "found 3"),
        ('"x"', "found 'x'"),
        ("NaN", "expected a finite number"),
        ("[" * 60_000, "at most 32 levels of nesting"),
        ('{"a":' * 10_000, "at most 32 levels of nesting"),
        ('{"a":' * 40 + "1" + "}" * 40, "at most 32 levels of nesting"),
        ("[" * 900 + "]" * 900, "at most 32 levels of nesting"),
        ("9" * 5_000, "expected"),
        ("\ufeff{}", "byte order mark"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b"\xff\xfe{\0}\0", "expected UTF-8"),
        ('{"a": "é"}'.encode("latin-1"), "expected UTF-8"),
        (json.dumps(sample()).encode("utf-32"), "expected UTF-8"),
        ("\udc80", "expected UTF-8"),
        ('{"format": "\\ud800"}', "whole Unicode"),
        ('{"\\ud800": 1}', "whole Unicode"),
        (None, "expected JSON text, found NoneType"),
    ],
)
def test_refuses_what_is_no_plan_text(text, says):
    message = refusal(text)
    assert message.startswith("the plan: ") and says in message, message


def test_the_text_is_bounded_in_bytes():
    text = json.dumps(sample())
    full = text + " " * (MAX_BYTES - len(text))
    assert Plan.from_json(full) == Plan.from_json(full.encode())
    for longer in (full + " ", (full + " ").encode(), " " + "é" * (MAX_BYTES // 2)):
        assert "expected at most 65536 bytes" in refusal(longer)


def test_extensions_nest_up_to_the_bound():
    def nest(depth: int) -> dict[str, Any]:
        return {"a": nest(depth - 1)} if depth else {}

    room = MAX_DEPTH - len((*FIRST, "extensions"))
    plan = Plan.from_json(json.dumps(changed((*FIRST, "extensions"), nest(room))))
    assert Plan.from_json(plan.to_json()) == plan
    assert "32 levels" in refusal(json.dumps(changed((*FIRST, "extensions"), nest(room + 1))))


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_text_is_a_plan_or_one_line(text):
    refusal(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.data())
def test_any_json_in_any_place_is_a_plan_or_one_line(data):
    """Replaces one place of a good plan by anything, and adds anything beside it."""
    whole, path = sample(), []
    place: Any = whole
    while isinstance(place, (dict, list)) and place and (not path or data.draw(st.booleans())):
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        path.append((place, key))
        place = place[key]
    holder, key = path[-1]
    holder[key] = data.draw(JSON)
    if isinstance(holder, dict):
        holder.update(data.draw(st.dictionaries(st.text(max_size=5), JSON, max_size=1)))
    try:
        plan = Plan.from_json(json.dumps(whole))
    except PlanError as error:
        checked(error)
    else:
        assert Plan.from_json(plan.to_json()) == plan


# Writing

NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9_-]{0,31}", fullmatch=True)
TEXTS = st.text(st.characters(blacklist_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=200)
COUNTS = st.integers(0, 10**9)
EXTENSIONS = st.dictionaries(st.text(st.characters(blacklist_categories=["Cs"]), max_size=8), JSON, max_size=2)


@st.composite
def encoder_plans(draw: st.DrawFn) -> EncoderPlan:
    blocks = draw(st.integers(1, 40))
    order = draw(st.lists(st.integers(0, 2 * blocks - 1), min_size=1, max_size=20, unique=True))
    lengths = sorted(draw(st.sets(st.integers(1, len(order)), min_size=1, max_size=4)))
    sparsities = sorted(draw(st.lists(st.floats(0, 1), min_size=len(lengths), max_size=len(lengths))))
    levels = []
    for skipped, sparsity in zip(lengths, sparsities, strict=True):
        kept = sorted(set(range(2 * blocks)) - set(order[:skipped]))
        reuse = {}
        for place in order[:skipped]:
            if targets := [sub_block for sub_block in kept if sub_block % 2 == place % 2]:
                reuse |= draw(st.just({}) | st.sampled_from(targets).map(lambda target, place=place: {place: target}))
        discrepancy = draw(st.none() | st.floats(0, allow_infinity=False))
        level = {"skipped": skipped, "reuse": reuse, "sparsity": sparsity, "discrepancy": discrepancy}
        levels.append(Level(**level, extensions=draw(EXTENSIONS)))
    return EncoderPlan(
        family=draw(NAMES), blocks=blocks, width=draw(st.integers(1, 65_536)), order=order, levels=levels,
        extensions=draw(EXTENSIONS),
    )  # fmt: skip


PROVENANCES = st.builds(
    Provenance,
    source=TEXTS,
    projection=st.none() | TEXTS,
    denoiser=st.none() | TEXTS,
    prompts=st.none() | COUNTS,
    prompts_sha256=st.none() | st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
    beam=st.none() | COUNTS,
    created_with=st.none() | TEXTS,
)
PLANS = st.builds(
    Plan, encoders=st.dictionaries(NAMES, encoder_plans(), min_size=1, max_size=3), provenance=PROVENANCES
)


@settings(max_examples=200, deadline=None)
@given(PLANS)
def test_plans_survive_their_text(plan):
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text).to_json() == text
    assert text.isascii() and text.endswith("}\n") and len(text) <= MAX_BYTES
    jsonschema.validate(json.loads(text), plans.json_schema())


@pytest.mark.parametrize("filling", ["ä" * 20_000, [0] * 30_000], ids=["escapes", "spaces"])
def test_what_is_read_can_be_written_again(filling):
    """Skrr's own form is longer than some texts: of letters that JSON escapes, of lists without spaces."""
    data = sample()
    data["encoders"]["t5xxl"]["extensions"] = {"x": filling}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    assert len(text.encode()) < MAX_BYTES
    with pytest.raises(PlanError, match="at most 65536 bytes") as caught:
        Plan.from_json(text)
    checked(caught.value)


def test_a_plan_in_words_moves_no_cursor_and_turns_no_text():
    data = sample()
    for field in ("source", "projection", "denoiser"):
        data["provenance"][field] = "a\u202e\u2066\u200b b"
    for delta in ("\x1b[2J\n\u202e", 10**400, [0.5], 0.05):
        data["encoders"]["t5xxl"]["extensions"] = {"search": {"mode": "racing", "delta": delta}}
        text = describe_plan(Plan.from_json(json.dumps(data)))
        assert text.replace("\n", "").isprintable() and r"a\u202e\u2066\u200b b" in text
        assert ("found by racing, delta 0.05" if delta == 0.05 else "found by racing:") in text


@settings(max_examples=100, deadline=None)
@given(PLANS, st.floats(0, 1))
def test_choose_takes_the_strongest_that_is_not_too_strong(plan, asked):
    for encoder in plan.encoders.values():
        fitting = [level for level in encoder.levels if level.sparsity <= asked + 1e-9]
        if fitting:
            assert encoder.choose(asked) is fitting[-1]
        else:
            with pytest.raises(PlanError):
                encoder.choose(asked)


def test_text_keeps_everything_that_was_read():
    data = sample()
    del data["encoders"]["clip_l"]["levels"][0]["discrepancy"]
    assert json.loads(Plan.from_json(json.dumps(data)).to_json()) == data


def test_text_is_for_people():
    text = Plan.from_json(json.dumps(sample())).to_json()
    lines = text.splitlines()
    assert '      "order": [46, 5, 6, 11],' in lines
    assert '        {"skipped": 2, "reuse": {"5": 7}, "sparsity": 0.04, "discrepancy": 0.0123},' in lines
    assert text.index('"clip_l"') < text.index('"t5xxl"') < text.index('"provenance"')


def test_equal_plans_give_equal_texts():
    data = sample()
    data["encoders"]["t5xxl"]["levels"][0]["reuse"] = {"46": 6, "5": 7}
    other = copy.deepcopy(data)
    other["encoders"] = dict(reversed(other["encoders"].items()))
    other["encoders"]["t5xxl"]["levels"][0]["reuse"] = {"5": 7, "46": 6}
    one, two = (Plan.from_json(json.dumps(d)) for d in (data, other))
    assert one == two and one.to_json() == two.to_json()


def with_extensions(extensions: dict[str, Any]) -> Plan:
    level = Level(skipped=1, reuse={}, sparsity=0.1, extensions=extensions)
    encoder = EncoderPlan(family="t5", blocks=2, width=8, order=(1,), levels=(level,))
    return Plan(encoders={"t5xxl": encoder}, provenance=Provenance(source="manual"))


def endless() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    return loop


@pytest.mark.parametrize(
    "extensions",
    [
        {"x": "y" * MAX_BYTES},
        {"x": float("nan")},
        {"x": float("inf")},
        {"x": object()},
        {"x": {1: 1, "1": 2}},
        {"x": "\ud800"},
        {"x": b"raw"},
        endless(),
    ],
)
def test_refuses_to_write_what_could_not_be_read(extensions, tmp_path):
    plan = with_extensions(extensions)
    with pytest.raises(PlanError) as caught:
        plan.write(tmp_path / "plan.json")
    checked(caught.value)
    assert not list(tmp_path.iterdir())


def test_write_and_read(tmp_path):
    plan, file = Plan.from_json(json.dumps(sample())), tmp_path / "plan.json"
    file.write_text("old")
    plan.write(file)
    plan.write(str(tmp_path / "other.json"))
    assert Plan.read(file) == Plan.read(str(tmp_path / "other.json")) == plan
    assert file.read_bytes() == plan.to_json().encode()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.json", "plan.json"]


def test_write_leaves_the_old_plan_where_it_fails(tmp_path, monkeypatch):
    plan, file = Plan.from_json(json.dumps(sample())), tmp_path / "plan.json"
    file.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PlanError, match="No space left on device") as caught:
        plan.write(file)
    checked(caught.value)
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("place", ["folder", "none/plan.json"])
def test_write_names_a_place_that_does_not_do(tmp_path, place):
    (tmp_path / "folder").mkdir()
    with pytest.raises(PlanError, match="cannot be written") as caught:
        Plan.from_json(json.dumps(sample())).write(tmp_path / place)
    assert place in checked(caught.value)
    if place.startswith("none"):
        assert "cannot be written (its folder does not exist; make it first)" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_missing_folder_is_named_with_the_file_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="its folder does not exist; make it first") as caught:
        with replacing(tmp_path / "none" / "x.safetensors"):
            pytest.fail("there is nothing to write to")
    assert caught.value.filename == str(tmp_path / "none" / "x.safetensors")


def test_partial_files_of_a_killed_process_go_with_the_next_write(tmp_path):
    def left(name: str, age: float) -> Path:
        """What kill -9 during a write to `name` leaves, by so many seconds older."""
        before = set(tmp_path.iterdir())
        with replacing(tmp_path / name) as file:
            file.write(b"half")
            file.flush()
            (partial,) = set(tmp_path.iterdir()) - before
            copy = partial.with_name(partial.name.replace(".partial", "0.partial"))
            copy.write_bytes(b"half")
        (tmp_path / name).unlink()
        os.utime(copy, (time.time() - age,) * 2)
        return copy

    long = "ä" * 120 + ".json"
    fresh, old, another = left("plan.json", 600), left(long, 7200), tmp_path / "x"
    another.write_text("kept")
    os.utime(another, (0, 0))
    with replacing(tmp_path / "plan.json") as file:
        assert not old.exists(), "whatever it was to become"
        file.write(b"whole")
    assert {*tmp_path.iterdir()} == {fresh, another, tmp_path / "plan.json"}
    assert (tmp_path / "plan.json").read_bytes() == b"whole"


@pytest.mark.parametrize(
    ("name", "says"), [("none.json", "found nothing"), (".", "found a folder"), ("a\0b", "found nothing")]
)
def test_read_names_what_is_no_file(tmp_path, name, says):
    with pytest.raises(PlanError, match=says) as caught:
        Plan.read(tmp_path / name)
    checked(caught.value)


def test_read_is_bounded_and_names_the_file(tmp_path):
    file = tmp_path / "big.json"
    file.write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(PlanError, match="big.json: expected at most 65536 bytes"):
        Plan.read(file)
    file.write_text(json.dumps(changed((*T5, "width"), "4096")))
    with pytest.raises(PlanError, match=r"big.json: encoders.t5xxl.width: expected an integer"):
        Plan.read(file)


# Plans made in Python


def test_parts_are_frozen():
    plan = Plan.from_json(json.dumps(sample()))
    for part, field in ((plan, "encoders"), (plan.encoder("t5xxl"), "order"), (plan.provenance, "source")):
        with pytest.raises(ValueError):
            setattr(part, field, None)
    assert isinstance(plan.encoder("t5xxl").order, tuple) and isinstance(plan.encoder("t5xxl").levels, tuple)


def test_a_plan_does_not_share_what_it_was_made_from():
    reuse = {5: 7}
    level = Level(skipped=2, reuse=reuse, sparsity=0.1)
    reuse[5] = 9
    assert level.reuse == {5: 7}


def test_parts_made_in_python_are_checked_alike():
    with pytest.raises(PlanError, match=r"^reuse.5: expected an object like"):
        Level(skipped=1, reuse={5: True}, sparsity=0.1)
    with pytest.raises(PlanError, match=r"^reuse.1: "):
        Level(skipped=1, reuse={True: 3}, sparsity=0.1)
    level = Level(skipped=1, reuse={5: 6}, sparsity=0.1)
    with pytest.raises(PlanError, match=r"^levels\[0\].reuse.5: expected a feed-forward"):
        EncoderPlan(family="t5", blocks=24, width=8, order=[5], levels=[level])
    with pytest.raises(PlanError, match=r"^levels\[0\].discrepancy: expected a finite number"):
        bad = {"skipped": 1, "reuse": {}, "sparsity": 0.1, "discrepancy": float("nan")}
        EncoderPlan(family="t5", blocks=24, width=8, order=[5], levels=[bad])


# Choosing


@pytest.fixture
def pixart() -> EncoderPlan:
    return Plan.read(plans.shipped()["pixart-sigma"]).encoder("t5xxl")


def test_level_by_length(pixart):
    assert pixart.level(12).reuse == {2: 4, 5: 7, 11: 13, 17: 19, 18: 16, 23: 21}
    with pytest.raises(PlanError, match=r"no level takes 25 steps; choose one of 1, 2, 3, .*, 24$") as caught:
        pixart.level(25)
    checked(caught.value)


def test_choose(pixart):
    twelve = pixart.level(12)
    assert pixart.choose(twelve.sparsity) is twelve
    assert pixart.choose(twelve.sparsity - 9e-10) is twelve
    assert pixart.choose(twelve.sparsity - 2e-9).skipped == 11
    assert pixart.choose(1.0) is pixart.levels[-1]


@pytest.mark.parametrize("asked", [0.0, 0.014, -1.0, float("nan")])
def test_choose_names_the_smallest_where_none_fits(pixart, asked):
    with pytest.raises(PlanError, match="the smallest has 0.014093, ask for that or more") as caught:
        pixart.choose(asked)
    checked(caught.value)


def test_check_accepts_its_encoder(pixart):
    assert pixart.check("t5", 24, 4096, "t5xxl") is None


@pytest.mark.parametrize(
    ("family", "blocks", "width", "says"),
    [
        ("llama", 24, 4096, "expected family 't5', found 'llama'"),
        ("t5", 12, 4096, "expected blocks 24, found 12"),
        ("t5", 24, 768, "expected width 4096, found 768"),
    ],
)
def test_check_says_what_was_expected_and_found(pixart, family, blocks, width, says):
    with pytest.raises(PlanError) as caught:
        pixart.check(family, blocks, width, "t5\nbase")
    message = checked(caught.value)
    assert says in message and "t5\\nbase" in message and "a t5 encoder of 24 blocks and width 4096" in message


def test_encoder_names_those_there_are():
    plan = Plan.from_json(json.dumps(sample()))
    with pytest.raises(PlanError, match=r"nothing for 'clip_g'; the plan has clip_l, t5xxl") as caught:
        plan.encoder("clip_g")
    checked(caught.value)


# The schema


def test_the_schema_file_is_current():
    assert json.loads(SCHEMA_FILE.read_text("utf-8")) == plans.json_schema(), f"rewrite it: {REWRITE_SCHEMA}"


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(plans.json_schema())
    assert jsonschema.validators.validator_for(plans.json_schema()) is jsonschema.Draft202012Validator


def schema_refuses(data: Any) -> bool:
    return not jsonschema.Draft202012Validator(plans.json_schema()).is_valid(data)


def test_the_schema_takes_the_sample():
    assert not schema_refuses(sample())


def schema_can_tell(path: tuple, value: Any) -> bool:
    """Whether a schema can refuse it: 2.0 is its integer, its `$` ends before a line feed in Python, and no bound of a
    field can hang on another field."""
    whole_float = isinstance(value, float) and value.is_integer()
    trailing = any(isinstance(text, str) and text.endswith("\n") for text in (path[-1], value))
    beyond_order = (path[-1], value) in [(1, 48), ("skipped", 5), ("1024", 7), ("discrepancy", 10**400)]
    return not (whole_float or trailing or beyond_order)


@pytest.mark.parametrize(("path", "value"), [case[:2] for case in MALFORMED if schema_can_tell(*case[:2])])
def test_the_schema_refuses_what_it_can(path, value):
    assert schema_refuses(changed(path, value))


# The shipped plans


def test_shipped_plans_are_those_of_the_paper():
    assert list(plans.shipped()) == sorted(paper_plans.ORDERS)
    for name, path in plans.shipped().items():
        assert path.read_text("ascii") == paper_plans.paper_plan(name).to_json(), f"rewrite them: {REWRITE_PLANS}"


@pytest.mark.parametrize("name", ["flux1-dev", "pixart-sigma", "sd3"])
def test_shipped_plans(name):
    plan = Plan.read(plans.shipped()[name])
    encoder = plan.encoder("t5xxl")
    encoder.check("t5", 24, 4096, "t5xxl")
    assert [level.skipped for level in encoder.levels] == list(range(1, 25))
    assert all(level.discrepancy is None for level in encoder.levels)
    assert plan.provenance == Provenance(source="paper", denoiser=name, created_with="skrr 0.1.0")
    assert not schema_refuses(json.loads(plans.shipped()[name].read_text("ascii")))


@pytest.mark.parametrize(
    ("name", "skipped", "percent"),
    [
        ("pixart-sigma", 12, 24.3),
        ("pixart-sigma", 17, 33.8),
        ("pixart-sigma", 21, 41.9),
        ("sd3", 13, 27.0),
        ("sd3", 16, 32.4),
        ("sd3", 21, 41.9),
    ],
)
def test_shipped_sparsities(name, skipped, percent):
    level = Plan.read(plans.shipped()[name]).encoder("t5xxl").level(skipped)
    assert round(100 * level.sparsity, 1) == percent


def test_only_pixart_comes_with_reuse():
    reusing = {
        (name, level.skipped): len(level.reuse)
        for name, path in plans.shipped().items()
        for level in Plan.read(path).encoder("t5xxl").levels
        if level.reuse
    }
    assert reusing == {("pixart-sigma", 12): 6, ("pixart-sigma", 17): 7, ("pixart-sigma", 21): 9}


def test_printed_reuses_are_nearest_kept_neighbours():
    """Algorithm 2 offers the nearest kept sub-block of the same type on either side, and no other."""
    order = paper_plans.ORDERS["pixart-sigma"]
    for skipped, reuse in paper_plans.REUSE["pixart-sigma"].items():
        kept = set(range(48)) - set(order[:skipped])
        for place, target in reuse.items():
            left = next((s for s in range(place - 2, -1, -2) if s in kept), None)
            right = next((s for s in range(place + 2, 48, 2) if s in kept), None)
            assert target in (left, right)


def test_parameters_are_those_of_t5_xxl():
    """The whole of transformers' T5EncoderModel for T5-XXL 1.1 on the meta device counts 4,762,310,656."""
    assert paper_plans.TOTAL == 4_762_310_656
    assert (paper_plans.ATTENTION, paper_plans.FEED_FORWARD) == (67_112_960, 125_833_216)


UNITS = {"sha256": "a" * 64, "attention": 64, "feed_forward": 10240}
STEPS = [3, [5, 640], [4, 8], [5, 64], 4]


def narrowing(**entry) -> dict:
    """A plan of version 2, with some of its encoder's fields changed."""
    level = {"skipped": 3, "reuse": {}, "sparsity": 0.2, "standins": {"sha256": "a" * 64, "ranks": {"5": 16, "4": 16}}}
    full = {"family": "t5", "blocks": 24, "width": 4096, "order": STEPS, "units": UNITS, "levels": [level]}
    top = {"format": "skrr-plan", "version": 2, "provenance": {"source": "search"}}
    return {**top, "encoders": {"t5xxl": {**full, **entry}}}


def test_a_plan_with_narrowed_sub_blocks():
    plan = Plan.from_json(json.dumps(narrowing()))
    entry = plan.encoder("t5xxl")
    level = entry.levels[0]
    assert entry.left(level) == {3: 0, 5: 640, 4: 8} and entry.narrowed(level) == {5: 640, 4: 8}
    assert entry.left(5) == {3: 0, 5: 64, 4: 0}
    assert entry.shares(level) == {3: 0, 5: Fraction(1, 16), 4: Fraction(1, 8)}
    assert Plan.from_json(plan.to_json()) == plan and '"version": 2' in plan.to_json()
    assert jsonschema.Draft202012Validator(plans.json_schema()).is_valid(json.loads(plan.to_json()))
    made = Plan(encoders={"t5xxl": entry}, provenance=plan.provenance)
    assert made.version == 2 and made == plan


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"order": [3, [5, 0], [4, 8]]}, r"order\[1\]: expected an integer from 0 to 1023, or a pair"),
        ({"order": [3, [5, 640, 1], [4, 8]]}, r"order\[1\]: expected .*, found a list of 3"),
        ({"order": [3, [5, True], [4, 8]]}, r"order\[1\]: expected .*, found a list of 2"),
        ({"order": [3, [5.0, 640], [4, 8]]}, r"order\[1\]: expected .*, found a list of 2"),
        ({"order": [3, [5, "640"], [4, 8]]}, r"order\[1\]"),
        ({"order": [3, [5, None], [4, 8]]}, r"order\[1\]"),
        ({"order": [3, [48, 640], [4, 8]]}, r"order\[1\]: expected an integer from 0 to 47, found 48"),
        ({"order": [3, [5, 10240], [4, 8]]}, r"order\[1\]: expected fewer than 10240 units of sub-block 5"),
        ({"order": [3, [5, 64], [5, 64]]}, r"order\[2\]: expected fewer than 64 units"),
        ({"order": [3, [3, 64], [4, 8]]}, r"order\[1\]: expected every sub-block once"),
        ({"units": None}, r"units: missing, as order narrows"),
        ({"units": {**UNITS, "sha256": "x"}}, r"units.sha256: expected 64 hexadecimal"),
        ({"units": {**UNITS, "attention": 0}}, r"units.attention: expected an integer from 1"),
        ({"units": {**UNITS, "heads": 0}}, r"units.heads: unknown field"),
        ({"units": []}, r"units: expected an object"),
    ],
)
def test_malformed_narrowing_is_refused(entry, named):
    with pytest.raises(PlanError, match=f"encoders.t5xxl.{named}") as caught:
        Plan.from_json(json.dumps(narrowing(**entry)))
    checked(caught.value)


def test_narrowing_needs_version_2_and_a_place_for_what_stands_in():
    with pytest.raises(PlanError, match="version: expected version 2, as sub-blocks are narrowed, found 1"):
        Plan.from_json(json.dumps({**narrowing(), "version": 1}))
    level = {"skipped": 3, "reuse": {"5": 7}, "sparsity": 0.2}
    with pytest.raises(PlanError, match=r"reuse.5: expected one of the 1 sub-blocks that this level skips"):
        Plan.from_json(json.dumps(narrowing(levels=[level])))
    with pytest.raises(PlanError, match=r"reuse.3: expected a sub-block that this level keeps, found 5"):
        Plan.from_json(json.dumps(narrowing(levels=[{**level, "reuse": {"3": 5}}])))
    level = {**level, "reuse": {}, "standins": {"sha256": "a" * 64, "ranks": {"7": 4}}}
    with pytest.raises(PlanError, match=r"ranks.7: expected one of the 3 sub-blocks that this level changes"):
        Plan.from_json(json.dumps(narrowing(levels=[level])))
