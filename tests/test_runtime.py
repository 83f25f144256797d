"""The harness itself, with a throw-away pack: a real ComfyUI server and ComfyUI in this process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import comfy_runtime
from comfy_runtime import PromptError, Server

PACK = """
import time

import comfy.utils
from comfy_api.latest import ComfyExtension, io, ui

from .words import SAID


class Steps(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [io.Int.Input("steps", default=3), io.Float.Input("seconds", default=0.0)]
        return io.Schema(node_id="HarnessSteps", inputs=inputs, outputs=[io.Int.Output()], is_output_node=True)

    @classmethod
    def execute(cls, steps, seconds):
        if steps == 0:
            raise ValueError("no steps to take")
        progress = comfy.utils.ProgressBar(steps)
        for _ in range(steps):
            time.sleep(seconds)
            progress.update(1)
        return io.NodeOutput(steps, ui=ui.PreviewText(SAID))


class Extension(ComfyExtension):
    async def get_node_list(self):
        return [Steps]


async def comfy_entrypoint():
    return Extension()
"""


@pytest.fixture(scope="module")
def harness_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minimal V3 pack with one node and a relative import."""
    folder = tmp_path_factory.mktemp("harness.pack")
    (folder / "__init__.py").write_text(PACK)
    (folder / "words.py").write_text('SAID = "done"\n')
    return folder


@pytest.fixture(scope="module")
def harness_server(comfyui_root: Path, harness_pack: Path):
    with Server(comfyui_root, {"harness": harness_pack}) as server:
        yield server


def steps(**inputs: float) -> dict[str, dict]:
    return {"1": {"class_type": "HarnessSteps", "inputs": {"steps": 3, "seconds": 0.0} | inputs}}


def test_server_has_the_pack(harness_server: Server):
    assert harness_server.get("/object_info")["HarnessSteps"]["python_module"] == "custom_nodes.harness"
    assert harness_server.get("/system_stats")["devices"][0]["type"] == "cpu"
    assert "(IMPORT FAILED)" not in harness_server.log()  # without brackets: ComfyUI's own, which want torchaudio


def test_server_runs_a_graph_and_reports_progress(harness_server: Server):
    prompt_id = harness_server.prompt(steps(steps=4))
    assert harness_server.wait(prompt_id)["outputs"] == {"1": {"text": ["done"]}}
    values = [m["data"]["value"] for m in harness_server.messages(prompt_id) if m["type"] == "progress"]
    assert values == [1, 2, 3, 4]


def test_server_errors_name_node_and_cause(harness_server: Server):
    with pytest.raises(PromptError, match=r"(?s)node 1 \(HarnessSteps\): ValueError: no steps to take.*File "):
        harness_server.run(steps(steps=0))
    with pytest.raises(PromptError, match="node 1 .*steps"):
        harness_server.run(steps(steps="many"))


def test_server_can_be_interrupted(harness_server: Server):
    prompt_id = harness_server.prompt(steps(steps=600, seconds=0.05))
    while not any(m["type"] == "progress" for m in harness_server.messages(prompt_id)):
        time.sleep(0.02)
    harness_server.interrupt(prompt_id)
    entry = harness_server.wait(prompt_id, timeout=20)
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"


def test_server_that_cannot_start_says_why(comfyui_root: Path):
    with pytest.raises(RuntimeError, match="(?s)exit code 2.*unrecognized arguments: --no-such-option"):
        with Server(comfyui_root, {}, ["--no-such-option"]):
            pass


def test_comfy_in_process_loads_a_pack(comfy, harness_pack: Path, comfyui_root: Path):
    pack = comfy_runtime.load_pack(harness_pack)
    import nodes

    assert Path(nodes.__file__) == comfyui_root / "nodes.py"
    assert "_x_" in pack.__name__  # the folder's name has a dot
    assert comfy_runtime.pack_module(pack, "words").SAID == "done"
    assert nodes.NODE_CLASS_MAPPINGS["HarnessSteps"].__module__ == pack.__name__
    assert comfy.model_management.get_torch_device().type == "cpu"


def test_pack_that_fails_to_load_says_why(comfy, tmp_path: Path):
    (tmp_path / "__init__.py").write_text("from .missing import thing\n")
    with pytest.raises(ImportError, match="missing"):
        comfy_runtime.load_pack(tmp_path)


def test_activate_refuses_a_foreign_nodes_module(comfyui_root: Path, tmp_path: Path):
    (tmp_path / "nodes").mkdir()
    (tmp_path / "nodes" / "__init__.py").write_text("")
    code = "import sys; from pathlib import Path; sys.path[:0] = sys.argv[2:]; import nodes, comfy_runtime; "
    code += "comfy_runtime.activate(Path(sys.argv[1]))"
    tests = Path(comfy_runtime.__file__).parent
    command = [sys.executable, "-c", code, str(comfyui_root), str(tmp_path), str(tests)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "module 'nodes' was imported from" in done.stderr
