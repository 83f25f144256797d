"""The architectures that the engine knows: one file each, one table here."""

from torch import nn

from ..row import EncoderError, Row, parameter_count
from . import clip, gemma, llama, t5

FAMILIES = (t5, clip, gemma, llama)
"""Each is a module with NAME, NORM (what kind its norms are: standin.NORMS), FILE_KEY, FILE_WIDTH and FILE_UNUSED (names
in files: of a block's tensors, of one as wide as the encoder, and what follows a prefix but no text encoder uses),
`find_blocks(encoder) -> (path, ModuleList) | None`, `width(block)` and
`sub_blocks(blocks, path)`, which
yields attention and feed-forward of each block in turn."""


def by_name(name: str):
    """The family of this name. Raises StopIteration where there is none."""
    return next(family for family in FAMILIES if name == family.NAME)


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
        paths = tuple(f"{path}.{i}" for i in range(len(blocks)))
        sub_blocks = tuple(family.sub_blocks(blocks, path))
        total = sum(parameter_count(p) for p in encoder.parameters())
        return Row(family.NAME, family.width(blocks[0]), sub_blocks, paths, total)
    names = ", ".join(f.NAME for f in FAMILIES)
    raise EncoderError(
        f"{type(encoder).__name__} is not a text encoder that Skrr knows (it knows {names}): use another encoder"
    )
