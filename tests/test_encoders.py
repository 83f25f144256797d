"""Every text encoder of the ComfyUI that is installed: the engine's walk is its own forward, dense and changed."""

import functools

import pytest
import torch

from benchmarks import encoders


@functools.cache
def rows() -> dict[str, encoders.Seen]:
    found = encoders.survey()
    return {f"{seen.name} {seen.reads} {seen.of[0]}": seen for seen in found}


EXPECTED = [
    "clip_g hidden -1 sdxl_clip",
    "clip_g hidden -2 sdxl_clip",
    "clip_h hidden -2 sd2_clip",
    "clip_l hidden -2 sdxl_clip",
    "clip_l last sd1_clip",
    "pile_t5xl last aura_t5",
    "t5xxl last cosmos",
    "t5xxl last flux",
    "umt5base last ace",
    "umt5xxl last wan",
    "mt5xl last hydit",
    "t5base last sa_t5",
    "byt5_small last hunyuan_image",
    "mistral3_24b layers 10, 20, 30 flux",
    "llama all hidream",
    "llama hidden -3 hunyuan_video",
    "qwen25_7b hidden -3 hunyuan_image",
    "qwen25_7b last qwen_image",
    "qwen25_3b last omnigen2",
    "qwen3_4b hidden -2 z_image",
    "gemma2_2b hidden -2 lumina2",
]
UNREAD = {
    "mistral3_24b layers 10, 20, 30 flux": 10,
    "llama hidden -3 hunyuan_video": 2,
    "qwen25_7b hidden -3 hunyuan_image": 2,
    "qwen3_4b hidden -2 z_image": 1,
    "gemma2_2b hidden -2 lumina2": 1,
    "clip_l hidden -2 sdxl_clip": 1,
}
"""Blocks that nothing reads (comfyui: which models read a state before the last)."""


@pytest.mark.parametrize("row", EXPECTED)
def test_walk_is_the_encoders_own_forward(comfy, row):
    with torch.no_grad():
        seen = rows()[row]
    wanted = dict.fromkeys(encoders.WAYS, "yes") | ({} if seen.unread else {"trimmed": "-"})
    assert not seen.refused and seen.ways == wanted and seen.lora > 4 * seen.blocks, seen
    unread = seen.unread / seen.nbytes
    blocks = UNREAD.get(row, 0)
    if "clip_g hidden -2" not in row and "clip_h" not in row:
        assert (unread > 0) == (blocks > 0) and unread < 1.2 * blocks / seen.blocks + 1e-9


def test_all_are_walked_or_refused_with_a_reason(comfy):
    refused = {seen.cls for seen in rows().values() if seen.refused}
    assert refused == {"BertModel"} and refused <= encoders.REASONS.keys()
    assert {*EXPECTED} <= rows().keys()
