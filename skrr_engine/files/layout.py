"""A file's tensors seen as a text encoder's row of sub-blocks, by their names and shapes."""

import re
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass

from ..disk.safetensors import Entry
from ..encoder import families
from ..encoder.row import Numbers

MAX_BLOCKS = 1000

PARAMETERS = (".weight", ".bias")
"""What the names of parameters end with: a scale, a marker or a tokenizer is none."""
ALIAS = ("model.language_model.", "model.")
"""How encoders that also see name their text part, and how ComfyUI's text encoders do."""


@dataclass(frozen=True)
class Layout(Numbers):
    """A file's encoder as a row of sub-blocks, with its numbers. keys: for each sub-block the tensors that go away with
    it, none where a file that others have shortened lacks it; entries: all of the encoder's tensors, those that a
    pruned file has left out included, but nothing that no text encoder uses (a decoder, a tower that sees, the
    embedding again); prefix: what stands before their names in this file; extras: what ComfyUI reads beside them
    (tokenizer, markers); rotated: names, without `.weight`, of projections that mix groups of their columns before they
    multiply, so that none can be taken alone.

    What lies in units is told of tensors that narrowing can cut (see `cuts`): scales of rows go with them, and what is
    quantised in blocks stays whole.
    """

    keys: tuple[tuple[str, ...], ...]
    entries: Mapping[str, Entry]
    prefix: str
    extras: frozenset[str]
    rotated: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, family: str, width: int, keys: Sequence[Sequence[str]], entries: Mapping[str, Entry], prefix: str,
        extras: frozenset[str], rotated: frozenset[str] = frozenset(),
    ) -> "Layout":  # fmt: skip
        """From its tensors."""
        counts = {key: parameters(key, entry) for key, entry in entries.items()}
        in_units = [cuts(family, own, entries, rotated)[0] for own in keys]
        return cls(
            family,
            len(keys) // 2,
            width,
            sum(counts.values()),
            tuple(sum(counts[key] for key in own) for own in keys),
            sum(entry.nbytes for entry in entries.values()),
            tuple(sum(entries[key].nbytes for key in own) for own in keys),
            tuple(sum(counts[key] for key in own) for own in in_units),
            tuple(sum(entries[key].nbytes for key in own) for own in in_units),
            tuple(map(tuple, keys)),
            entries,
            prefix,
            extras,
            rotated,
        )

    @property
    def used(self) -> Set[str]:
        """Names of all tensors of the file that its encoder or its tokenizer is made of."""
        return self.entries.keys() | self.extras

    def name(self, key: str) -> str:
        """The name that ComfyUI's encoder has for a tensor of this file."""
        own = key.removeprefix(self.prefix)
        return ALIAS[1] + own.removeprefix(ALIAS[0]) if own.startswith(ALIAS[0]) else own

    def place(self, name: str) -> int | None:
        """The sub-block that a tensor goes away with, by its name in ComfyUI's encoder; also one that the file lacks (a
        scale, say)."""
        family = families.by_name(self.family)
        found = family.file_key.fullmatch(name)
        if found is None or found["other"] is not None or int(found["block"]) >= self.blocks:
            return None
        if family.stays(int(found["block"]), found["rest"], self.entries):
            return None
        return 2 * int(found["block"]) + (found["feed_forward"] is not None)

    def dropped(self, skipped) -> set[str]:
        """Names of the tensors that go away with these sub-blocks."""
        return {key for index in skipped for key in self.keys[index]}

    def extended(self, blocks: int) -> "Layout":
        """This encoder as the one of so many blocks that it was before others cut off its last ones."""
        more = ((),) * (2 * max(0, blocks - self.blocks))
        return Layout.of(
            self.family, self.width, self.keys + more, self.entries, self.prefix, self.extras, self.rotated
        )

    def heads(self, block: int) -> int | None:
        """How many key/value heads a block's attention has, None where its tensors don't tell."""

        def shape(ending: str) -> tuple[int, ...] | None:
            return next((entry.shape for key, entry in self.entries.items() if key.endswith(ending)), None)

        return families.by_name(self.family).file_heads(block, shape)


PLAIN = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8")
"""Types of weights that hold an element for each weight, in the order of rows and columns."""
SCALES = ("weight_scale", "scale_weight")
"""Last names of tensors that may hold a number for each row of a weight."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of theirs: scales of blocks have others."""
MARKER = "comfy_quant"


def cuts(
    family: str, keys: Collection[str], entries: Mapping[str, Entry], rotated: Collection[str] = ()
) -> tuple[dict[str, int], set[str]]:
    """Which tensors of a sub-block narrowing cuts: name -> to some of its rows (0) or columns (1); and the names,
    without `.weight`, of those projections that it can't, as they are quantised in blocks: they stay whole. keys: of
    all its tensors; rotated: see Layout."""
    known = families.by_name(family)
    layers: dict[str, dict[str, Entry]] = {}
    for key in keys:
        layer, _, kind = key.rpartition(".")
        if layer.rpartition(".")[2] in known.ins | known.outs:
            layers.setdefault(layer, {})[kind] = entries[key]
    found, whole = {}, set()
    for layer, tensors in layers.items():
        dimension = int(layer.rpartition(".")[2] in known.outs)
        if not cuttable(tensors) or (dimension and layer in rotated):
            whole.add(layer)
            continue
        rows = tensors["weight"].shape[0]
        found[f"{layer}.weight"] = dimension
        if not dimension:
            found |= {f"{layer}.{kind}": 0 for kind in tensors if by_rows(kind, tensors[kind], rows)}
    return found, whole


def cuttable(tensors: Mapping[str, Entry]) -> bool:
    """Whether a projection can be cut, by its tensors' last names: an element for each weight, and scales for all of it
    or for each row."""
    weight = tensors.get("weight")
    if weight is None or weight.dtype not in PLAIN or len(weight.shape) != 2:
        return False
    rows = weight.shape[0]
    others = [(kind, entry) for kind, entry in tensors.items() if kind not in ("weight", MARKER)]
    return all(entry.count <= 1 or by_rows(kind, entry, rows) for kind, entry in others)


def by_rows(kind: str, entry: Entry, rows: int) -> bool:
    """Whether a tensor beside a weight, by its last name, holds a number for each of its rows."""
    known = kind == "bias" or (kind in SCALES and entry.dtype in FLOATS)
    return known and entry.shape in ((rows,), (rows, 1))


def parameters(key: str, entry: Entry) -> int:
    """Weights in a file's tensor; one of bytes without a type holds two in each (4 bits)."""
    return entry.count * (2 if entry.dtype == "U8" else 1) if key.endswith(PARAMETERS) else 0


def layout_of(entries: Mapping[str, Entry], rotated: frozenset[str] = frozenset()) -> Layout | None:
    """See tensors as the one encoder of a family that the engine knows, or None. rotated: see Layout."""
    found = layouts_of(entries, rotated)
    return found[0] if len(found) == 1 else None


def layouts_of(entries: Mapping[str, Entry], rotated: frozenset[str] = frozenset()) -> list[Layout]:
    """All encoders among these tensors that are whole and of a family that the engine knows. rotated: see Layout."""
    found: dict[str, Layout] = {}
    for family in families.FAMILIES:
        for prefix, matches in matching(family, entries).items():
            layout = None if prefix in found else _layout(family, prefix, matches, entries, rotated)
            if layout is not None:
                found[prefix] = layout
    return list(found.values())


def matching(family, entries: Collection[str]) -> dict[str, dict[str, re.Match]]:
    """The tensors of blocks that a family may have, by what stands before their names; blocks that hold anything that
    the family's do not are another architecture's."""
    found: dict[str, dict[str, re.Match]] = {}
    for key in entries:
        if match := family.file_key.fullmatch(key):
            found.setdefault(match["prefix"], {})[key] = match
    return {prefix: own for prefix, own in found.items() if not any(match["other"] for match in own.values())}


def _layout(
    family, prefix: str, matches: Mapping[str, re.Match], entries: Mapping[str, Entry], rotated: frozenset[str]
) -> Layout | None:
    """See the tensors under a prefix as one family's encoder, or None."""
    ends = "." + family.file_width
    norms = [found for key, found in matches.items() if key.endswith(ends) and found["block"] == "0"]
    if len(norms) != 1 or len(entries[norms[0].string].shape) != 1:
        return None
    blocks = 1 + max(int(m["block"]) for m in matches.values())
    if blocks > len(matches):
        return None
    keys: list[list[str]] = [[] for _ in range(2 * blocks)]
    for key, found in matches.items():
        if not family.stays(int(found["block"]), found["rest"], matches):
            keys[2 * int(found["block"]) + (found["feed_forward"] is not None)].append(key)
    if not all(keys):
        return None
    names = {key: key.removeprefix(prefix) for key in entries if key.startswith(prefix)}
    own = {
        key: entries[key]
        for key, name in names.items()
        if "." in name and not family.file_unused.fullmatch(name) and not _again(name, names.values())
    }
    extras = frozenset(key for key in entries if "." not in names.get(key, key))
    return Layout.of(family.name, entries[norms[0].string].shape[0], keys, own, prefix, extras, rotated)


def _again(name: str, names: Collection[str]) -> bool:
    """Whether a tensor is the embedding once more, as T5 files often hold it."""
    return name == "encoder.embed_tokens.weight" and "shared.weight" in names
