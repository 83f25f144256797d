"""Encoders larger than the memory given: streamed from their files, the plan the same, the peak within the budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

from skrr_engine.encoders import load
from skrr_engine.row import EncoderError
from skrr_engine.stream import Files

REPO = Path(__file__).resolve().parents[1]
PROMPTS = ["a red cube", "two blue cats on a mat", "rain"]


def with_tokenizer(path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<s>", "?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(path)
    (path / "prompts.txt").write_text("\n".join(PROMPTS))
    return path


@pytest.mark.parametrize("name", ["t5", "umt5", "clip", "llama", "gemma3"])
@pytest.mark.parametrize("single_file", [False, True])
def test_streamed_is_loaded(name, single_file, tmp_path):
    if single_file and name not in ("t5", "umt5", "clip"):
        pytest.skip("single files are T5 and CLIP alone")
    small.build(name, 3).save_pretrained(with_tokenizer(tmp_path))
    path = str(tmp_path / "model.safetensors" if single_file else tmp_path)
    with torch.no_grad():
        whole, streamed = load(path), load(path, memory=1)
        held = [sum(t.untyped_storage().nbytes() > 8 for t in s.tensors().values()) for s in streamed.row.sub_blocks]
        assert sum(map(bool, held)) == 0, "weights came in before their use"
        batch = streamed.batch([[3, 4, 5, 6, 2]])
        ((found, _),) = batch.run(streamed.module)
        ((wanted, _),) = whole.batch([[3, 4, 5, 6, 2]]).run(whole.module)
    assert torch.equal(found, wanted)
    held = [any(t.untyped_storage().nbytes() > 8 for t in s.tensors().values()) for s in streamed.row.sub_blocks]
    assert sum(held) == 1, "weights stayed"
    assert streamed.row.parameter_counts == whole.row.parameter_counts and streamed.row.total == whole.row.total


def test_files(tmp_path):
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": torch.tensor([1, 2], dtype=torch.float16),
        "c": torch.ones(()),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    files = Files([tmp_path / "x.safetensors"])
    assert files.elements() == 9
    for key, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(files.read(key), tensor) and files.read(key).dtype == tensor.dtype
    for broken in (b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", (tmp_path / "x.safetensors").read_bytes()[:-4]):
        (tmp_path / "y.safetensors").write_bytes(broken)
        with pytest.raises(EncoderError, match=r"y\.safetensors"):
            files = Files([tmp_path / "y.safetensors"])
            for key in ("a", "b", "c"):
                files.read(key)


SEARCH = """
import sys
sys.path.insert(0, {repo!r})
import torch
from skrr_engine.encoders import import_transformers
transformers = import_transformers()
transformers.LlamaModel, transformers.PreTrainedTokenizerFast
torch.set_num_threads(1)
import skrr_engine.cli, skrr_engine.search, skrr_engine.team
torch.randn(64, 64) @ torch.randn(64, 64)
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
assert skrr_engine.cli.main(sys.argv[1:]) == 0
print("peak", peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures memory as Linux tells it")
def test_an_encoder_of_four_times_the_memory(tmp_path):
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=100, hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_hidden_layers=8
    )
    torch.manual_seed(0)
    module = LlamaModel(config)
    size = sum(p.nbytes for p in module.parameters())
    module.save_pretrained(with_tokenizer(tmp_path))
    del module
    plans, peaks = [], []
    for memory in (4 * size, size / 4):
        out = tmp_path / "plan.json"
        options = ["--encoder", tmp_path, "--prompts", tmp_path / "prompts.txt", "--out", out, "--sparsity", "0.06"]
        options += ["--beam", "2", "--memory", memory / 1e9, "--quiet"]
        command = [sys.executable, "-c", SEARCH.format(repo=str(REPO)), "search", *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        plans.append(json.loads(out.read_text()))
        peaks.append(int(done.stdout.split("peak")[-1]))
    D = []
    for plan in plans:  # how much is stacked follows from the memory, and with that a sum's last bits
        (encoder,) = plan["encoders"].values()
        levels = [level.pop("discrepancy") for level in encoder["levels"]]
        D.append(levels + encoder["extensions"]["search"].pop("steps"))
    assert plans[0] == plans[1] and D[0] == pytest.approx(D[1], rel=1e-5)
    assert peaks[0] > size, "the measure does not see the weights"
    assert peaks[1] < size / 4 + 25e6, f"peak {peaks[1] / 1e6:.0f} MB with {size / 4e6:.0f} MB given"
