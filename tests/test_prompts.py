"""Calibration prompts: the generator's promises, and reading an artist's own."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skrr_engine.measure import prompts

REPO = Path(__file__).resolve().parents[1]
GOLDEN = "d6a1296b936328d0a902fd3e095d64c48031abf7a8de9da32a61de4103402933"


@pytest.fixture(scope="module")
def thousand() -> list[str]:
    return prompts.generate()


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text.isprintable(), text
    return text


def test_the_default_prompts_never_change(thousand):
    """Plans name their prompts by this hash: a new vocabulary makes new prompts, and is a decision."""
    assert prompts.sha256(thousand) == GOLDEN


def test_another_process_makes_the_same_prompts():
    code = "from skrr_engine.measure import prompts; print(end=prompts.sha256(prompts.generate(50, 7)))"
    out = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert out == prompts.sha256(prompts.generate(50, 7))


def test_importing_needs_no_torch():
    code = "import sys, skrr_engine.plan.model, skrr_engine.measure.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_every_prompt_has_150_to_250_characters_and_differs(seed):
    made = prompts.generate(3000, seed)
    assert {len(p) for p in made} <= set(range(150, 251))
    assert len(set(made)) == len(made) == 3000


def test_every_prompt_is_one_clean_line(thousand):
    for prompt in thousand:
        assert prompt.isascii() and prompt.isprintable() and prompt == prompt.strip()
        assert "  " not in prompt and "{" not in prompt and " ," not in prompt and prompt[0].isupper()
    assert prompts.from_text("\n".join(thousand)) == thousand


def test_articles_fit_their_nouns():
    for prompt in prompts.generate(5000, 3):
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", prompt), prompt


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 1000))
def test_shorter_lists_start_longer_ones(few, more, seed):
    few, more = sorted((few, more))
    assert prompts.generate(few, seed) == prompts.generate(more, seed)[:few]


def test_seeds_differ(thousand):
    assert not set(thousand[:100]) & set(prompts.generate(100, 1))


@pytest.mark.parametrize(
    ("pattern", "least"),
    [
        (r"\b(two|three|four|five|six|seven|eight|nine|ten|twelve)\b", 350),
        (r"\b(red|blue|green|yellow|black|white|purple|pink|orange|brown)\b", 600),
        (r"to the (left|right) of", 150),
        (r"\b(on top of|behind|in front of|next to|underneath|above)\b", 250),
        (r"(that reads|that says|with the words) '[^']+'", 50),
        (r"\bwearing an? ", 50),
        (r"\b(apron|coat|sweater|jacket|scarf|robe)s?\b", 80),
        (r"\b(light|sunlight|sun|daylight|moonlight|candlelight|lighting|lamplight|glow|fog)\b", 900),
        (r"\b(view|shot|close-up|portrait|exposure)\b", 900),
        (r"\b(photograph|painting|sketch|illustration|render|drawing|print|still)\b", 500),
    ],
)
def test_prompts_cover_what_pictures_are_asked_for(thousand, pattern, least):
    assert sum(bool(re.search(pattern, prompt)) for prompt in thousand) >= least


def test_every_word_list_is_used(thousand):
    text = "\n".join(prompts.generate(5000)).lower()
    lists = dict(vars(prompts.WORDS))
    tags, weights, languages = (lists.pop(name) for name in ("tags", "weights", "languages"))
    every_kind = "\n".join(prompts.broad(5000))
    for entry in (*tags, *weights, *(phrase for language in languages for part in language for phrase in part)):
        assert entry in every_kind, entry
    for name, value in lists.items():
        for entry in value:
            words = entry if isinstance(entry, list) else (entry,)
            assert any(word.lower() in text for word in words), (name, entry)


def test_broad_prompts_are_of_all_kinds():
    found = prompts.broad(400)
    assert len(set(found)) == 400 and prompts.broad(20) == found[:20] and prompts.broad(400, 1) != found
    for pattern, least in (
        (r"^(\S+ ){1,5}\S+$", 60), (r"^.{300,}$", 8), (r"\(.+:1\.\d\)", 15), (r"[а-я]", 3), (r"[一-龠]", 3),
        (r"that (reads|says)", 3),
    ):  # fmt: skip
        assert sum(bool(re.search(pattern, prompt)) for prompt in found) >= least, pattern


@pytest.mark.parametrize("count", [-1, 100_001])
def test_generate_refuses_counts_out_of_range(count):
    with pytest.raises(ValueError, match="count: expected 0 to 100000") as caught:
        prompts.generate(count)
    one_line(caught.value)


def test_generate_nothing():
    assert prompts.generate(0) == []


def test_from_text_strips_and_drops_blank_lines():
    assert prompts.from_text("\ufeff a cat \r\n\r\n\t\nzwei Hunde\ra cat\n") == ["a cat", "zwei Hunde", "a cat"]


def test_from_text_keeps_rare_separators_inside_a_prompt():
    assert prompts.from_text("a\u2028b\x0bc\x85d\n") == ["a\u2028b\x0bc\x85d"]


LINES = st.text(st.characters(blacklist_characters="\0\r\n", blacklist_categories=["Cs"]), min_size=1, max_size=40)


@given(st.lists(LINES.map(str.strip).filter(bool), min_size=1, max_size=20))
def test_from_text_reads_what_was_joined(lines):
    text = "\n".join(lines)
    assert prompts.from_text(text) == prompts.from_text("\ufeff" + text.replace("\n", "\r\n\n")) or "\ufeff" in text
    assert prompts.sha256(lines) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "found none"),
        ("\ufeff \n\t\r\n", "found none"),
        ("ok\n" + "x" * 10_001, "line 2: expected at most 10000 characters, found 10001"),
        ("x\n" * 100_001, "expected at most 100000, found 100001"),
        ("a\0b", "line 1: expected text"),
        ("fine\nbroken \udc80", "line 2: expected text"),
    ],
)
def test_from_text_refuses(text, says):
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        prompts.from_text(text)
    one_line(caught.value)


def test_from_text_takes_the_limits_themselves():
    assert prompts.from_text("  " + "x" * 10_000 + "  ") == ["x" * 10_000]
    assert len(prompts.from_text("x\n" * 100_000)) == 100_000


def test_from_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffein Schloß\r\nzwei 猫\r\n".encode())
    assert prompts.from_file(file) == prompts.from_file(str(file)) == ["ein Schloß", "zwei 猫"]


@pytest.mark.parametrize(
    ("raw", "says"),
    [(b"a\xff", "UTF-8, found another byte at 1"), ("a cat".encode("utf-16"), "UTF-8"), (b" \n", "found none")],
)
def test_from_file_refuses(tmp_path, raw, says):
    file = tmp_path / "prompts.txt"
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=says) as caught:
        prompts.from_file(file)
    assert "prompts.txt" in one_line(caught.value)


def test_from_file_bounds_what_it_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_FILE_BYTES", 10)
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="at most 10 bytes"):
        prompts.from_file(file)


@pytest.mark.parametrize("name", [".", "none.txt", "a\nb.txt"])
def test_from_file_names_what_cannot_be_read(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be read") as caught:
        prompts.from_file(tmp_path / name)
    one_line(caught.value)


def test_sha256_separates_prompts():
    assert prompts.sha256(["ab", "c"]) != prompts.sha256(["a", "bc"])
    assert prompts.sha256(["猫"]) == hashlib.sha256("猫".encode()).hexdigest()


def test_a_kind_of_which_there_are_not_so_many():
    languages = prompts.WORDS.languages
    there_are = sum(len({*subjects}) * len({*places}) * len({*styles}) for subjects, places, styles in languages)
    assert len(prompts.of_kind("other languages", there_are)) == there_are
    with pytest.raises(prompts.PromptError, match=f"only {there_are} different prompts") as caught:
        prompts.of_kind("other languages", there_are + 1)
    one_line(caught.value)
