"""A denoiser's own text projection, found by its tensors' names and rebuilt from them.

One row of `RECIPES` per kind: which tensors it has, and what is done with them in turn. `VECTORS` are the same for what
it makes of a pooled vector. A denoiser without a projection (Stable Diffusion's U-Nets, Cosmos) reads the embeddings in
the keys and values of all its cross-attentions: what counts there is the sum of their squares, which one matrix gives.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..errors import SkrrError, first_line

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
"""Where a denoiser's tensors stand in the files that artists have."""


class ProjectionError(SkrrError):
    """A denoiser whose text projection can't be had; one line that says why and what to do."""


class UnknownError(ProjectionError):
    """A denoiser that no recipe fits."""


@dataclass(frozen=True)
class Recipe:
    """One kind of projection. denoiser: whose; name: the module; stages: `("linear", key)`, `("rms", key, epsilon)`,
    `("layer", key, epsilon)`, `("joined", key, epsilon)` (root-mean-square norms key.0, key.1, ... of joined states) or
    one of PLAIN in turn, a leading "?" marking a stage that may be missing, or `("stack", pattern)` alone: all that
    the pattern fits; marks: other tensors of such a denoiser; gone: tensors that it has not. In a key, `*` is the
    highest number that there is. widened: whether the linear layer's output is brought to the scale of its input's
    width (LTX-2); columns: (encoder, first, how many) for those whose embeddings are joined with others' on the
    feature axis; encoders: whose embeddings it is for, empty for all."""

    denoiser: str
    name: str
    stages: tuple[tuple, ...]
    marks: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    widened: bool = False
    columns: tuple[tuple[str, int, int], ...] = ()
    encoders: tuple[str, ...] = ()

    def fits(self, names: set[str]) -> bool:
        """Whether a denoiser with tensors of these names is of this kind."""
        for kind, *rest in self.stages:
            if kind == "stack" and not any(re.fullmatch(rest[0], name) for name in names):
                return False
            if kind in NAMED and f"{highest(rest[0], names)}.weight" not in names:
                return False
        return names.issuperset(self.marks) and names.isdisjoint(self.gone)


NAMED = ("linear", "rms", "layer")
"""Stages that a denoiser must have by their names."""


def highest(key: str, names: Iterable[str]) -> str:
    """A key of a recipe with its `*` filled in."""
    before, star, after = key.partition("*")
    if not star:
        return key
    pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after) + r"\.weight")
    numbers = [int(found[1]) for name in names if (found := pattern.fullmatch(name))]
    return f"{before}{max(numbers, default=0)}{after}"


def mlp(name: str, first: str = "fc1", second: str = "fc2", between: str = "gelu") -> tuple[tuple, ...]:
    """Two linear layers."""
    return ("linear", f"{name}.{first}"), (between,), ("linear", f"{name}.{second}")


CLIPS = (("clip_l", 0, 768), ("clip_g", 768, 1280))
"""CLIP-L and CLIP-G side by side (SD3 pads them to T5's width)."""

RECIPES = (
    Recipe("pixart", "y_embedder.y_proj", mlp("y_embedder.y_proj")),
    Recipe("sd3", "context_embedder", (("linear", "context_embedder"),), columns=CLIPS),
    Recipe("chroma", "txt_in", (("linear", "txt_in"),), ("distilled_guidance_layer.norms.0.scale",)),
    Recipe(
        "lens",
        "txt_in",
        (("joined", "txt_norm", 1e-5), ("linear", "txt_in")),
        ("txt_norm.0.weight", "txt_norm.1.weight"),
    ),
    Recipe("flux", "txt_in", (("?rms", "txt_norm", 1e-6), ("linear", "txt_in"))),
    Recipe(
        "hunyuan_video",
        "byt5_in",
        (
            ("layer", "byt5_in.layernorm", 1e-5),
            ("linear", "byt5_in.fc1"),
            ("exact gelu",),
            ("linear", "byt5_in.fc2"),
            ("exact gelu",),
            ("linear", "byt5_in.fc3"),
        ),
        encoders=("byt5_small",),
    ),
    Recipe("hunyuan_video", "txt_in.input_embedder", (("linear", "txt_in.input_embedder"),)),
    Recipe("joyimage", "text_embedder", mlp("condition_embedder.text_embedder", "linear_1", "linear_2")),
    Recipe("wan", "text_embedding", mlp("text_embedding", "0", "2")),
    Recipe("lumina2", "cap_embedder", (("rms", "cap_embedder.0", 1e-5), ("linear", "cap_embedder.1"))),
    Recipe(
        "omnigen2",
        "caption_embedder",
        (
            ("rms", "time_caption_embed.caption_embedder.0", 1e-5),
            ("linear", "time_caption_embed.caption_embedder.1"),
        ),
    ),
    Recipe("ltxv", "caption_projection", mlp("caption_projection", "linear_1", "linear_2")),
    Recipe(
        "ltxv2",
        "caption_projection",
        (("unit", 1e-6), ("linear", "caption_projection.linear_1")),
        gone=("caption_projection.linear_2.weight",),
        widened=True,
    ),
    Recipe("hidream", "caption_projection", (("linear", "caption_projection.*.linear"),), encoders=("t5xxl",)),
    Recipe("auraflow", "cond_seq_linear", (("linear", "cond_seq_linear"),)),
    Recipe("mochi", "t5_yproj", (("linear", "t5_yproj"),)),
    Recipe("cogvideox", "patch_embed.text_proj", (("linear", "patch_embed.text_proj"),)),
    Recipe("hunyuan_dit", "mlp_t5", mlp("mlp_t5", "0", "2", "silu"), encoders=("mt5xl",)),
    Recipe(
        "kandinsky5",
        "text_embeddings",
        (("linear", "text_embeddings.in_layer"), ("layer", "text_embeddings.norm", 1e-5)),
    ),
    Recipe("ideogram4", "llm_cond_proj", (("rms", "llm_cond_norm", 1e-6), ("linear", "llm_cond_proj"))),
    Recipe("ernie", "text_proj", (("linear", "text_proj"),)),
    Recipe("minimax", "condition_proj", (("linear", "condition_proj"),)),
    Recipe(
        "unet",
        "attn2.to_k and to_v",
        (("stack", r"(input|middle|output)_block.*\.attn2\.to_[kv]\.weight"),),
        columns=CLIPS,
    ),
    Recipe("cosmos", "to_k and to_v", (("stack", r"blocks\.block\d+\.blocks\.1\.block\.attn\.to_[kv]\.0\.weight"),)),
    Recipe("cosmos_predict2", "k_proj and v_proj", (("stack", r"blocks\.\d+\.cross_attn\.[kv]_proj\.weight"),)),
)

VECTORS = (
    Recipe("flux", "vector_in", mlp("vector_in", "in_layer", "out_layer", "silu")),
    Recipe("sd3", "y_embedder", mlp("y_embedder.mlp", "0", "2", "silu"), columns=CLIPS),
    Recipe("sdxl", "label_emb", mlp("label_emb.0", "0", "2", "silu"), columns=(("clip_g", 0, 1280),)),
    Recipe("hidream", "p_embedder", mlp("p_embedder.pooled_embedder", "linear_1", "linear_2", "silu"), columns=CLIPS),
    Recipe(
        "kandinsky5",
        "pooled_text_embeddings",
        (("linear", "pooled_text_embeddings.in_layer"), ("layer", "pooled_text_embeddings.norm", 1e-5)),
    ),
)
"""The same for pooled vectors."""


class TextProjection(nn.Sequential):
    """`[batch, tokens, width] -> [batch, tokens, features]` in float32: a denoiser's own layers. recipe: which; layers:
    by the names that they have there, "" for those without weights. denoiser, name: for a plan's provenance; width:
    that it takes."""

    def __init__(self, recipe: Recipe, layers: Sequence[tuple[str, nn.Module]]):
        super().__init__(*(layer for _, layer in layers))
        self.requires_grad_(False)
        self.recipe, self.layers, self.denoiser, self.name = recipe, tuple(layers), recipe.denoiser, recipe.name
        first = next(layer for name, layer in layers if name)
        self.width = first.weight.numel() if isinstance(first, Joined) else first.weight.shape[-1]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by the denoiser's names."""
        return {f"{name}.{key}": t for name, layer in self.layers for key, t in layer.state_dict().items()}

    def columns(self, start: int, width: int) -> "TextProjection":
        """For an encoder whose embeddings fill only some columns of what the first linear layer takes (CLIP's in SD3
        and SDXL): that layer alone, as what follows it depends on the other columns, too."""
        name, layer = self.layers[0]
        return TextProjection(self.recipe, [(name, linear(layer.weight[:, start : start + width], layer.bias))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float())


class Projections(nn.Module):
    """For each tensor of a reading in turn, the denoiser's own projection of it, None where it goes on bare. denoiser,
    name, tensors, width: as those of a TextProjection; width: of the first."""

    def __init__(self, parts: Sequence[TextProjection | None]):
        super().__init__()
        self.parts = tuple(parts)
        self.known = nn.ModuleList(part for part in parts if part is not None)
        self.denoiser = self.known[0].denoiser
        self.name = ", ".join(part.name for part in self.known)
        self.width = self.known[0].width

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by the denoiser's names."""
        return {name: tensor for part in self.known for name, tensor in part.tensors.items()}


def find(
    keys: Iterable[str], recipes: Sequence[Recipe] = RECIPES, encoder: str | None = None
) -> tuple[Recipe, str] | None:
    """The recipe that a denoiser's tensor names fit, and the prefix that they stand under. encoder: whose embeddings it
    is to take, None for any."""
    names = set(keys)
    for prefix in PREFIXES:
        below = {name.removeprefix(prefix) for name in names if name.startswith(prefix)} if prefix else names
        for recipe in recipes:
            for_it = not recipe.encoders or encoder is None or encoder in recipe.encoders
            if for_it and recipe.fits(below):
                return recipe, prefix
    return None


def looked_for(recipes: Sequence[Recipe] = RECIPES) -> str:
    """The modules that recipes are about, for a message."""
    return ", ".join(dict.fromkeys(recipe.name for recipe in recipes))


def build(
    recipe: Recipe, fetch: Callable[[str], torch.Tensor | None], names: Iterable[str] = ()
) -> TextProjection:  # fmt: skip
    """Rebuild a projection. fetch: tensor of a name below the denoiser, as floating point, or None; names: of all
    tensors below it. Raises ProjectionError where tensors do not fit together."""
    names = set(names)
    layers: list[tuple[str, nn.Module]] = []
    width = None  # of what comes out of the layers so far
    for kind, *rest in recipe.stages:
        if kind in PLAIN:
            layers.append(("", PLAIN[kind](*rest)))
            continue
        if kind == "stack":
            found = (name for name in sorted(names) if re.fullmatch(rest[0], name))
            return TextProjection(recipe, [(recipe.name, stacked(found, fetch))])
        if kind == "joined":
            layers.append((rest[0], joined(*rest, fetch, names)))
            width = layers[-1][1].weight.numel()
            continue
        name, *epsilon = rest
        name = highest(name, names)
        weight, bias = (t if t is None else t.detach().float() for t in map(fetch, (f"{name}.weight", f"{name}.bias")))
        if weight is None:  # one that may be missing
            continue
        shape = list(weight.shape)
        if len(shape) != (2 if kind == "linear" else 1) or 0 in shape or shape[-1] != (width or shape[-1]):
            takes = "" if width is None else f" that takes {width} channels"
            raise ProjectionError(
                f"{name}.weight has shape {shape}, not that of a {KINDS[kind]} layer{takes}: get the denoiser again"
            )
        if kind != "rms" and bias is not None and list(bias.shape) != shape[:1]:
            raise ProjectionError(
                f"{name}.bias has shape {list(bias.shape)}, but {name}.weight {shape}: get the denoiser again"
            )
        if kind == "linear":
            scale = (shape[0] / shape[1]) ** 0.5 if recipe.widened else 1.0
            layers.append((name, linear(weight * scale, bias)))
        else:
            layers.append((name, layer_norm(weight, bias, *epsilon) if kind == "layer" else rms(weight, *epsilon)))
        width = shape[0]
    return TextProjection(recipe, layers)


KINDS = {"linear": "linear", "rms": "norm", "?rms": "norm", "layer": "norm"}


class Unit(nn.Module):
    """A root-mean-square norm without weights."""

    def __init__(self, epsilon: float):
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], None, self.epsilon)


PLAIN: dict[str, Callable[..., nn.Module]] = {
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "exact gelu": nn.GELU,
    "silu": nn.SiLU,
    "unit": Unit,
}
"""Stages without weights."""


class Joined(nn.Module):
    """A norm for each of several states that are joined on the feature axis. weight `[states, width]`."""

    def __init__(self, weight: torch.Tensor, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(weight, requires_grad=False), epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = x.unflatten(-1, self.weight.shape)
        return (nn.functional.rms_norm(states, states.shape[-1:], None, self.epsilon) * self.weight).flatten(-2)


def joined(name: str, epsilon: float, fetch: Callable[[str], torch.Tensor | None], names: set[str]) -> Joined:
    """The norms `name.0`, `name.1` and so on. Raises ProjectionError."""
    count = sum(re.fullmatch(rf"{re.escape(name)}\.\d+\.weight", key) is not None for key in names)
    weights = [fetch(f"{name}.{number}.weight") for number in range(count)]
    if not weights or any(w is None or w.ndim != 1 or w.shape != weights[0].shape for w in weights):
        raise ProjectionError(f"{name}'s norms are not all there, or differ in width: get the denoiser again")
    return Joined(torch.stack([w.detach().float() for w in weights]), epsilon)


def stacked(found: Iterable[str], fetch: Callable[[str], torch.Tensor | None]) -> nn.Linear:
    """One linear layer whose outputs' mean square is that of all these layers' outputs together: a root of their Gram
    matrix. Biases don't matter to differences. Raises ProjectionError."""
    gram, rows = None, 0
    for name in found:
        weight = fetch(name).detach().double()
        if weight.ndim != 2 or (gram is not None and weight.shape[1] != gram.shape[0]):
            raise ProjectionError(f"{name} has shape {list(weight.shape)}, unlike the others: get the denoiser again")
        own = weight.T @ weight
        gram, rows = own if gram is None else gram + own, rows + len(weight)
    gram.diagonal().add_(1e-9 * gram.diagonal().mean())  # fewer rows than columns have no root otherwise
    root = torch.linalg.cholesky(gram).T
    return linear((root * (len(gram) / rows) ** 0.5).float(), None)


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer of these."""
    return with_weights(nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta"), weight, bias)


def rms(weight: torch.Tensor, epsilon: float) -> nn.RMSNorm:
    """A root-mean-square norm with this weight."""
    return with_weights(nn.RMSNorm(len(weight), eps=epsilon, device="meta"), weight)


def layer_norm(weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float) -> nn.LayerNorm:
    """A layer norm of these."""
    return with_weights(nn.LayerNorm(len(weight), eps=epsilon, bias=bias is not None, device="meta"), weight, bias)


def with_weights(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
    """A layer that has none yet with these."""
    layer.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias})}, assign=True)
    return layer


def from_file(path: str | Path) -> TextProjection:
    """Read the projection from a denoiser's safetensors file: only the tensors that it needs."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            found = find(names)
            if found is None:
                raise UnknownError(
                    f"{path}: no text projection in this file (looked for {looked_for()}): give the denoiser's file"
                )
            recipe, prefix = found
            below = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}

            def fetch(key: str) -> torch.Tensor | None:
                if prefix + key not in names:
                    return None
                return dequantised(prefix + key, file.get_tensor, names, str(path))

            return build(recipe, fetch, below)
    except (SafetensorError, OSError) as error:
        raise ProjectionError(
            f"{path}: can't be read as safetensors ({first_line(error)}); give the denoiser's file"
        ) from None


def dequantised(key: str, get: Callable[[str], torch.Tensor], names, where: str) -> torch.Tensor:
    """A tensor as floating point: fp8 with its scale (`scale_weight`, `weight_scale`) multiplied in."""
    tensor = get(key)
    if not tensor.is_floating_point():
        raise ProjectionError(
            f"{where}: {key} is stored as {tensor.dtype}, which needs its loader; give an fp16 or fp8 file"
        )
    base = key.removesuffix(".weight")
    scale = next((s for s in (f"{base}.scale_weight", f"{base}.weight_scale") if key != base and s in names), None)
    if scale is None:
        return tensor.float()
    factor = get(scale).float()
    try:
        scaled = tensor.float() * factor
        fits = scaled.shape == tensor.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ProjectionError(f"{where}: {scale} does not fit {key}'s shape {list(tensor.shape)}; get the file again")
    return scaled
