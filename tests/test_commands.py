"""The command line on small encoders: results, exit codes, and errors of one line."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small
import torch
import transformers
from safetensors.torch import load_file, save_file

from skrr_engine.cli.parser import main
from skrr_engine.plan.model import Plan

REPO = Path(__file__).resolve().parents[1]
PROMPTS = "a red cube\ntwo blue cats under a table\na dog\n"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> Path:
    return tokenizer_folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer) -> Path:
    """A small T5 as a transformers folder."""
    folder = tmp_path_factory.mktemp("encoder")
    small.build("t5", 4).save_pretrained(folder)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text(PROMPTS)
    return path


@pytest.fixture(scope="module")
def plan(tmp_path_factory, encoder, prompts) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    options = ["--sparsity", "0.4", "--levels", "0.2,0.3", "--beam", "2", "--quiet"]
    assert main(["search", "--encoder", str(encoder), "--out", str(path), "--prompts", str(prompts), *options]) == 0
    return path


def test_search_writes_a_whole_plan(plan):
    found = Plan.read(plan)
    entry = found.encoder("t5")
    assert entry.levels[-1].sparsity >= 0.4 and len(entry.levels) >= 2
    assert found.provenance.prompts == 3 and found.provenance.beam == 2 and found.provenance.projection is None


def test_show(plan, capsys):
    assert main(["show", str(plan)]) == 0
    out = capsys.readouterr().out
    assert "t5: t5, 4 blocks, 32 wide" in out and "attention" in out and "feed-forward" in out


def test_discrepancy_by_hand(plan, encoder, prompts, capsys):
    """D, D_cond, D_null and null_norm against plain transformers and the reference."""
    import reference

    assert (
        main(["discrepancy", "--encoder", str(encoder), "--plan", str(plan), "--prompts", str(prompts), "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)
    entry = Plan.read(plan).encoder("t5")
    level = entry.levels[-1]
    module = transformers.T5EncoderModel.from_pretrained(encoder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)

    def run(text):
        return module(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].double()

    texts = PROMPTS.splitlines()
    with torch.no_grad():
        dense, null = [run(t) for t in texts], run("")
        with reference.skipping(module, "t5", {i: level.reuse.get(i) for i in entry.order[: level.skipped]}):
            pruned, pruned_null = [run(t) for t in texts], run("")
    error = torch.cat([(a - b).square().flatten() for a, b in zip(dense, pruned, strict=True)])
    assert found["D_cond"] == pytest.approx(error.mean().item(), rel=1e-5)
    assert found["D_null"] == pytest.approx((null - pruned_null).square().mean().item(), rel=1e-5)
    assert found["D"] == pytest.approx(found["D_cond"] + found["D_null"]) == pytest.approx(level.discrepancy, rel=1e-6)
    assert found["null_norm"]["dense"] == pytest.approx(null.norm(dim=-1).mean().item(), rel=1e-6)
    assert found["null_norm"]["pruned"] == pytest.approx(pruned_null.norm(dim=-1).mean().item(), rel=1e-6)
    assert found["skipped"] == level.skipped and found["sparsity"] == pytest.approx(level.sparsity, abs=1e-6)


@pytest.mark.parametrize("name", ["t5", "umt5", "clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_single_files(name, dtype, tmp_path, tokenizer):
    """A `.safetensors` as ComfyUI users have it encodes like the model that it was saved from."""
    from skrr_engine.files.folder import load

    if name == "clip":
        torch.manual_seed(0)
        config = transformers.CLIPTextConfig(
            hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
            hidden_act="gelu", eos_token_id=2,
        )  # fmt: skip
        module = transformers.CLIPTextModel(config).eval()
    else:
        module = small.build(name, 3)
    state = {k: v.to(dtype).contiguous() for k, v in module.state_dict().items() if k != "encoder.embed_tokens.weight"}
    prefix = "te." if name == "umt5" else ""
    save_file({prefix + k: v for k, v in state.items()}, tmp_path / "encoder.safetensors")
    encoder = load(str(tmp_path / "encoder.safetensors"), tokenizer=str(tokenizer))
    module.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    ids = torch.tensor([[4, 5, 6, 2]])
    with torch.no_grad():
        assert torch.equal(encoder.module(input_ids=ids).last_hidden_state, module(input_ids=ids).last_hidden_state)
    assert encoder.tokenize("a red cube") == [3, 4, 5, 2] and encoder.tokenize("") == [2]


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Gemma3"])
def test_folder_of_a_language_model(name, tmp_path, tokenizer):
    """Published decoders are language models: the encoder is found inside, and never filled with random weights."""
    from skrr_engine.encoder.row import EncoderError
    from skrr_engine.files.folder import load

    config = small.build(name.lower(), 3).config
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[4, 5, 6, 2]])
    with torch.no_grad():
        wanted = model.model(input_ids=ids).last_hidden_state
        assert torch.equal(
            load(str(tmp_path), tokenizer=str(tokenizer)).module(input_ids=ids).last_hidden_state, wanted
        )
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(EncoderError, match="1 tensors are missing, layers.1.mlp.up_proj.weight first"):
        load(str(tmp_path), tokenizer=str(tokenizer))


def test_smollm2_tokens(smollm2_folder):
    """No special tokens of its own: the null prompt is the BOS token; prompts are cut at 256."""
    from skrr_engine.files.folder import import_transformers, tokenizer_of

    tokenize = tokenizer_of(Path(smollm2_folder), type("Row", (), {"family": "llama"}))
    bos = import_transformers().AutoTokenizer.from_pretrained(smollm2_folder).bos_token_id
    assert tokenize("") == [bos] and len(tokenize("word " * 400)) == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "missing.json"], "missing.json"),
        (["search", "--encoder", "nowhere", "--out", "x.json"], "no such file or folder"),
        (["search", "--encoder", "{encoder}", "--out", "no/such/folder/x.json"], "its folder does not exist"),
        (["search", "--encoder", "{encoder}", "--out", "x.json", "--sparsity", "2"], "between 0 and 1"),
        (["search", "--encoder", "{encoder}", "--out", "x.json", "--levels", "a,b"], "--levels a,b"),
        (["search", "--encoder", "{encoder}", "--out", "x.json", "--prompts", "nothing.txt"], "nothing.txt"),
        (["search", "--encoder", "{encoder}", "--out", "x.json", "--projection", "{wide}"], "wide"),
        (["search", "--encoder", "{tokenizer}", "--out", "x.json"], "can't load an encoder"),
        (["search", "--encoder", "{wide}", "--out", "x.json"], "neither a T5 nor a CLIP"),
        (["search", "--out", "x.json"], "--encoder"),
        (["discrepancy", "--encoder", "{encoder}", "--plan", "{shipped}"], "expected"),
    ],
)
def test_errors_are_one_line(arguments, message, encoder, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"txt_in.weight": torch.zeros(4, 64)}, tmp_path / "wide.safetensors")
    shipped = REPO / "skrr_engine" / "plan" / "shipped" / "sd3.json"
    names = {"encoder": encoder, "tokenizer": tokenizer, "wide": tmp_path / "wide.safetensors", "shipped": shipped}
    try:
        code = main([argument.format(**names) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.strip()
    assert code == 1 and error.splitlines()[-1].startswith("skrr: ") and message in error
    assert "Traceback" not in error and len([line for line in error.splitlines() if "bare" not in line]) == 1
    assert not (tmp_path / "x.json").exists()


@pytest.fixture
def mine(encoder, prompts, plan, tmp_path, monkeypatch) -> Path:
    """The current folder, with all that commands read: an encoder as a folder and as a file, prompts, a projection, a
    plan and its stand-ins."""
    shutil.copytree(encoder, tmp_path / "t5")
    shutil.copy(encoder / "model.safetensors", tmp_path / "t5.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(encoder / name, tmp_path)
    shutil.copy(prompts, tmp_path / "prompts.txt")
    save_file({"txt_in.weight": torch.zeros(4, 32)}, tmp_path / "projection.safetensors")
    (tmp_path / "plan.standins.safetensors").write_bytes(b"matrices")
    told = json.loads(plan.read_text())
    digest, entry = hashlib.sha256(b"matrices").hexdigest(), told["encoders"]["t5"]
    entry["levels"][-1]["standins"] = {"sha256": digest, "ranks": {str(entry["order"][0]): 2}}
    (tmp_path / "plan.json").write_text(json.dumps(told))
    monkeypatch.chdir(tmp_path)
    return tmp_path


READS = {
    "search": ["--encoder", "t5", "--prompts", "prompts.txt", "--projection", "projection.safetensors"],
    "encode": ["--encoder", "t5.safetensors", "--prompts", "prompts.txt", "--plan", "plan.json"],
    "apply": ["--encoder", "t5.safetensors", "--plan", "plan.json"],
}


def refused(command: str, *outputs: str, capsys) -> str:
    """The one line that refuses these outputs; nothing may have changed."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert main([command, *READS[command], *outputs]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert before == {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    return line


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("search", "t5/model.safetensors"),
        ("search", "t5/tokenizer.json"),
        ("search", "prompts.txt"),
        ("search", "projection.safetensors"),
        ("encode", "t5.safetensors"),
        ("encode", "tokenizer.json"),
        ("encode", "plan.json"),
        ("encode", "plan.standins.safetensors"),
        ("apply", "t5.safetensors"),
        ("apply", "plan.json"),
        ("apply", "plan.standins.safetensors"),
    ],
)
def test_no_output_is_an_input(command, file, mine, capsys, monkeypatch):
    """However it is spelled or linked, and before any work."""
    monkeypatch.setattr("skrr_engine.files.folder.load", lambda *_: pytest.fail("it has begun"))
    (mine / "other").mkdir()
    (mine / "other" / "symlink").symlink_to(mine / file)
    os.link(file, mine / "other" / "hard link")
    (mine / "folder").symlink_to(mine, target_is_directory=True)
    for out in (file, str(mine / file), f"./other/../{file}", f"folder/{file}", "other/symlink", "other/hard link"):
        assert f"skrr: --out {out}: is the source file" in refused(command, "--out", out, capsys=capsys)
        if command == "search":
            outputs = ("--out", "new.json", "--resume", out)
            assert f"skrr: --resume {out}: is the source file" in refused(command, *outputs, capsys=capsys)


def test_no_output_is_another_output(mine, capsys):
    (mine / "folder").symlink_to(mine, target_is_directory=True)
    for state in ("new.json", "folder/new.json", "NEW.json", "./new.standins.safetensors"):
        line = refused("search", "--out", "new.json", "--resume", state, capsys=capsys)
        assert f"skrr: --resume {state}: is what --out writes" in line
    (mine / "prompts.txt").rename(mine / "new.standins.safetensors")
    line = refused("search", "--prompts", "new.standins.safetensors", "--out", "new.json", capsys=capsys)
    assert "is the source file of --prompts" in line, "the stand-ins of --out"


def test_outputs_beside_inputs(mine, capsys):
    """A second run may write over what the first has written, also beside the encoder."""
    for _ in range(2):
        for out in ("t5/plan.json", "plan 2.json"):
            searching = ["search", *READS["search"][:4], "--out", out, "--sparsity", "0.1", "--beam", "1", "--quiet"]
            assert main(searching) == 0
        assert main(["encode", *READS["encode"], "--sparsity", "0.35", "--out", "found.safetensors"]) == 0


def test_the_memory_that_stand_ins_take_is_counted(encoder, tmp_path, capsys):
    out = tmp_path / "plan.json"
    search = ["search", "--encoder", str(encoder), "--out", str(out), "--count", "16", "--sparsity", "0.02", "--quiet"]
    search += ["--no-reuse", "--standins", "1", "--memory"]
    assert main([*search, "0.004"]) == 1 and not out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    least = re.search(r"fitting stand-ins takes .* give --memory ([0-9.]+) \(GB\) or more", line)[1]
    assert main([*search, least]) == 0 and out.exists()


@pytest.mark.parametrize("pad", ["-1", "99999"])
def test_padding_out_of_range(encoder, tmp_path, capsys, pad):
    assert main(["search", "--encoder", str(encoder), "--out", str(tmp_path / "plan.json"), "--pad", pad]) == 1
    assert capsys.readouterr().err.startswith(f"skrr: --pad {pad}: give a number of tokens from 0 to")


@pytest.mark.parametrize("quality", ["best", "paper"])
def test_ctrl_c(encoder, tmp_path, quality):
    """Exit code 130, and no half-written plan."""
    command = [
        sys.executable,
        "-m",
        "skrr_engine",
        "search",
        "--encoder",
        str(encoder),
        "--out",
        str(tmp_path / "p.json"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--count", "3000", "--sparsity", "0.8", "--quality", quality],
        cwd=REPO,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not re.search(r"\[.*\d%", line := process.stderr.readline()):
        assert line, "ended before it searched"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and "Traceback" not in process.stderr.read()
    assert list(tmp_path.iterdir()) == []
