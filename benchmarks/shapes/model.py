"""The Shapes denoiser and decoder, made of ComfyUI's own classes, so that its ordinary loaders take their files.

Denoiser: Stable Diffusion 3's layout (MMDiT) at width 192: 3 joint blocks over 16 picture tokens and the caption's,
rectified flow. Decoder: TAESD's layout, 16 latent channels, 8 x 8 pixels a latent. There is no encoder of pictures:
latents are a fixed linear map of 8 x 8 pixel patches (see `Latents`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .scenes import GROUND

DEPTH, CHANNELS, CONTEXT = 3, 16, 576
WIDTH = 64 * DEPTH  # ComfyUI reads the depth from the width
PATCH = 8  # pixels of a latent's side
SCALE, SHIFT = 1.5305, 0.0609  # ComfyUI's SD3 latent format: the denoiser sees (latent - SHIFT) * SCALE
FLOW_SHIFT = 3.0  # of ComfyUI's SD3 schedule


@dataclass(frozen=True)
class Latents:
    """Pictures -> what the denoiser makes: the 16 main directions of 8 x 8 x 3 pixel patches, the ground at zero.

    basis: `[192, 16]`. The directions' spread is half whitened: shapes' edges lie in the small ones.
    """

    basis: torch.Tensor

    @staticmethod
    def fit(pictures: np.ndarray) -> Latents:
        """From uint8 pictures `[n, 64, 64, 3]`."""
        flat = patches(pictures).reshape(-1, PATCH * PATCH * 3).double()
        values, directions = torch.linalg.eigh(flat.T @ flat / len(flat))
        spread = values.flip(0)[:CHANNELS].sqrt()
        directions = directions.flip(1)[:, :CHANNELS]
        directions = directions * directions.sum(dim=0).sign()  # eigh leaves the sign open
        basis = directions / spread.sqrt()
        return Latents((basis / (flat @ basis).square().mean().sqrt()).float())

    def of(self, pictures: np.ndarray) -> torch.Tensor:
        """`[n, 16, 8, 8]`, of uint8 pictures `[n, 64, 64, 3]`, as the denoiser sees them."""
        return (patches(pictures) @ self.basis).permute(0, 3, 1, 2).contiguous()


def patches(pictures: np.ndarray) -> torch.Tensor:
    """Pictures' 8 x 8 patches less the ground, float32 `[n, rows, columns, 192]`."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).float() / 255 - torch.tensor(GROUND) / 255
    n, height, width, _ = x.shape
    x = x.reshape(n, height // PATCH, PATCH, width // PATCH, PATCH, 3).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(n, height // PATCH, width // PATCH, PATCH * PATCH * 3)


def denoiser(seed: int = 0) -> nn.Module:
    """A fresh denoiser, float32. Needs ComfyUI (encoder.activate_comfyui)."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper, get_2d_sincos_pos_embed

    linear = {"target": "torch.nn.Linear", "params": {"in_features": CONTEXT, "out_features": WIDTH}}
    model = OpenAISignatureMMDITWrapper(
        input_size=None, patch_size=2, in_channels=CHANNELS, depth=DEPTH, num_patches=16, pos_embed_max_size=4,
        pos_embed_scaling_factor=None, context_embedder_config=linear, qk_norm="rms", dtype=torch.float32,
        device="cpu", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "ln_" in name:
                parameter.fill_(1.0)
            elif parameter.ndim < 2 or "adaLN" in name or name.startswith("final_layer.linear"):
                parameter.zero_()  # every block begins as no change
            else:
                fans = parameter.shape[0] + parameter[0].numel()
                parameter.normal_(0, (2 / fans) ** 0.5, generator=generator)
    places = torch.from_numpy(get_2d_sincos_pos_embed(WIDTH, 4)).float()
    model.pos_embed = nn.Parameter(places.unsqueeze(0))  # a buffer in ComfyUI's class; learnt here, stored alike
    return model


def decoder(seed: int = 0) -> nn.Module:
    """A fresh decoder: denoiser's latents, shifted and scaled as ComfyUI does -> pictures in 0..1 `[n, 3, 64, 64]`."""
    from comfy.taesd.taesd import Decoder

    model = Decoder(latent_channels=CHANNELS)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.ndim < 2:
                parameter.zero_()
            else:
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
    for module in model.modules():  # residual branches begin small, so that nine blocks don't blow up
        if hasattr(module, "fuse"):
            with torch.no_grad():
                module.conv[4].weight.mul_(0.1)
    return model


def process_out(latents: torch.Tensor) -> torch.Tensor:
    """What ComfyUI hands to the decoder, from what the denoiser works on."""
    return latents / SCALE + SHIFT


def sigmas(steps: int) -> torch.Tensor:
    """Noise levels from 1 to 0, `[steps + 1]`: the simple scheduler on SD3's flow."""
    t = torch.linspace(1, 0, steps + 1)
    return FLOW_SHIFT * t / (1 + (FLOW_SHIFT - 1) * t)


def pictures(decoded: torch.Tensor) -> np.ndarray:
    """Decoded `[n, 3, h, w]` in 0..1 -> uint8 `[n, h, w, 3]`."""
    return (decoded.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def half(tensors: Iterable[tuple[str, torch.Tensor]], prefix: str = "") -> dict[str, torch.Tensor]:
    """Named tensors as a file holds them."""
    return {prefix + name: tensor.detach().half().contiguous() for name, tensor in tensors}
