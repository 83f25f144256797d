"""What the command `sparsify` does."""

from collections.abc import Iterator

from ..errors import SkrrError
from .commands import check_writable, prepare


def run_sparsify(options) -> None:
    """Take the given share of the weights out of a text encoder, or of a denoiser (by magnitude), and write what is
    left without the zeros; check it with verify."""
    from ..files.encoder_file import resealed
    from ..files.sparse import write_sparse
    from ..files.sparsify import Files, as_found, by_magnitude
    from ..weights.tensor import PackedWeight

    if not 0 < options.sparsity < 1:
        raise SkrrError(f"--sparsity {options.sparsity}: give a share between 0 and 1, like 0.475")
    check_writable(options.out, "--out")
    files = Files(options.encoder)
    files.prunable(options.exclude)
    if options.method == "magnitude":
        tensors = by_magnitude(files, options.sparsity, options.exclude)
    else:
        tensors = as_found(files, calibrated(options), options.method == "sparsegpt")
    counted = {"dense": 0, "left": 0, "packed": 0}

    def counting() -> Iterator:
        for key, tensor in tensors:
            if isinstance(tensor, PackedWeight):
                counted["packed"] += 1
                counted["dense"] += tensor.numel()
                counted["left"] += len(tensor.packed.values)
            yield key, tensor

    written = write_sparse(
        options.out, counting(), files.kind, options.method, {files.kind: options.sparsity}, files.metadata,
        files.check_unchanged, resealed,
    )  # fmt: skip
    gone = 1 - counted["left"] / counted["dense"] if counted["dense"] else 0.0
    print(f"{counted['packed']} weights packed, {gone:.1%} of them gone ({options.method})")
    print(f"{options.out}: {written:,} bytes of {files.size:,} ({written / files.size:.1%})")


def calibrated(options) -> dict:
    """Name of a layer -> its pruned weight, packed, of an encoder that is loaded for it and given prompts."""
    from ..weights.packed import pack
    from ..weights.prune import prunable, sparsify
    from ..weights.statistics import seen

    bench = prepare(options)
    module = bench.encoder.module
    pairs = prunable(module, [*options.exclude, "*lm_head"])
    batches = bench.encoder.batches(bench.prompts, bench.tokens, padding=bench.padding)

    def run() -> None:
        for batch in batches:
            batch.run(module)

    layers, found = dict(pairs), {}
    statistics = seen(pairs, run, options.method == "sparsegpt")
    for name, weight in sparsify(pairs, options.sparsity, options.method, statistics=statistics):
        found[name] = pack(weight)
        layers[name].weight.data.copy_(weight)  # later layers see what it gives
    return found
