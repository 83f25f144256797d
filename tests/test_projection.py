"""Text projections rebuilt from a denoiser's tensors equal the denoiser's own modules."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from skrr_engine.measure.projection import ProjectionError, from_file

WIDTH, FEATURES = 24, 10


class RMS(nn.Module):
    def __init__(self, width, epsilon):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.rand(width) + 0.5), epsilon

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight


def mlp():
    return nn.Linear(WIDTH, FEATURES), nn.Linear(FEATURES, FEATURES)


def own(kind: str):
    """The denoiser's own module as `(tensors by name, callable)`."""
    torch.manual_seed(1)
    one, two = mlp()
    gelu = nn.GELU(approximate="tanh")
    norm = RMS(WIDTH, 1e-5 if kind == "lumina2" else 1e-6)
    names, call = {
        "pixart": ({"y_embedder.y_proj.fc1": one, "y_embedder.y_proj.fc2": two}, lambda x: two(gelu(one(x)))),
        "sd3": ({"context_embedder": one}, one),
        "flux": ({"txt_in": one}, one),
        "flux+norm": ({"txt_norm": norm, "txt_in": one}, lambda x: one(norm(x))),
        "wan": ({"text_embedding.0": one, "text_embedding.2": two}, lambda x: two(gelu(one(x)))),
        "lumina2": ({"cap_embedder.0": norm, "cap_embedder.1": one}, lambda x: one(norm(x))),
    }[kind]
    return {f"{name}.{k}": v.data for name, m in names.items() for k, v in m.state_dict().items()}, call


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("kind", ["pixart", "sd3", "flux", "flux+norm", "wan", "lumina2"])
def test_equals_the_denoisers_own(tmp_path, kind, prefix):
    tensors, call = own(kind)
    tensors = {prefix + k: v.contiguous() for k, v in tensors.items()}
    save_file({**tensors, prefix + "blocks.0.weight": torch.zeros(3)}, tmp_path / "denoiser.safetensors")
    projection = from_file(tmp_path / "denoiser.safetensors")
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(projection(x), call(x), rtol=1e-5, atol=1e-6)
    assert projection.width == WIDTH and projection.denoiser == kind.partition("+")[0]


def test_scaled_fp8(tmp_path):
    tensors, call = own("flux")
    weight = tensors["txt_in.weight"]
    scale = weight.abs().max() / 448
    stored = {"txt_in.weight": (weight / scale).to(torch.float8_e4m3fn), "txt_in.scale_weight": scale.reshape(1)}
    save_file({**stored, "txt_in.bias": tensors["txt_in.bias"]}, tmp_path / "fp8.safetensors")
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(from_file(tmp_path / "fp8.safetensors")(x), call(x), rtol=0.1, atol=0.1)


def test_clip_columns(tmp_path):
    tensors, call = own("sd3")
    save_file(tensors, tmp_path / "sd3.safetensors")
    part = from_file(tmp_path / "sd3.safetensors").columns(8, 6)
    x = torch.randn(2, 5, 6)
    padded = torch.cat([torch.zeros(2, 5, 8), x, torch.zeros(2, 5, WIDTH - 14)], dim=-1)
    torch.testing.assert_close(part(x), call(padded), rtol=1e-5, atol=1e-6)


def test_errors(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file({"txt_in.weight": torch.zeros(2, 2, dtype=torch.uint8)}, tmp_path / "bytes.safetensors")
    save_file({"txt_in.weight": torch.zeros(2)}, tmp_path / "flat.safetensors")
    for name, message in [
        ("broken", "can't be read as safetensors"),
        ("missing", "can't be read"),
        ("other", "no text projection in this file"),
        ("bytes", "stored as torch.uint8"),
        ("flat", "not that of a linear layer"),
    ]:
        with pytest.raises(ProjectionError, match=message) as found:
            from_file(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    "kind, key, shape, message",
    [
        ("sd3", "context_embedder.weight", (), "not that of a linear layer"),
        ("sd3", "context_embedder.weight", (0, WIDTH), "not that of a linear layer"),
        ("sd3", "context_embedder.bias", (FEATURES - 1,), "context_embedder.bias has shape"),
        ("sd3", "context_embedder.bias", (), "context_embedder.bias has shape"),
        ("sd3", "context_embedder.scale_weight", (3, 7), "does not fit context_embedder.weight's shape"),
        ("sd3", "context_embedder.scale_weight", (2, FEATURES, WIDTH), "does not fit context_embedder.weight's shape"),
        ("wan", "text_embedding.2.weight", (FEATURES, FEATURES + 1), f"that takes {FEATURES} channels"),
        ("lumina2", "cap_embedder.0.weight", (), "not that of a norm layer"),
        ("lumina2", "cap_embedder.0.weight", (WIDTH + 1,), f"that takes {WIDTH + 1} channels"),
    ],
)
def test_tensors_that_do_not_fit_together(tmp_path, kind, key, shape, message):
    tensors, _ = own(kind)
    save_file({**tensors, key: torch.ones(shape)}, tmp_path / "denoiser.safetensors")
    with pytest.raises(ProjectionError, match=message) as found:
        from_file(tmp_path / "denoiser.safetensors")
    assert "\n" not in str(found.value)


def test_its_tensors_bear_the_denoisers_names(tmp_path):
    tensors, _ = own("wan")
    save_file(tensors, tmp_path / "denoiser.safetensors")
    found = from_file(tmp_path / "denoiser.safetensors").tensors
    assert found.keys() == tensors.keys() and all(found[key].equal(tensors[key]) for key in tensors)
