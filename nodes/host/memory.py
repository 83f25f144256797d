"""What a CLIP weighs, dense and pruned, beside the other models of the pipeline."""

from dataclasses import dataclass

from .apply import Pruned
from .encoders import dense_model, pruning, size, views


@dataclass(frozen=True)
class EncoderMemory:
    """Bytes of one encoder's weights: dense (with all its sub-blocks) and now; pruned: what is in place, or None."""

    name: str
    family: str
    blocks: int
    dense: int
    now: int
    pruned: Pruned | None

    @property
    def saved(self) -> int:
        return self.dense - self.now


def encoders(clip) -> list[EncoderMemory]:
    """Each encoder of the CLIP that Skrr knows."""
    dense, active = dense_model(clip), pruning(clip)
    return [
        EncoderMemory(
            view.name,
            view.row.family,
            view.row.blocks,
            size(dense.get_submodule(view.path)),
            size(clip.cond_stage_model.get_submodule(view.path)),
            active.get(view.name),
        )
        for view in views(clip).values()
    ]


def model_bytes(model) -> int:
    """Bytes of a MODEL's weights."""
    return model.model_size()


def vae_bytes(vae) -> int:
    """Bytes of a VAE's weights."""
    return vae.patcher.model_size()


def clip_bytes(clip) -> int:
    """Bytes of all of a CLIP's weights, as its patcher counts them."""
    return clip.patcher.model_size()
