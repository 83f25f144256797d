"""What a CLIP hands to the sampler for some prompts, LoRAs, layer choice and wrapper included."""

from collections.abc import Sequence

from ....skrr_engine.encoder.trace import Reading
from ....skrr_engine.measure.projection import CLIPS
from ..model import from_model
from .views import views


def readings(clip, prompts: Sequence[str]) -> list[Reading]:
    """One for each prompt: the embeddings that the denoiser gets, their mask where there is one, the pooled vector."""
    found = []
    for prompt in prompts:
        out = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True, return_dict=True)
        cond, pooled, mask = out["cond"], out.get("pooled_output"), out.get("attention_mask")
        reading: Reading = [(cond.float(), None if mask is None else mask.reshape(1, -1)[:, -cond.shape[1] :])]
        if pooled is not None:
            reading.append((pooled.float().reshape(1, 1, -1), None))
        found.append(reading)
    return found


def projection(model, clip, width: int):
    """The MODEL's text projection for conditioning of this width. Raises ProjectionError where it takes another."""
    widest = max(views(clip).values(), key=lambda view: (view.shape.width == width, view.shape.width))
    joined = any(widest.name == encoder for encoder, *_ in CLIPS)
    return from_model(model, widest, width if joined or width % widest.shape.width == 0 else None)
