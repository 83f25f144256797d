"""The search on the command line: exit codes, the state after kill -9, several processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file, save_file

from skrr_engine.cli.commands import method_of, numbers_on_disk
from skrr_engine.cli.parser import main, parser
from skrr_engine.files import companion
from skrr_engine.measure.processes import Team, TeamError, join
from skrr_engine.plan.choose import at_size
from skrr_engine.plan.model import Plan
from skrr_engine.search import baselines
from skrr_engine.search.job import Job
from skrr_engine.search.settings import Settings

REPO = Path(__file__).resolve().parents[1]
PROMPTS = ["a red cube", "two blue cats on a mat", "an oil painting of a lighthouse at sea", "seven small cups", "rain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small Llama with a tokenizer, as a transformers folder, and prompts.txt in it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("encoder")
    small.build("llama", 4).save_pretrained(path)
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<s>", "?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(path)
    (path / "prompts.txt").write_text("\n".join(PROMPTS))
    draw = random.Random(0)  # so many that a race takes several looks at them
    many = [" ".join(draw.choices(words, k=draw.randint(2, 9))) for _ in range(40)]
    (path / "many.txt").write_text("\n".join(many))
    return path


def command(folder: Path, out: Path, *options: str) -> list[str]:
    given = ["--encoder", folder, "--prompts", folder / "prompts.txt", "--out", out, "--beam", "2", "--sparsity", "0.4"]
    return ["-m", "skrr_engine", "search", *map(str, given), *options]


def start(*arguments: str, **options) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=REPO, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **options,
    )  # fmt: skip


def run(*arguments: str) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def plan(folder, tmp_path_factory) -> dict:
    """The plan of one undisturbed process."""
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    code, _, err = run(*command(folder, out, "--exact", "--memory", "0.5"))
    assert code == 0, err
    return json.loads(out.read_text())


RACE = "--delta", "0.1", "--prompts"


@pytest.fixture(scope="module")
def raced(folder, tmp_path_factory) -> tuple[dict, str, str]:
    """The plan of one process that races, and what it says."""
    path = tmp_path_factory.mktemp("raced") / "plan.json"
    code, out, err = run(*command(folder, path, *RACE, str(folder / "many.txt")))
    assert code == 0, err
    return json.loads(path.read_text()), out, err


def test_modes_say_what_they_are(plan, raced):
    assert plan["encoders"]["llama"]["extensions"]["search"]["mode"] == "exact"
    race, out, err = raced
    assert "found by racing, delta 0.1" in out and "step 1 of" in err
    assert race["encoders"]["llama"]["extensions"]["search"].items() >= {"mode": "racing", "delta": 0.1}.items()


DYING = """
import os, signal, sys
from skrr_engine import cli
from skrr_engine.measure.meter import Stepping

where, count, *arguments = sys.argv[1:]
count, written = int(count), 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def replace(source, target, real=os.replace):
    global written
    written += 1
    if where == "before" and written == count:
        die()
    real(source, target)
    if where == "behind" and written == count:
        die()

def step(stepping, real=Stepping.__call__):
    global count
    if where == "forwards" and written:
        count -= 1
    if where == "forwards" and not count or where == "seen" and os.path.exists(arguments[-1]):
        die()
    real(stepping)

os.replace, Stepping.__call__ = replace, step
sys.exit(cli.main(arguments))
"""
"""The command line, killed with SIGKILL by itself: `before` or `behind` the so-manieth file that it puts in its place;
so many `forwards` behind the first one; or once what the last argument names is `seen`."""


def dying(where: str, count: int, command: list[str]) -> list[str]:
    return ["-c", DYING, where, str(count), *command[2:]]


def test_kill_9_at_any_moment(folder, plan, tmp_path):
    out, state = tmp_path / "plan.json", tmp_path / "state.json"
    searching, steps = command(folder, out, "--exact", "--resume", str(state)), 0
    total = len(plan["encoders"]["llama"]["order"])
    for where, count, more in [
        ("before", 1, 0),
        ("behind", 1, 1),
        ("forwards", 7, 1),
    ]:
        code, _, err = run(*dying(where, count, searching))
        steps += more
        assert code == -signal.SIGKILL and not out.exists(), err
        assert state.exists() == (steps > 0) and steps < total
        if steps:
            assert len(json.loads(state.read_text())["beam"][0]["order"]) == steps
    code, _, err = run(*dying("before", total - steps + 1, searching))  # all that is missing is the plan's own write
    assert (
        code == -signal.SIGKILL and not out.exists() and len(json.loads(state.read_text())["beam"][0]["order"]) == total
    )
    code, _, err = run(*searching)
    assert code == 0, err
    assert "step 0" not in err, "it began anew"
    assert json.loads(out.read_text()) == plan
    assert not state.exists()


TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"


def test_two_processes_find_the_same_plan(folder, plan, tmp_path):
    out, state = tmp_path / "plan.json", tmp_path / "state.json"
    code, said, err = run(*TORCHRUN, *command(folder, out, "--exact", "--resume", str(state)))
    assert code == 0, err
    assert json.loads(out.read_text()) == plan
    assert said.count("written to") == 1 and not state.exists()


def test_two_processes_that_race_find_the_same_plan(folder, raced, tmp_path):
    out = tmp_path / "plan.json"
    code, said, err = run(*TORCHRUN, *command(folder, out, *RACE, str(folder / "many.txt")))
    assert code == 0 and said.count("written to") == 1, err
    own, other = json.loads(out.read_text())["encoders"]["llama"], raced[0]["encoders"]["llama"]
    assert own["order"] == other["order"]
    for a, b in zip(own["levels"], other["levels"], strict=True):  # others are stacked together: the last bits differ
        assert a.pop("discrepancy") == pytest.approx(b.pop("discrepancy"), rel=1e-5) and a == b


BEST = "--quality", "best", "--standins", "4", "--sparsity", "0.3", "--tune", "3"


def wide(folder: Path, out: Path, *options: str) -> list[str]:
    """A search for narrowed sub-blocks on many prompts."""
    given = ["--encoder", folder, "--prompts", folder / "many.txt", "--out", out, "--quiet", *BEST]
    return ["-m", "skrr_engine", "search", *map(str, given), *options]


def repairing(folder: Path, plan: Path, out: Path, *options: str) -> list[str]:
    given = ["--encoder", folder, "--prompts", folder / "many.txt", "--plan", plan, "--out", out, "--standins", "4"]
    return ["-m", "skrr_engine", "repair", *map(str, given), "--quiet", *options]


def written(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """A plan without the hash of its companion, which must be right, and what that holds."""
    plan = Plan.read(path)
    file = companion.beside(path)
    assert companion.digests(plan) == {companion.sha256(file)}
    text = path.read_text().replace(companion.sha256(file), "it")
    return json.loads(text), load_file(file)


def assert_same(found: Path, wanted: Path) -> None:
    (plan, tensors), (other, others) = written(found), written(wanted)
    assert plan == other and tensors.keys() == others.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, others[key]), key


@pytest.fixture(scope="module")
def best(folder, tmp_path_factory) -> Path:
    """A plan with narrowed sub-blocks, found by one process."""
    out = tmp_path_factory.mktemp("best") / "plan.json"
    code, _, err = run(*wide(folder, out))
    assert code == 0, err
    return out


def test_best_narrows_under_one_budget(best):
    plan = json.loads(best.read_text())
    entry = plan["encoders"]["llama"]
    assert plan["version"] == 2 and entry["extensions"]["search"]["mode"] == "widths"
    assert any(isinstance(step, list) for step in entry["order"])
    asked = (0.25, 0.30, 0.33, 0.42, 0.50, 0.60)  # each level is the last step that stays below one of these
    assert all(any(level["sparsity"] <= size for size in asked) for level in entry["levels"])


def test_two_processes_find_the_same_widths(folder, best, tmp_path):
    out = tmp_path / "plan.json"
    code, said, err = run(*TORCHRUN, *wide(folder, out))
    assert code == 0 and said.count("written to") == 1, err
    assert_same(out, best)


def test_a_table_of_widths_goes_on_for_another_size(folder, best, tmp_path):
    """Killed behind the third place; the rest is measured for another sparsity, which has been asked for before."""
    out, state = tmp_path / "plan.json", tmp_path / "state.json"
    searching = wide(folder, out, "--resume", str(state))
    code, _, err = run(*dying("behind", 3, [*searching, "--sparsity", "0.55"]))
    assert code == -signal.SIGKILL and not out.exists(), err
    assert sorted(json.loads(state.read_text())["table"]) == ["0", "1", "2"]
    code, _, err = run(*[option for option in searching if option != "--quiet"])
    assert code == 0 and "place 8 of 8" in err, err
    assert_same(out, best)
    assert not state.exists()


def test_repair_of_a_plan_with_reuse(folder, raced, tmp_path, capsys):
    """Stand-ins at all its levels, in any number of processes; the order and the re-uses stay, for who lacks the
    file."""
    before = tmp_path / "before.json"
    before.write_text(json.dumps(raced[0]))
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    with torch.no_grad():
        assert main(repairing(folder, before, one)[2:]) == 0
    assert "linear stand-ins of rank 4" in capsys.readouterr().out
    code, said, err = run(*TORCHRUN, *repairing(folder, before, two))
    assert code == 0 and said.count("written to") == 1, err
    assert_same(two, one)
    own, other = (json.loads(path.read_text())["encoders"]["llama"] for path in (one, before))
    assert json.loads(one.read_text())["version"] == 1 and own["order"] == other["order"]
    for level, plain in zip(own["levels"], other["levels"], strict=True):
        assert level["reuse"] == plain["reuse"] and level["skipped"] == plain["skipped"]
        assert {*map(int, level["standins"]["ranks"])} == {*other["order"][: level["skipped"]]}


def test_repair_keeps_the_units(folder, best, tmp_path, capsys):
    """Also at a size between those that it was searched for; the rest of the file is fitted anew."""
    out = tmp_path / "again.json"
    with torch.no_grad():
        assert main(repairing(folder, best, out, "--levels", "0.28")[2:]) == 0
        (own, tensors), (before, others) = written(out), written(best)
        entry, other = own["encoders"]["llama"], before["encoders"]["llama"]
        assert own["version"] == 2 and entry["order"] == other["order"]
        ends = [level["skipped"] for level in other["levels"]]
        assert [level["skipped"] for level in entry["levels"] if level["skipped"] in ends] == ends
        units = [key for key in others if ".units." in key]
        assert units and all(torch.equal(tensors[key], others[key]) for key in units)
        capsys.readouterr()
        measure = ["discrepancy", "--encoder", folder, "--prompts", folder / "many.txt", "--json", "--plan"]
        for path, plan in ((out, entry), (best, other)):
            assert main([*map(str, [*measure, path])]) == 0
            assert json.loads(capsys.readouterr().out)["standins"] == len(plan["levels"][-1]["standins"]["ranks"])
        companion.beside(out).unlink()
        assert main(repairing(folder, out, tmp_path / "third.json")[2:]) == 1
    assert (
        "the file of this plan's units and stand-ins (*.standins.safetensors) is missing, so it can't be fitted anew"
        in capsys.readouterr().err
    )


def test_repair_with_widths_has_the_plans_sizes(folder, raced, tmp_path, capsys):
    before, out = tmp_path / "before.json", tmp_path / "narrow.json"
    before.write_text(json.dumps(raced[0]))
    with torch.no_grad():
        assert main(repairing(folder, before, out, "--widths")[2:]) == 0
        assert main(repairing(folder, before, out, "--standins", "auto")[2:]) == 1
    assert "repair fits one rank" in capsys.readouterr().err
    plan, _ = written(out)
    entry = plan["encoders"]["llama"]
    assert plan["version"] == 2 and plan["provenance"]["prompts"] == 40
    wanted = [level["sparsity"] for level in raced[0]["encoders"]["llama"]["levels"]]
    found = [level["sparsity"] for level in entry["levels"]]
    assert all(own <= size + 1e-6 for own, size in zip(found, wanted, strict=True))


FEW = {"best": ("--standins", "2", "--tune", "0"), "parts": ("--standins", "2"), "paper": ()}


@pytest.mark.parametrize("quality", FEW)
def test_a_size_in_gigabytes(folder, tmp_path, quality, capsys):
    """The file that is left takes no more; the embedding is of another precision than the blocks."""
    made = tmp_path / "encoder"
    shutil.copytree(folder, made)
    weights = load_file(made / "model.safetensors")
    halved = {f"model.{k}": t if "embed" in k else t.half() for k, t in weights.items()}
    save_file(halved, made / "model.safetensors", {"format": "pt"})
    whole = sum(t.nbytes for t in halved.values())
    blocks = sum(t.nbytes for k, t in halved.items() if "layers" in k)
    limit, out = whole - 0.4 * blocks, tmp_path / "plan.json"
    search = ["search", "--encoder", made, "--prompts", made / "many.txt", "--out", out, "--quiet", "--gb", limit / 1e9]
    with torch.no_grad():
        assert main([*map(str, search), "--quality", quality, *FEW[quality]]) == 0
        assert main([*map(str, search), "--sparsity", "0.4"]) == 1
        assert main([*map(str, search[:-1]), str(whole / 1e9)]) == 1
        assert main([*map(str, search[:-1]), str((whole - blocks) / 1e9)]) == 1
    said = capsys.readouterr().err
    assert "give either that or --sparsity" in said and "as it is, no more than" in said and "can't be reached" in said
    plan = Plan.read(out)
    entry, numbers = plan.encoders["llama"], numbers_on_disk(str(made))
    sizes = [
        numbers.total_bytes - numbers.bytes_of(entry.shares(level)) + level.standin_bytes(entry.width)
        for level in entry.levels
    ]
    assert any(size <= limit for size in sizes) and at_size(numbers, entry, limit) is not None
    if quality == "best":  # and little more than it takes is removed
        assert max(size for size in sizes if size <= limit) > limit - 0.2 * blocks


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ([], "widths"),
        (["--quality", "best"], "widths"),
        (["--quality", "parts"], "standins"),
        (["--quality", "paper"], "skrr"),
        (["--method", "finercut"], "finercut"),
        (["--standins", "8"], "standins"),  # as before there were qualities
        (["--beam", "2"], "skrr"),
        (["--exact"], "skrr"),
        (["--no-reuse"], "skrr"),
        (["--delta", "0.1"], "skrr"),
        (["--quality", "best", "--standins", "8"], "widths"),
    ],
)
def test_which_method_is_asked_for(options, method):
    assert method_of(parser().parse_args(["search", "--encoder", "e", "--out", "o", *options])) == method


def test_a_process_that_dies_ends_all_and_the_saved_step_stays_good(folder, plan, tmp_path):
    out, state = tmp_path / "plan.json", tmp_path / "state.json"
    searching = command(folder, out, "--exact", "--resume", str(state))
    team = start_team(searching, dying("seen", 0, searching))
    _, err = team[0].communicate(timeout=60)
    team[1].communicate()
    assert (team[0].returncode, team[1].returncode) == (1, -signal.SIGKILL)
    assert "another process of this search has ended" in err.splitlines()[-1] and "Traceback" not in err
    saved = state.read_text()
    assert json.loads(saved)["beam"] and not out.exists()
    elsewhere = str(tmp_path / "another machine's")
    for process in start_team(*[command(folder, out, "--exact", "--resume", path) for path in (str(state), elsewhere)]):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and "Traceback" not in err
        assert any("did not start alike" in line and "--resume" in line for line in err.splitlines()), err
    assert state.read_text() == saved and not out.exists()
    code, _, err = run(*command(folder, out, "--exact", "--resume", str(state)))
    assert code == 0 and "step 0" not in err, err
    assert json.loads(out.read_text()) == plan


def start_team(*commands: list[str]) -> list[subprocess.Popen]:
    """A process for each command, which find each other as those of a torchrun do."""
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(len(commands)))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        team = []
        for rank, own in enumerate(commands):
            patch.setenv("RANK", str(rank))
            team.append(start(*own))
    return team


def test_one_process_always_agrees():
    Team().agree("these")
    Team().agree("those")


def test_more_processes_than_gpus(monkeypatch):
    def refuse(index: int) -> None:
        raise RuntimeError(f"CUDA error: invalid device ordinal {index}\nCUDA kernel errors might be reported later")

    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(TeamError, match=r"LOCAL_RANK 1: .*ordinal 1\); start no more processes than .* GPUs") as caught:
        join("cuda")
    assert "\n" not in str(caught.value)


def test_finercut_shares_its_work(monkeypatch):
    class Counting(Team):
        calls = 0

        def shared(self, candidates, measure):
            self.calls += 1
            return measure(candidates)

    calibration = small.meter("llama", small.build("llama", 2), small.prompts([5, 6]), [1]).calibration
    job = Job("llama", lambda prompts, race: calibration, ["x"], Settings(0.2), method="finercut", team=Counting())
    with torch.no_grad():
        monkeypatch.setattr(baselines, "plan_of", lambda meter, order, *args: order)
        assert job.run().entry and job.team.calls


def test_shortgpt_takes_one_order_for_all():
    """Processes may round differently: each takes the others' numbers for the blocks that were theirs."""

    class Other(Team):
        def shared(self, candidates, measure):
            found = measure(candidates)
            found[1::2] = 9.0
            return found

    meter = small.meter("llama", small.build("llama", 4), small.prompts([5, 6]), [1])
    meter.team = Other()
    with torch.no_grad():
        assert baselines.shortgpt_order(meter)[4:] == [2, 3, 6, 7]


def free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def test_users_errors_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "state.json").write_text("half a sta")
    for options, message in [
        (["--resume", str(tmp_path / "state.json")], "no state of a search"),
        (["--resume", str(tmp_path / "nowhere" / "state")], "its folder does not exist"),
        (["--memory", "-1"], "give gigabytes"),
        (["--delta", "3"], "a delta of 3.0 makes no sense"),
        (["--resume", str(tmp_path / "plan.json")], "is what --out writes"),
        (["--resume", str(tmp_path / "plan.standins.safetensors")], "is what --out writes"),
        (["--name", "t5 xxl"], "an encoder's name has letters"),
        (["--out", "/proc/plan.json"], "nothing can be written there"),
    ]:
        assert main(command(folder, tmp_path / "plan.json", "--quiet", *options)[2:]) == 1
        err = capsys.readouterr().err
        assert message in err and "Traceback" not in err
        assert len([line for line in err.splitlines() if line.startswith("skrr:") and message in line]) == 1


def test_resuming_with_another_tokenizer_is_refused(folder, tmp_path):
    """The same words may be other tokens: what was measured on them is of no use."""
    out, state = tmp_path / "plan.json", tmp_path / "state.json"
    searching = command(folder, out, "--exact", "--resume", str(state))
    assert run(*dying("behind", 1, searching))[0] == -signal.SIGKILL
    shutil.copytree(folder, tmp_path / "other")
    words = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(words))
    code, _, err = run(*searching, "--tokenizer", str(tmp_path / "other"))
    assert code == 1 and "belongs to a search with another encoder" in err and state.exists()


def test_ctrl_c(folder, tmp_path):
    process = start(*command(folder, tmp_path / "plan.json", "--exact", "--prompts", str(folder / "many.txt")))
    process.stderr.readline()
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and not (tmp_path / "plan.json").exists()
