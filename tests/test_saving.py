"""Where plans, stand-ins and encoders are saved: under names of their own, whole, by any number of processes at once;
what a search takes for its own; folders and disks that can't take them."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_comfy import host  # noqa: F401 - a fixture
from test_files import choice, dense, files, plan_for, small_heads, text_encoders  # noqa: F401 - fixtures

from skrr_engine.disk.atomic import WriteError, numbered, replacing
from skrr_engine.errors import SkrrError
from skrr_engine.files import companion as standin_file
from skrr_engine.plan.model import EncoderPlan, Level, Plan, Provenance
from skrr_engine.search.resume import State

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def shelf(comfy, tmp_path, monkeypatch):
    """ComfyUI's folders of plans, text encoders and user files, for one test."""
    import folder_paths

    folders = {name: tmp_path / name for name in ("skrr_plans", "text_encoders", "user")}
    for name in ("skrr_plans", "text_encoders"):
        endings = {".json"} if name == "skrr_plans" else folder_paths.supported_pt_extensions
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(folders[name])], endings))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "user_directory", str(folders["user"]))
    return folders


@pytest.fixture
def library(host, pack):  # noqa: F811
    """Plans in folders, and those that searches have left, as one."""
    kept = {**vars(host("nodes.host.plans.folder")), **vars(host("nodes.host.plans.searched"))}
    return SimpleNamespace(**{name: value for name, value in kept.items() if not name.startswith("__")})


def plan_of(*order: int, standins: bytes | None = None) -> Plan:
    """A plan; standins: it names a file of these bytes."""
    import hashlib

    told = {"sha256": hashlib.sha256(standins).hexdigest(), "ranks": {order[0]: 4}} if standins else None
    level = Level(skipped=len(order), reuse={}, sparsity=0.1, standins=told)
    entry = EncoderPlan(family="clip", blocks=4, width=64, order=order, levels=(level,))
    return Plan(encoders={"clip_l": entry}, provenance=Provenance(source="search"))


def of_pack(host, plan: Plan):  # noqa: F811
    """The same plan in the pack's own class, which is another than the tests' import of it."""
    return host("skrr_engine.plan.model").Plan.from_json(plan.to_json())


def texts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What a search takes for its own


def test_a_stopped_search_writes_over_its_own_plan_alone(shelf, library, host):  # noqa: F811
    folder = shelf["skrr_plans"]

    def stop(*order):
        return library.save_unfinished(of_pack(host, plan_of(*order)), "mine", "key")

    assert stop(0) == "mine_so_far.json"
    (folder / "a copy.json").write_bytes((folder / "mine_so_far.json").read_bytes())
    kept = (folder / "a copy.json").read_bytes()
    assert stop(0, 3) == "mine_so_far.json"
    assert (folder / "a copy.json").read_bytes() == kept, "a copy that was put aside"
    assert Plan.read(folder / "mine_so_far.json").encoder("clip_l").order == (0, 3)

    edited = plan_of(0, 5).to_json()
    (folder / "mine_so_far.json").write_text(edited)
    assert stop(0, 3, 4) == "mine_so_far_2.json"
    assert (folder / "mine_so_far.json").read_text() == edited, "what was edited, or has come from a friend"
    (folder / "mine_so_far_2.json").rename(folder / "good.json")
    assert stop(0, 3, 4, 6) == "mine_so_far_2.json"
    assert Plan.read(folder / "good.json").encoder("clip_l").order == (0, 3, 4), "what was renamed is kept"


def test_an_edited_plan_is_not_what_the_search_has_found(shelf, library, host):  # noqa: F811
    folder = shelf["skrr_plans"]
    plan = of_pack(host, plan_of(0, 3))
    assert library.searched("key") is None
    assert library.save_searched(plan, "mine", "key") == "mine.json"
    (folder / "a_copy.json").write_text(plan_of(7, 6).to_json())
    assert library.searched("key") == ("mine.json", plan)
    (folder / "mine.json").rename(folder / "sub.json")
    assert library.searched("key") == ("sub.json", plan), "it may be renamed"
    (folder / "sub.json").write_text(plan_of(0, 2).to_json())
    assert library.searched("key") is None and library.searched("other") is None


def test_a_found_plan_needs_its_stand_ins(shelf, library, host):  # noqa: F811
    plan = of_pack(host, plan_of(0, 3, standins=b"matrices"))
    library.save_searched(plan, "mine", "key", b"matrices")
    assert library.searched("key") == ("mine.json", plan)
    (shelf["skrr_plans"] / "mine.standins.safetensors").unlink()
    assert library.searched("key") is None


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"name": 3, "sha256": "x"}', '{"name": "../x", "sha256": ""}'])
def test_notes_that_can_not_be_read(shelf, library, host, note):  # noqa: F811
    library.save_searched(of_pack(host, plan_of(0, 3)), "mine", "key")
    (shelf["user"] / "skrr_searches" / "key.plan").write_text(note)
    assert library.searched("key") is None


# Two at once

SAVING = """
    import hashlib, json, os, signal, sys
    from pathlib import Path
    sys.path[:0] = [{repo!r}]
    from skrr_engine.files import companion as standin_file
    from skrr_engine.disk.atomic import numbered
    from skrr_engine.plan.model import Plan
    text = Path({text!r}).read_text()
    def save(data):
        plan = Plan.from_json(text.replace("0" * 64, hashlib.sha256(data).hexdigest()))
        print(standin_file.write_new(numbered(Path({folder!r}), "mine", ".json"), plan, data).name, flush=True)
"""
TWENTY = """
    for n in range(20):
        save(f"{who} {{n}}".encode() * 100)
"""
NO_LINKS = """
    def link(*_): raise PermissionError
    os.link = link
"""
KILLED = """
    claim = standin_file.claim
    def dying(partial, path):
        if path.suffix == ".json":
            os.kill(os.getpid(), signal.SIGKILL)
        claim(partial, path)
    standin_file.claim = dying
    save(b"lost")
"""


@pytest.fixture
def text(tmp_path_factory) -> Path:
    """A plan that names stand-ins whose hash is yet to be put in."""
    path = tmp_path_factory.mktemp("text") / "plan.json"
    plan = plan_of(0, 3, standins=b"x")
    path.write_text(plan.to_json().replace(*standin_file.digests(plan), "0" * 64))
    return path


def python(code: str, **values) -> subprocess.Popen:
    values = {"repo": str(REPO), **{k: str(v) for k, v in values.items()}}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code).format(**values)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("links", [True, False])
def test_two_processes_save_plans_of_one_name(tmp_path, text, links):
    """Each plan keeps its name, its text and its stand-ins; also where the file system has no hard links."""
    code = SAVING + ("" if links else NO_LINKS)
    both = [python(code + TWENTY, who=who, folder=tmp_path, text=text) for who in ("first", "second")]
    told = []
    for process in both:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        told += out.split()
    assert len(set(told)) == 40
    assert {path.name for path in tmp_path.iterdir()} == {
        name for plan in told for name in (plan, standin_file.beside(plan).name)
    }
    for name in told:
        (digest,) = standin_file.digests(Plan.read(tmp_path / name))
        assert standin_file.sha256(standin_file.beside(tmp_path / name)) == digest


CLAIMING = """
    import sys
    from pathlib import Path
    sys.path[:0] = [{repo!r}]
    from skrr_engine.disk.atomic import claim, numbered, unnamed
    folder, who = Path({folder!r}), {who!r}
    for n in range(20):
        with unnamed(folder / "x") as whole:
            whole.write_text(f"{{who}} {{n}}")
            for path in numbered(folder, "mine", ".safetensors"):
                try:
                    claim(whole, path)
                    break
                except FileExistsError:
                    pass
"""


def test_two_processes_save_files_of_one_name(tmp_path):
    both = [python(CLAIMING, folder=tmp_path, who=who) for who in ("first", "second")]
    for process in both:
        assert process.wait(60) == 0, process.stderr.read()
    expected = {f"{who} {n}" for who in ("first", "second") for n in range(20)}
    assert {path.read_text() for path in tmp_path.iterdir()} == expected and len(texts(tmp_path)) == 40


def test_an_encoder_is_never_written_over(shelf, host, comfy, small_heads, files, monkeypatch):  # noqa: F811
    """Also where the name was free when the writing began."""
    saving, encoders = host("nodes.host.files.save"), host("nodes.host.clip.views")
    plan = choice(host, plan_for()).plan.encoder("t5xxl")
    pruned = encoders.Pruned(plan, plan.levels[-1])
    derived = host("nodes.host.clip.derive").derive(dense(comfy, files["fp16"]), {"t5xxl": pruned})
    write = saving.write_pruned

    def slow(source, out, *args):
        written = write(source, out, *args)
        (shelf["text_encoders"] / "small.safetensors").write_text("of a quicker process")
        return written

    monkeypatch.setattr(saving, "write_pruned", slow)
    assert saving.save(derived, encoders.choose(derived), pruned, "small")[0] == "small_2.safetensors"
    assert (shelf["text_encoders"] / "small.safetensors").read_text() == "of a quicker process"
    assert len(texts(shelf["text_encoders"])) == 2


def test_stand_ins_of_a_killed_process_go(tmp_path, text):
    """Killed when they had their name and their plan had not; with the next plan of any name, an hour later."""
    assert python(SAVING + KILLED, folder=tmp_path, text=text).wait(60) == -signal.SIGKILL
    left = tmp_path / "mine.standins.safetensors"
    assert left.read_bytes() == b"lost"
    (tmp_path / "friend.standins.safetensors").write_bytes(b"came before its plan")

    def save_another() -> None:
        standin_file.write_new(numbered(tmp_path, "another", ".json"), plan_of(1))

    save_another()
    assert left.exists(), "it may still be at work"
    for path in tmp_path.glob(".skrr-*"):
        os.utime(path, (time.time() - 7200,) * 2)
    (tmp_path / "found.json").write_text(plan_of(0, 3, standins=b"lost").to_json())
    save_another()
    assert left.exists() and not list(tmp_path.glob(".skrr-*")), "another plan names them"

    (tmp_path / "found.json").unlink()
    left.unlink()
    assert python(SAVING + KILLED, folder=tmp_path, text=text).wait(60) == -signal.SIGKILL
    for path in tmp_path.glob(".skrr-*"):
        os.utime(path, (time.time() - 7200,) * 2)
    save_another()
    names = {"another.json", "another_2.json", "another_3.json", "friend.standins.safetensors"}
    assert set(texts(tmp_path)) == names


# Folders and disks that can't take them


def test_the_first_folder_that_can_be_written_to(shelf, library, host, tmp_path, monkeypatch):  # noqa: F811
    import folder_paths

    (tmp_path / "file").write_text("no folder")
    second = tmp_path / "second"
    paths = [str(tmp_path / "file"), str(second)]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "skrr_plans", (paths, {".json"}))
    plan = of_pack(host, plan_of(0, 3))
    assert library.save(plan, "mine") == "mine.json" and list(texts(second)) == ["mine.json"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "skrr_plans", (paths[:1], {".json"}))
    for kind in ("skrr_plans", "text_encoders"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, (paths[:1], {".json"}))
        with pytest.raises(host("skrr_engine.errors").SkrrError, match="is no folder.*extra_model_paths") as caught:
            library.folder_to_write(kind)
        assert str(tmp_path / "file") in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_another_folder_has_is_taken(shelf, library, host, tmp_path, monkeypatch):  # noqa: F811
    """Else ComfyUI would open that folder's file under the name that the node tells."""
    import folder_paths

    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "mine.json").write_text("{}")
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "skrr_plans", ([str(shelf["skrr_plans"]), str(hidden)], {".json"})
    )
    assert library.save(of_pack(host, plan_of(0, 3)), "mine") == "mine_2.json"


@contextlib.contextmanager
def small_disk(size: int):
    """No file of this process may grow past so many bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(("data", "size"), [(b"small", 200), (b"large" * 1000, 2000)])
def test_both_or_neither(tmp_path, new, data, size):
    """Of a plan and its stand-ins, whichever of the two does not fit."""
    plan, out = plan_of(0, 3, standins=data), tmp_path / "mine.json"
    assert 200 < len(plan.to_json()) < 2000
    with pytest.raises(SkrrError, match="cannot be written .*choose another place") as caught, small_disk(size):
        if new:
            standin_file.write_new(numbered(tmp_path, "mine", ".json"), plan, data)
        else:
            standin_file.write_both(out, plan, data)
    assert str(tmp_path / "mine") in str(caught.value) and ".partial" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_states_and_files_say_what_to_do(tmp_path):
    state = State(tmp_path / "state.json", "k" * 700)
    with pytest.raises(SkrrError, match=r"state.json: cannot be written \(.*choose another place"), small_disk(600):
        state.save([])
    with pytest.raises(WriteError, match="x: cannot be written"), small_disk(600), replacing(tmp_path / "x") as file:
        file.write(b"x" * 700)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder", tmp_path / "file" / "x"):
        with pytest.raises(WriteError, match="cannot be written") as caught, replacing(path):
            pass
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


def test_no_folder_for_states(shelf, library, host):  # noqa: F811
    """A search says so before it begins; a plan that is found all the same is saved."""
    shelf["user"].mkdir()
    (shelf["user"] / "skrr_searches").write_text("no folder")
    with pytest.raises(host("skrr_engine.errors").SkrrError, match="skrr_searches: can't be made"):
        library.state("key")
    assert library.save_searched(of_pack(host, plan_of(0, 3)), "mine", "key") == "mine.json"
    assert library.searched("key") is None


def test_what_a_block_reads_is_no_write_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "x"):
        (tmp_path / "gone").read_bytes()


def test_an_encoder_that_does_not_fit(shelf, host, comfy, small_heads, files):  # noqa: F811
    saving, encoders = host("nodes.host.files.save"), host("nodes.host.clip.views")
    plan = choice(host, plan_for()).plan.encoder("t5xxl")
    pruned = encoders.Pruned(plan, plan.levels[-1])
    derived = host("nodes.host.clip.derive").derive(dense(comfy, files["fp16"]), {"t5xxl": pruned})
    refused = pytest.raises(host("skrr_engine.errors").SkrrError, match=r"small.safetensors: cannot be written")
    with refused, small_disk(20_000):
        saving.save(derived, encoders.choose(derived), pruned, "small")
    assert texts(shelf["text_encoders"]) == {}
