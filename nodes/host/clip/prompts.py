"""How a CLIP's encoder is run on prompts, and what of its output the denoiser reads: found from the CLIP itself.

ComfyUI wraps each encoder (SDClipModel) in a model that picks and cuts its outputs (SD1ClipModel, FluxClipModel, ...).
The wrapper is asked, on a fork of it whose encoders only play back what they gave for the empty prompt (or for another
of PROBES, where the empty one does not run them): what is poisoned with NaN and shows up in the conditioning is read.
"""

import bisect
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn

from ....skrr_engine.encoder.actions import assignment
from ....skrr_engine.encoder.rewire import rewire
from ....skrr_engine.encoder.row import EncoderError
from ....skrr_engine.encoder.trace import Reading
from ....skrr_engine.encoder.tree import fork
from ....skrr_engine.measure.calibration import Batch, grouped
from .views import TRANSFORMER, View, as_dense, pristine_fork, views

PROBES = ("", '""', 'a sign that says "a"')
"""Prompts that encoders are asked about; some run only for quoted text."""


class Wanted(Exception):
    """Carries an encoder's tokens out of its wrapper."""


def copied(output: tuple) -> tuple:
    """An encoder's output whose dictionaries are its own."""
    return tuple(dict(part) if isinstance(part, dict) else part for part in output)


def tensors_in(value) -> Iterator[torch.Tensor]:
    """All tensors of an output, whatever they lie in."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def own_lists(tokens):
    """Tokens in dictionaries and lists of their own, which a wrapper may change."""
    if isinstance(tokens, dict):
        return {key: own_lists(part) for key, part in tokens.items()}
    return [own_lists(part) for part in tokens] if isinstance(tokens, list) else tokens


class Conditioning:
    """One encoder of a CLIP, ready to be run on prompts.

    encoder: a fork of its SDClipModel with the CLIP's options set; what the engine's tracer and runs are given. It runs
    where the weights are now, which is enough to ask what is read; `load` takes all of them to the device that
    encodes. Never changes the CLIP. probe: the first of PROBES that runs this encoder, which stands for the empty
    prompt; hidden, pooled, mask: whether the conditioning reads these; width: of its hidden states, as the denoiser
    gets them (layer taps joined).

    Raises EncoderError where it can't be told what is read, or nothing is.
    """

    def __init__(self, clip, view: View):
        self.clip, self.view = as_dense(clip), view
        self._prepare(None)

    def load(self) -> "Conditioning":
        """Load the CLIP, with nothing left out, as for encoding. Returns itself."""
        self._prepare(self.clip.load_model().load_device)
        return self

    def _prepare(self, device: torch.device | None) -> None:
        clip, view, all_views = self.clip, self.view, views(self.clip)
        self.wrapper = pristine_fork(clip, [f"{v.path}.{TRANSFORMER}x" for v in all_views.values()])
        self.wrapper.reset_clip_options()
        if clip.layer_idx is not None:
            self.wrapper.set_clip_options({"layer": clip.layer_idx})
        self.wrapper.set_clip_options({"execution_device": device})
        self.encoder = self.wrapper.get_submodule(view.path)
        self._hollow = self._hollowed(all_views.values())
        self._children = {v.name: self._hollow.get_submodule(v.path) for v in all_views.values()}
        self._tokenized: tuple[str | None, object] = None, None
        self._outputs, self.probe = {}, None
        for prompt in PROBES:
            self._outputs = {**self._record(prompt), **self._outputs}
            if view.name in self._outputs:
                self.probe = prompt
                break
        else:
            raise EncoderError(f"no prompt that Skrr tried runs {view.name}, so what is read of it can't be told")
        self.hidden, self.pooled, self.mask = self._used()
        shape = self._outputs[view.name][0].shape
        self.width = shape[-1] * (shape[1] if len(shape) == 4 else 1)
        if not (self.hidden or self.pooled):
            raise EncoderError(f"the conditioning reads nothing of {view.name} in this CLIP: choose another encoder")

    def _hollowed(self, all_views: Iterable[View]) -> nn.Module:
        """A fork of the wrapper whose encoders skip everything: what it reads does not depend on what they compute."""
        whole = [view for view in all_views if view.whole is not None]
        paths = [view.prefix + path for view in whole for s in view.row.sub_blocks for path in s.parts]
        hollow = fork(self.wrapper, [*paths, *(f"{view.prefix}x" for view in all_views)])
        for view in whole:
            everything = assignment(range(len(view.row)))
            rewire(hollow.get_submodule(view.path).transformer, view.row, everything)
        return hollow

    def _record(self, prompt: str) -> dict[str, tuple]:
        """Encoder name -> what its encode_token_weights returns for a prompt, with all sub-blocks skipped; those alone
        that it runs."""
        outputs = {}
        for name, child in self._children.items():
            original = child.encode_token_weights

            def recording(tokens, *args, name=name, original=original, **kwargs):
                out = original(tokens, *args, **kwargs)
                outputs[name] = copied(out)  # wrappers may take things out of it
                return out

            child.encode_token_weights = recording
        self._encode(prompt)
        for child in self._children.values():
            del child.encode_token_weights
        return outputs

    def _encode(self, prompt: str) -> tuple:
        if prompt != self._tokenized[0]:  # it is asked of one prompt several times in a row
            self._tokenized = prompt, self.clip.tokenize(prompt)
        return self._hollow.encode_token_weights(own_lists(self._tokenized[1]))

    def _play(self, prompt: str, name: str, act: Callable) -> tuple:
        """Run the wrapper with every encoder's output played back where it is known, but `act(tokens)` for the encoder
        `name`."""
        for other, child in self._children.items():
            if other == name:
                child.encode_token_weights = act
            elif other in self._outputs:
                child.encode_token_weights = functools.partial(lambda out, tokens: out, copied(self._outputs[other]))
        try:
            return self._encode(prompt)
        finally:
            for child in self._children.values():
                child.__dict__.pop("encode_token_weights", None)

    def _shows(self, prompt: str, output: tuple) -> bool:
        """Whether NaN in an output of this encoder is in the conditioning of a prompt."""
        out = self._play(prompt, self.view.name, lambda tokens: copied(output))
        return any(bool(t.isnan().any()) for t in tensors_in(out) if t.is_floating_point())

    def _used(self) -> tuple[bool, bool, bool]:
        """Whether the conditioning reads the hidden states, the pooled vector and the attention mask."""
        hidden, pooled, *extra = self._outputs[self.view.name]
        reads_hidden = self._shows(self.probe, (torch.full_like(hidden, float("nan")), pooled, *extra))
        poisoned = None if pooled is None else torch.full_like(pooled, float("nan"))
        reads_pooled = pooled is not None and self._shows(self.probe, (hidden, poisoned, *extra))
        out = self._play(self.probe, self.view.name, lambda tokens: copied(self._outputs[self.view.name]))
        reads_mask = bool(extra) and "attention_mask" in extra[0] and len(out) > 2 and "attention_mask" in out[2]
        return reads_hidden, reads_pooled, reads_mask

    def read_range(self, prompt: str, tokens: int) -> tuple[int, int]:
        """The tokens of a prompt of one section that the conditioning reads, as `(first, behind the last)`: wrappers
        cut away the template that they put around a prompt."""
        if not self.hidden:
            return 0, tokens
        hidden, pooled, *extra = self._outputs[self.view.name]
        clean = hidden.new_zeros((*hidden.shape[:-2], tokens, hidden.shape[-1]))
        extra = [{k: v.new_ones(1, tokens) if k == "attention_mask" else v for k, v in e.items()} for e in extra]

        def shows(start: int, end: int) -> bool:
            poisoned = clean.clone()
            poisoned[..., start:end, :] = float("nan")
            return self._shows(prompt, (poisoned, pooled, *extra))

        first, last = 0, tokens
        if not shows(0, 1):
            first = bisect.bisect_left(range(tokens), True, key=lambda i: shows(0, i + 1))
        if not shows(tokens - 1, tokens):
            last = tokens - bisect.bisect_left(range(tokens), True, key=lambda i: shows(tokens - 1 - i, tokens))
        return (first, last) if first < last else (0, tokens)

    def sections(self, prompt: str) -> list[list]:
        """The encoder's tokens of a prompt, as its wrapper hands them over: one list a section, no weights."""

        def tell(tokens):
            raise Wanted(tokens)

        try:
            self._play(prompt, self.view.name, tell)
        except Wanted as found:
            return [[token[0] for token in section] for section in found.args[0]]
        return []

    def batches(self, prompts: Sequence[str], tokens: int = 2048, race: bool = False) -> list[Batch]:
        """Prompts as batches of sections of one length and read range, at most about `tokens` tokens each. race: in the
        order of a race (see race.grouped)."""
        found = [section for prompt in prompts for section in self._read_sections(prompt)]
        if not found:
            raise EncoderError(f"none of the prompts runs {self.view.name}: give some with quoted text")
        groups = grouped([key for key, *_ in found], lambda key: tokens // max(1, key[0]), race)
        return [self._batch([found[i][1:] for i in group], *found[group[0]][0][1:]) for group in groups]

    def null(self) -> Batch:
        """The empty prompt, or what stands for it."""
        ((_, start, end), *_), *_ = found = list(self._read_sections(self.probe))
        return self._batch([(section, is_first) for _, section, is_first in found], start, end)

    def _read_sections(self, prompt: str):
        """Yield `((length, first token read, behind the last), tokens, whether it is the prompt's first)`."""
        sections = self.sections(prompt)
        for number, section in enumerate(sections):
            length = len(section)
            start, end = self.read_range(prompt, length) if len(sections) == 1 else (0, length)
            yield (length, start, end), section, number == 0

    def _batch(self, sections: list[tuple[list, bool]], start: int, end: int) -> Batch:
        tokens = [section for section, _ in sections]
        first = torch.tensor([[is_first] for _, is_first in sections])

        def run(encoder: nn.Module, times: int = 1) -> Reading:
            hidden, pooled, *extra = encoder.encode(tokens * times)
            reading: Reading = []
            if self.hidden:
                # Layer taps [batch, taps, tokens, width] are joined on the feature axis, as the wrappers do.
                hidden = hidden.movedim(1, 2).flatten(2) if hidden.ndim == 4 else hidden
                mask = extra[0]["attention_mask"][:, start:end] if self.mask else None
                reading.append((hidden[:, start:end], mask))
            if self.pooled:
                reading.append((pooled.unsqueeze(1), first.repeat(times, 1).to(pooled.device)))
            return reading

        def split() -> tuple[Batch, Batch]:
            half = len(sections) // 2
            return self._batch(sections[:half], start, end), self._batch(sections[half:], start, end)

        return Batch(run, len(tokens), split)
