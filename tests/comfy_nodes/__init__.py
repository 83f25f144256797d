"""Test-only nodes: loaders for small and real CLIPs, and one that writes a conditioning to a file."""

import os

import folder_paths
import torch
from safetensors.torch import save_file

from . import builders


class TestCLIP:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP",), "load", "skrr test"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "kind": (["flux", "sdxl", "smollm2", "t5xxl shapes"],),
                "seed": ("INT", {"default": 0}),
                "folder": ("STRING", {"default": ""}),
            }
        }

    def load(self, kind, seed, folder):
        return (builders.build_kind(kind, seed, folder),)


class TestSaveConditioning:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "save", "skrr test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",), "name": ("STRING", {"default": "conditioning"})}}

    def save(self, conditioning, name):
        tensors = {"cond": conditioning[0][0].contiguous().clone()}
        pooled = conditioning[0][1].get("pooled_output")
        if torch.is_tensor(pooled):
            tensors["pooled"] = pooled.contiguous().clone()
        os.makedirs(folder_paths.get_output_directory(), exist_ok=True)
        save_file(tensors, os.path.join(folder_paths.get_output_directory(), f"{name}.safetensors"))
        return {}


NODE_CLASS_MAPPINGS = {"SkrrTestCLIP": TestCLIP, "SkrrTestSaveConditioning": TestSaveConditioning}
