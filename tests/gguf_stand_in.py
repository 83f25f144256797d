"""A stand-in for the pack ComfyUI-GGUF, of its kind: tensors that hide quantised bytes, operations that dequantise them
at every call, and its loader node. Set SKRR_GGUF to a checkout of the real pack to test with that instead."""

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import folder_paths
import gguf
import torch


class Quantised(torch.Tensor):
    """Raw bytes that say they have the shape of the weight."""

    def __new__(cls, raw: torch.Tensor, kind, shape):
        made = torch.Tensor._make_subclass(cls, raw)
        made.tensor_type, made.tensor_shape = kind, torch.Size(shape)
        return made

    @property
    def shape(self):
        return getattr(self, "tensor_shape", None) or self.size()

    def to(self, *args, **kwargs):
        return Quantised(self.as_subclass(torch.Tensor).to(*args, **kwargs), self.tensor_type, self.tensor_shape)

    def detach(self):
        return self

    def copy_(self, *args, **kwargs):
        return self


def dequantised(tensor, dtype):
    if not isinstance(tensor, Quantised):
        return tensor.to(dtype)
    raw = tensor.as_subclass(torch.Tensor).numpy()
    return torch.from_numpy(gguf.quants.dequantize(raw, tensor.tensor_type)).reshape(tensor.tensor_shape).to(dtype)


class Operations(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, bias=True, **kwargs):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            self.weight, self.bias = torch.nn.Parameter(torch.empty(0), requires_grad=False), None

        def _load_from_state_dict(self, state_dict, prefix, *args):
            if prefix + "weight" in state_dict:
                self.weight = torch.nn.Parameter(state_dict[prefix + "weight"], requires_grad=False)

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            destination[prefix + "weight"] = self.weight

        def forward(self, x):
            return torch.nn.functional.linear(x, dequantised(self.weight, x.dtype))


class GGUFModelPatcher(comfy.model_patcher.ModelPatcher):
    """As there: always patches weights, and its clones are of its own class."""

    def load(self, *args, force_patch_weights=False, **kwargs):
        super().load(*args, force_patch_weights=True, **kwargs)

    def clone(self, *args, **kwargs):
        own, self.__class__ = self.__class__, GGUFModelPatcher
        made = super().clone(*args, **kwargs)
        made.__class__, self.__class__ = GGUFModelPatcher, own
        return made


NAMES = {
    "enc.": "encoder.", ".blk.": ".block.", "token_embd": "shared", "output_norm": "final_layer_norm",
    "attn_q": "layer.0.SelfAttention.q", "attn_k": "layer.0.SelfAttention.k", "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o", "attn_norm": "layer.0.layer_norm",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias", "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo", "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_norm": "layer.1.layer_norm",
}  # fmt: skip


def renamed(key: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key


class CLIPLoaderGGUF:
    """As the real one: a CLIP of its own at every call."""

    def load_clip(self, clip_name, type="stable_diffusion"):
        path = folder_paths.get_full_path("clip_gguf", clip_name)
        state = {}
        for tensor in gguf.GGUFReader(path).tensors:
            shape = tuple(reversed([int(n) for n in tensor.shape]))
            raw = torch.from_numpy(tensor.data)
            plain = tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
            state[renamed(tensor.name, NAMES)] = (
                raw.reshape(shape) if plain else Quantised(raw, tensor.tensor_type, shape)
            )
        options = {
            "custom_operations": Operations,
            "initial_device": comfy.model_management.text_encoder_offload_device(),
        }
        clip = comfy.sd.load_text_encoder_state_dicts(
            clip_type=getattr(comfy.sd.CLIPType, type.upper()), state_dicts=[state], model_options=options
        )
        clip.patcher.__class__ = GGUFModelPatcher
        clip.patcher.size = 0  # it was counted before the weights were there
        return (clip,)


def write_gguf(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A T5 `.gguf` with its two-dimensional weights in Q8_0, as llama.cpp's tools write it."""
    writer = gguf.GGUFWriter(str(path), "t5encoder")
    back = {new: old for old, new in NAMES.items()}
    ordered = dict(sorted(back.items(), key=lambda item: -len(item[0])))
    for key, tensor in tensors.items():
        name, data = renamed(key, ordered), tensor.float().numpy()
        kind = gguf.GGMLQuantizationType.Q8_0
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and "relative" not in key and "shared" not in key:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
