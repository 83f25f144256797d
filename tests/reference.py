"""An independent, slow reference: skip and re-use by hooks in an encoder's own forward.

It shares no code with the engine. Every sub-block still runs; its result is thrown away afterwards.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from skrr_engine.encoder.actions import Action

BLOCKS = {
    "t5": "encoder.block", "clip": "text_model.encoder.layers", "llama": "model.layers", "gemma": "model.layers",
    "gpt_oss": "model.layers", "t5gemma": "model.encoder.layers",
}  # fmt: skip
NAMES = {
    "clip": (("layer_norm1", "self_attn", None), ("layer_norm2", "mlp", None)),
    "llama": (("input_layernorm", "self_attn", None), ("post_attention_layernorm", "mlp", None)),
    "gemma": (
        ("input_layernorm", "self_attn", "post_attention_layernorm"),
        ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    ),
    "t5gemma": (
        ("pre_self_attn_layernorm", "self_attn", "post_self_attn_layernorm"),
        ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    ),
}
NAMES["gpt_oss"] = NAMES["llama"]


def blocks_of(encoder, family: str):
    path = BLOCKS[family]
    if family in ("llama", "gemma", "gpt_oss", "t5gemma") and not hasattr(encoder, "model"):
        path = "layers"
    return encoder.get_submodule(path)


@contextmanager
def skipping(encoder, family: str, removed: Mapping[int, int | None]) -> Iterator[None]:
    """While it lasts, the encoder's forward skips or re-uses these sub-blocks."""
    blocks = blocks_of(encoder, family)
    install = t5_hooks if family == "t5" else residual_hooks
    handles = []
    try:
        for index, target in removed.items():
            handles += install(blocks, family, index, target)
        yield
    finally:
        for handle in handles:
            handle.remove()


def t5_hooks(blocks, family, index, target):
    layer = blocks[index // 2].layer[index % 2]
    stand_in = None if target is None else blocks[target // 2].layer[target % 2]
    seen = {}

    def before(module, args, kwargs):
        seen["x"] = (args[0] if args else kwargs["hidden_states"]).clone()
        seen["args"], seen["kwargs"] = args, kwargs

    def after(module, args, kwargs, out):
        x, position_bias = seen["x"], out[1] if isinstance(out, tuple) else None
        if stand_in is not None:
            rest, named = list(seen["args"][1:]), dict(seen["kwargs"])
            if rest and len(rest) > 1:
                rest[1] = position_bias  # ComfyUI: (x, mask, past_bias, optimized_attention)
            if "position_bias" in named:
                named["position_bias"] = position_bias
            result = stand_in(x.clone(), *rest, **named)
            x = result[0] if isinstance(result, tuple) else result
        return (x, *out[1:]) if isinstance(out, tuple) else x

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    ]


def residual_hooks(blocks, family, index, target):
    norm, body, post = (name and getattr(blocks[index // 2], name) for name in NAMES[family][index % 2])
    seen = {}

    def before(module, args):
        seen["x"] = args[0].clone()

    def after(module, args, kwargs, out):
        if target is None:
            result = torch.zeros_like(out[0] if isinstance(out, tuple) else out)
        else:
            norm_j, body_j, post_j = (n and getattr(blocks[target // 2], n) for n in NAMES[family][target % 2])
            hidden = norm_j(seen["x"].clone())
            result = body_j(hidden, *args[1:], **kwargs) if args else body_j(**{**kwargs, "hidden_states": hidden})
            result = result[0] if isinstance(result, tuple) else result
            result = result if post_j is None else post_j(result)
        return (result, *out[1:]) if isinstance(out, tuple) else result

    handles = [norm.register_forward_pre_hook(before), body.register_forward_hook(after, with_kwargs=True)]
    if post is not None:
        # The stand-in's own second norm has been applied; this place's must not.
        kept = {}
        handles.append(post.register_forward_pre_hook(lambda module, args: kept.update(x=args[0].clone())))
        handles.append(post.register_forward_hook(lambda module, args, out: kept["x"]))
    return handles


def naive_discrepancy(
    encoder, family: str, run_all: Callable[[], list[torch.Tensor]], run_null: Callable[[], torch.Tensor], project=None
) -> Callable[[Mapping[int, Action]], float]:
    """`D(removed)` by whole passes. run_all: features of each prompt `[tokens, width]`; run_null: of the empty one."""
    project = project or (lambda x: x)
    dense, dense_null = [project(f) for f in run_all()], project(run_null())

    def discrepancy(removed: Mapping[int, Action]) -> float:
        with skipping(encoder, family, {i: action.target for i, action in removed.items()}):
            pruned, pruned_null = [project(f) for f in run_all()], project(run_null())
        error = sum(float((p.double() - d.double()).square().sum()) for p, d in zip(pruned, dense, strict=True))
        conditional = error / sum(d.numel() for d in dense)
        return conditional + float((pruned_null.double() - dense_null.double()).square().mean())

    return discrepancy
