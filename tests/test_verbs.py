"""The verbs of `skrr_engine`, and the README's example for engineers, run as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch

import skrr_engine
from skrr_engine.encoder import families
from skrr_engine.errors import SkrrError
from skrr_engine.files.encoder_file import Checkpoint

REPO = Path(__file__).resolve().parents[1]
PROMPTS = ["a red cube", "two blue cats under a table", "a dog", "two cats under a dog"]


def tokenize(prompt: str) -> list[int]:
    return [3 + len(word) for word in prompt.split()] + [1]


def test_the_example_in_the_readme(tmp_path, tokenizer_folder, monkeypatch):
    import transformers

    example = re.search(r"```python\n(.*?skrr_engine\.find_plan.*?)```", (REPO / "README.md").read_text(), re.S)[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12, "ten lines and two of space"
    folder = tmp_path / "t5"
    encoder = small.build("t5", 4)
    encoder.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(example.replace("generate(128)", "generate(4)"), "README.md", "exec"), scope)  # noqa: S102
    plan = skrr_engine.Plan.read("plan.json")
    assert plan.encoder("t5").levels[-1].sparsity >= 0.42
    left, whole = (sum(p.numel() for p in module.parameters()) for module in (scope["encoder"], encoder))
    assert left == pytest.approx((1 - plan.encoder("t5").levels[-1].sparsity) * whole, rel=1e-5)


@pytest.mark.parametrize("name", ["t5", "clip", "llama", "gemma3"])
def test_find_measure_prune(name):
    encoder = small.build(name, 4)
    dense = encoder.state_dict()
    plan = skrr_engine.find_plan(encoder, tokenize, PROMPTS, 0.3, levels=(0.1,), delta=0.0)
    assert encoder.state_dict().keys() == dense.keys()
    (entry,) = plan.encoders.values()
    for level in entry.levels:
        found = skrr_engine.discrepancy(encoder, tokenize, PROMPTS, plan, level.sparsity)
        assert found.total == pytest.approx(level.discrepancy, rel=1e-5)
    row = families.find(encoder)
    gone = {key for i in entry.order for key in row.sub_blocks[i].tensors()}
    assert skrr_engine.prune(encoder, plan) is encoder
    assert encoder.state_dict().keys() == dense.keys() - gone
    with pytest.raises(SkrrError, match="no level at or below"):
        skrr_engine.prune(small.build(name, 4), plan, 0.0)


def test_write_pruned(tmp_path):
    from safetensors.torch import save_file

    encoder = small.build("t5", 4)
    save_file({key: t.clone() for key, t in encoder.state_dict().items()}, tmp_path / "dense.safetensors")
    plan = skrr_engine.find_plan(encoder, tokenize, PROMPTS, 0.3)
    written = skrr_engine.write_pruned(tmp_path / "dense.safetensors", tmp_path / "pruned.safetensors", plan)
    assert written == (tmp_path / "pruned.safetensors").stat().st_size
    skrr_engine.prune(encoder, plan)
    found = Checkpoint(tmp_path / "pruned.safetensors")
    left = {key: t for key, t in encoder.state_dict().items() if key != "encoder.embed_tokens.weight"}  # held once
    assert {key for key, entry in found.entries.items() if entry.kept} == left.keys()
    for key, tensor in left.items():
        assert torch.equal(found.tensor(key), tensor)


def test_tokenizers_that_give_nothing_are_told():
    with pytest.raises(SkrrError, match="gives no token for the empty prompt"):
        skrr_engine.find_plan(small.build("t5", 2), lambda prompt: [], PROMPTS)


def test_the_package_is_light():
    code = "import sys, skrr_engine; skrr_engine.Plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0
    with pytest.raises(AttributeError):
        skrr_engine.nothing  # noqa: B018
