"""The architectures that the engine knows: one file each, one table here."""

from torch import nn

from ..row import EncoderError, Row, parameter_count
from .clip import CLIP
from .family import Family
from .gemma import GEMMA
from .gpt_oss import GPT_OSS
from .llama import LLAMA
from .t5 import T5
from .t5gemma import T5GEMMA

FAMILIES: tuple[Family, ...] = (T5, CLIP, T5GEMMA, GEMMA, GPT_OSS, LLAMA)
"""All of them, in the order in which they are tried."""


def by_name(name: str) -> Family:
    """The family of this name. Raises StopIteration where there is none."""
    return next(family for family in FAMILIES if name == family.name)


def find(encoder: nn.Module) -> Row:
    """See an encoder (ComfyUI's class or transformers') as a row of sub-blocks.

    encoder: the architecture module, e.g. `comfy.text_encoders.t5.T5` or `transformers.T5EncoderModel`.
    Raises EncoderError where no family fits.
    """
    for family in FAMILIES:
        found = family.find_blocks(encoder)
        if found is None:
            continue
        path, blocks = found
        family.check(encoder, blocks)
        sub_blocks = tuple(family.sub_blocks(blocks, path))
        in_units = [[t for key, t in s.tensors().items() if family.in_units(key)] for s in sub_blocks]
        return Row(
            family.name,
            len(blocks),
            family.width(blocks[0]),
            sum(parameter_count(p) for p in encoder.parameters()),
            tuple(sub_block.parameter_count() for sub_block in sub_blocks),
            sum(tensor.nbytes for tensor in encoder.state_dict(keep_vars=True).values()),
            tuple(sum(tensor.nbytes for tensor in s.tensors().values()) for s in sub_blocks),
            tuple(sum(map(parameter_count, tensors)) for tensors in in_units),
            tuple(sum(tensor.nbytes for tensor in tensors) for tensors in in_units),
            sub_blocks,
            tuple(f"{path}.{i}" for i in range(len(blocks))),
        )
    names = ", ".join(family.name for family in FAMILIES)
    raise EncoderError(
        f"{type(encoder).__name__} is not a text encoder that Skrr knows (it knows {names}): use another encoder"
    )
