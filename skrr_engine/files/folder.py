"""Encoders for the command line: a transformers folder, or a single text-encoder `.safetensors` as ComfyUI users have.

`transformers` is imported only here, inside functions. Nothing is fetched from a network.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..encoder import families
from ..encoder.row import EncoderError, Row
from ..encoder.trace import Reading
from ..errors import first_line
from ..measure.calibration import Batch, grouped
from ..measure.projection import dequantised
from ..measure.prompts import segments
from .encoder_file import SHARD
from .offload import Files, Stream, weight_bytes

MAX_TOKENS = 256
CLIP_TOKENS = 77
MAX_PADDING = 1024


@dataclass(frozen=True)
class Padding:
    """What follows a prompt's tokens. tokens: a prompt has so many at least; masked: whether attention does not see the
    others, and the denoiser reads zeros there."""

    tokens: int = 0
    masked: bool = False


PADDED = {"flux": Padding(256), "sd3": Padding(77), "wan": Padding(512, masked=True)}
"""Denoiser (see projection.RECIPES) -> how ComfyUI pads its T5's prompts. The others' are not padded."""


def padding(family: str, denoiser: str | None, least: int | None = None) -> Padding:
    """How the prompts of an encoder of this family are padded for a denoiser, which is None where it is not known.
    least: a number of tokens to pad to instead."""
    if family == "clip":
        return Padding(CLIP_TOKENS if least is None else min(least, CLIP_TOKENS))
    if least is not None:
        return Padding(least)
    return PADDED.get(denoiser, Padding()) if family == "t5" else Padding()


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder. name: the one that ComfyUI has for it where there is one (`t5xxl`, `clip_l`), else the
    family's; tokenize: prompt -> token ids, at least one; bring: has a sub-block's weights in memory, where they are
    streamed from files; pad: the token that prompts are padded with."""

    name: str
    module: nn.Module
    row: Row
    tokenize: Callable[[str], list[int]]
    bring: Callable[[int], None] = lambda index: None
    pad: int = 0

    def batches(
        self, prompts: Sequence[str], tokens: int = 512, race: bool = False, padding: Padding | None = None
    ) -> list[Batch]:
        """Prompts grouped by length, so that no padding is computed but what the denoiser reads; at most about `tokens`
        tokens in a batch. race: in the order of a race (see race.grouped)."""
        padding = padding or Padding()
        ids = [self.tokenize(prompt) for prompt in prompts]
        if not padding.masked:
            ids = [own + [self.pad] * (padding.tokens - len(own)) for own in ids]
        groups = grouped([len(own) for own in ids], lambda length: tokens // length, race)
        return [self.batch([ids[i] for i in group], padding.tokens if padding.masked else 0) for group in groups]

    def batch(self, ids: list[list[int]], read: int = 0) -> Batch:
        """Token ids of equal length as a batch; the conditioning is the last hidden state after the final norm, and
        zeros behind it where it is shorter than `read` tokens."""
        device = next(self.module.parameters()).device
        options = {"use_cache": False} if self.row.family in ("llama", "gemma") else {}

        def run(module: nn.Module, times: int = 1) -> Reading:
            given = torch.tensor(ids * times, device=device)
            # With a mask that hides nothing, transformers does not spend more on making one than on reading a state.
            out = module(input_ids=given, attention_mask=torch.ones_like(given), **options)
            zeros = max(0, read - given.shape[1])
            return [(F.pad(out.last_hidden_state, (0, 0, 0, zeros)) if zeros else out.last_hidden_state, None)]

        middle = len(ids) // 2
        return Batch(run, len(ids), lambda: (self.batch(ids[:middle], read), self.batch(ids[middle:], read)))


def load(
    path: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tokenizer: str | None = None,
    memory: int | None = None,
    shares: int = 2,
) -> Encoder:
    """Load an encoder from a transformers folder or a `.safetensors` file. Raises EncoderError in one line.

    tokenizer: folder of its tokenizer, where that is not the encoder's own folder. memory: bytes that its weights may
    take; where they need more, the sub-blocks' are streamed from the files (see stream.py). shares: into how many parts
    of this size the command line divides its `--memory`, for the error that names the least that does.
    """
    source = Path(path)
    if not source.exists():
        raise EncoderError(f"{path}: no such file or folder; give a transformers folder or a .safetensors file")
    shard = SHARD.search(source.name)
    if source.is_file() and shard and int(shard[2]) > 1:
        raise EncoderError(f"{path}: part {int(shard[1])} of {int(shard[2])} of an encoder: give its whole folder")
    folder = source if source.is_dir() else source.parent
    files = Files(sorted(source.glob("*.safetensors")) if source.is_dir() else [source]) if memory is not None else None
    if files is not None and files.elements() * dtype.itemsize > memory:
        module, row, bring = streamed(source, files, dtype, device, memory, shares)
    else:
        module = from_folder(source, dtype) if source.is_dir() else from_file(source, dtype)
        module = module.eval().requires_grad_(False).to(device)
        row, bring = families.find(module), Encoder.bring
    tokenize = tokenizer_of(Path(tokenizer) if tokenizer else folder, row)
    return Encoder(usual_name(row), module, row, tokenize, bring, pad_of(row, tokenize))


def streamed(source: Path, files: Files, dtype: torch.dtype, device: str, memory: int, shares: int = 2):
    """An encoder whose sub-blocks' weights stay in their files, its row, and what brings a sub-block in. Raises
    EncoderError, before any weight is read, where `memory` does not hold what stays and one sub-block (see `load`)."""
    transformers = import_transformers()
    if source.is_dir():
        module = blank(source)
    else:
        prefix, shapes = stripped({key: entry.shape for key, entry in files.entries.items()}, source)
        module = (t5 if "encoder.final_layer_norm.weight" in shapes else clip)(transformers, shapes, source)
    module = module.eval().requires_grad_(False)
    row = families.find(module)
    names = set(files.entries)
    wanted = next(iter(row.sub_blocks[0].tensors()))
    prefixes = [name.removesuffix(wanted) for name in names if name.endswith(wanted)]
    if not prefixes:
        raise EncoderError(f"{source}: {wanted} is missing; get the whole file")

    def read(key: str) -> torch.Tensor:
        stored = min(prefixes, key=len) + ("shared.weight" if key == "encoder.embed_tokens.weight" else key)
        if stored not in names:
            raise EncoderError(f"{source}: {stored} is missing; get the whole file")
        return dequantised(stored, files.read, names, str(source)).to(device, dtype)

    coming = {key for sub_block in row.sub_blocks for key in sub_block.tensors()}
    staying = {key: parameter for key, parameter in module.named_parameters() if key not in coming}
    resident = weight_bytes(staying.values(), dtype.itemsize)
    largest = max(weight_bytes(sub_block.tensors().values(), dtype.itemsize) for sub_block in row.sub_blocks)
    if resident + largest > memory:
        least = gigabytes(shares * (resident + largest))
        smaller = ", or --dtype bfloat16" if dtype.itemsize > 2 else ""
        raise EncoderError(
            f"{source}: too large for the memory there is, even streamed; give --memory {least} (GB) or more{smaller}"
        )
    stream = Stream(row, read, memory - resident, dtype.itemsize)
    for key, parameter in staying.items():
        parameter.data = read(key)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    return module, row, stream.bring


def gigabytes(size: int) -> str:
    """So many bytes as `--memory` takes them: with two decimals (two digits, below 1 GB), rounded up."""
    size = max(size + 1, 10**6)  # a byte more, as what is given is cut to whole ones; less than 0.001 GB is not taken
    decimals = max(2, 10 - math.floor(math.log10(size)))
    unit = 10 ** (9 - decimals)
    return f"{-(-size // unit) * unit / 1e9:.{decimals}f}"


def pad_of(row: Row, tokenize: Callable[[str], list[int]]) -> int:
    """The token that ComfyUI pads prompts with: for CLIP-L (of CLIPs it alone is 768 wide) the end's, for others 0."""
    return tokenize("")[-1] if row.family == "clip" and row.width == 768 else 0


def usual_name(row: Row) -> str:
    """ComfyUI's attribute name for the encoder of this shape where there is one, else the family's name."""
    names = {
        ("t5", 24, 4096): "t5xxl",
        ("clip", 12, 768): "clip_l",
        ("clip", 24, 1024): "clip_h",
        ("clip", 32, 1280): "clip_g",
    }
    return names.get((row.family, row.blocks, row.width), row.family)


def import_transformers():
    """transformers, which must not fail on a torchvision that doesn't fit this torch: text needs none."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers
    from transformers.utils import import_utils

    try:
        import torchvision  # noqa: F401
    except Exception:  # whatever a mismatched build raises
        import_utils._torchvision_available = False
    return transformers


def no_init_weights():
    """transformers' context in which a model is made without filling it; its place differs between versions 4 and 5."""
    transformers = import_transformers()
    if hasattr(transformers.modeling_utils, "no_init_weights"):
        return transformers.modeling_utils.no_init_weights()
    from transformers import initialization

    return initialization.no_init_weights()


def from_folder(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The text encoder of a transformers folder. Raises EncoderError, also where some of its weights are missing, which
    transformers would fill with random ones."""

    def make(chosen, config) -> tuple[nn.Module, dict]:
        options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
        if config.model_type == "gemma3_text":  # transformers 4 does not find it inside the language model
            options["key_mapping"] = {r"^model\.": ""}
        return chosen.from_pretrained(folder, **options)

    module, info = of_folder(folder, make)
    if missing := sorted(info["missing_keys"]):
        raise EncoderError(f"{folder}: {len(missing)} tensors are missing, {missing[0]} first; get the whole folder")
    return module


def blank(folder: Path) -> nn.Module:
    """The same, its weights still to come."""

    def make(chosen, config) -> nn.Module:
        with no_init_weights():
            module = chosen.from_config(config) if hasattr(chosen, "from_config") else chosen(config)
        module.tie_weights()
        return module

    return of_folder(folder, make)


def of_folder(folder: Path, make: Callable) -> nn.Module:
    """What `make(class, configuration)` gives for the encoder in a transformers folder. Raises EncoderError."""
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        classes = {
            "t5": transformers.T5EncoderModel,
            "umt5": transformers.UMT5EncoderModel,
            "mt5": transformers.MT5EncoderModel,
            "clip": transformers.CLIPTextModel,
            "clip_text_model": transformers.CLIPTextModel,
        }
        return make(classes.get(config.model_type, transformers.AutoModel), config)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise EncoderError(f"{folder}: transformers can't load an encoder from it ({first_line(error)})") from None


def from_file(path: Path, dtype: torch.dtype) -> nn.Module:
    """A T5 or CLIP text encoder from one safetensors file; its configuration is read from its tensors' shapes."""
    from safetensors import SafetensorError, safe_open

    transformers = import_transformers()
    try:
        with safe_open(str(path), framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            prefix, shapes = stripped(found, path)
            make = t5 if "encoder.final_layer_norm.weight" in shapes else clip
            module = make(transformers, shapes, path)
            names = set(file.keys())
            if "text_model.final_layer_norm.weight" in shapes and not hasattr(module, "text_model"):
                prefix += "text_model."  # which transformers 5 leaves out
            state = {}
            for key in module.state_dict():
                stored = prefix + ("shared.weight" if key == "encoder.embed_tokens.weight" else key)
                if stored in names:
                    state[key] = dequantised(stored, file.get_tensor, names, str(path)).to(dtype)
        missing, _ = module.load_state_dict(state, strict=False, assign=True)
        module.tie_weights()
    except (SafetensorError, OSError) as error:
        raise EncoderError(f"{path}: can't be read as safetensors ({first_line(error)}); get the file again") from None
    except RuntimeError as error:
        raise EncoderError(
            f"{path}: its tensors don't fit together ({first_line(error)}); get the file again"
        ) from None
    if missing:
        raise EncoderError(f"{path}: {len(missing)} tensors are missing, {missing[0]} first; get the whole file")
    return module


def stripped(shapes: dict[str, tuple[int, ...]], path: Path) -> tuple[str, dict[str, tuple[int, ...]]]:
    """Shapes without what stands before the architecture's own names, and that prefix. Raises EncoderError where there
    are several encoders."""
    anchors = ("encoder.final_layer_norm.weight", "text_model.final_layer_norm.weight")
    found = [key.removesuffix(anchor) for key in shapes for anchor in anchors if f".{key}".endswith(f".{anchor}")]
    if len(found) > 1:
        raise EncoderError(f"{path}: holds {len(found)} text encoders: give a file of one, or a transformers folder")
    prefix = found[0] if found else ""
    return prefix, {key.removeprefix(prefix): s for key, s in shapes.items() if key.startswith(prefix)}


def block_count(shapes, before: str) -> int:
    """Number of blocks, from the indices that stand behind `before` in the tensors' names."""
    indices = {key[len(before) :].split(".")[0] for key in shapes if key.startswith(before)}
    return max((int(i) for i in indices if i.isdecimal()), default=-1) + 1


def t5(transformers, shapes: dict[str, tuple[int, ...]], path: Path) -> nn.Module:
    """An uninitialised T5 or UMT5 encoder of these shapes."""
    attention, ffn = "encoder.block.{}.layer.0.SelfAttention.", "encoder.block.0.layer.1.DenseReluDense."
    gated = ffn + "wi_0.weight" in shapes
    try:
        heads = shapes[attention.format(0) + "relative_attention_bias.weight"]
        inner, width = shapes[attention.format(0) + "q.weight"]
        settings = {
            "vocab_size": shapes["shared.weight"][0],
            "d_model": width,
            "d_kv": inner // heads[1],
            "num_heads": heads[1],
            "relative_attention_num_buckets": heads[0],
            "d_ff": shapes[ffn + ("wi_0.weight" if gated else "wi.weight")][0],
            "num_layers": block_count(shapes, "encoder.block."),
            "feed_forward_proj": "gated-gelu" if gated else "relu",
        }
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise EncoderError(
            f"{path}: not a whole T5 text encoder ({first_line(error)} is missing or misshapen)"
        ) from None
    if attention.format(1) + "relative_attention_bias.weight" in shapes:
        return uninitialised(transformers, transformers.UMT5EncoderModel, transformers.UMT5Config(**settings))
    return uninitialised(transformers, transformers.T5EncoderModel, transformers.T5Config(**settings))


def clip(transformers, shapes: dict[str, tuple[int, ...]], path: Path) -> nn.Module:
    """An uninitialised CLIP text encoder of these shapes. Heads are 64 wide, and only CLIP-L (768 wide) has quick GELU:
    shapes do not tell these."""
    layer = "text_model.encoder.layers.0."
    try:
        width = shapes[layer + "layer_norm1.weight"][0]
        settings = {
            "vocab_size": shapes["text_model.embeddings.token_embedding.weight"][0],
            "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
            "hidden_size": width,
            "intermediate_size": shapes[layer + "mlp.fc1.weight"][0],
            "num_hidden_layers": block_count(shapes, "text_model.encoder.layers."),
            "num_attention_heads": max(1, width // 64),
            "hidden_act": "quick_gelu" if width == 768 else "gelu",
        }
    except (KeyError, IndexError) as error:
        raise EncoderError(
            f"{path}: neither a T5 nor a CLIP text encoder ({first_line(error)} is missing); give such a file,"
            " or a transformers folder"
        ) from None
    return uninitialised(transformers, transformers.CLIPTextModel, transformers.CLIPTextConfig(**settings))


def uninitialised(transformers, model_class, config) -> nn.Module:
    """A model whose weights are still to be assigned."""
    with no_init_weights():
        module = model_class(config)
    module.tie_weights()  # transformers 5 leaves T5 with two embeddings
    return module


def tokenizer_of(folder: Path, row: Row) -> Callable[[str], list[int]]:
    """The tokenizer in a folder as prompt -> ids: with its special tokens, cut at 256 (at what CLIP's positions allow),
    T5's and CLIP's without the weights that artists write, as ComfyUI has them.

    Where the empty prompt gives no token, it is the BOS token (else EOS, else PAD).
    """
    transformers = import_transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its loaders raise anything from TypeError to their own
        raise EncoderError(
            f"{folder}: no tokenizer that transformers can load ({first_line(error)}); name its folder with --tokenizer"
        ) from None
    limit = min(MAX_TOKENS, CLIP_TOKENS if row.family == "clip" else MAX_TOKENS)
    null = next(
        (i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None), None
    )

    around = tokenizer("")["input_ids"] if row.family in ("t5", "clip") else []

    def tokenize(prompt: str) -> list[int]:
        if around:  # as ComfyUI does it: weights are no text
            parts = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in segments(prompt))
            ids = [token for part in parts for token in part][: limit - len(around)]
            ids = [*around[:-1], *ids, around[-1]]
        else:
            ids = tokenizer(prompt, truncation=True, max_length=limit)["input_ids"]
        if not ids and null is None:
            raise EncoderError(f"{folder}: its tokenizer has no BOS, EOS or PAD token to stand for the empty prompt")
        return ids or [null]

    return tokenize
