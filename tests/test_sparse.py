"""Unstructured pruning against hand-made cases, plain definitions and closed forms."""

import fractions
import functools

import pytest
import small
import torch
import torch.nn.functional as F
from torch import nn

from skrr_engine.errors import SkrrError
from skrr_engine.weights import criteria, owl, sparsegpt
from skrr_engine.weights.choose import lowest, lowest_of_rows, spread
from skrr_engine.weights.prune import METHODS, prunable, sparsify
from skrr_engine.weights.statistics import Repeated, Statistics, features, gathering
from skrr_engine.weights.stored import stored

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def linear(rows, dtype=torch.float32, **attributes) -> nn.Linear:
    """A layer with this weight."""
    weight = torch.as_tensor(rows, dtype=torch.float32).to(dtype)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight, requires_grad=False)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def seen(pairs, *inputs, hessian=False) -> Statistics:
    """Statistics of modules that were given these inputs."""
    with gathering(pairs, hessian) as found:
        for x in inputs:
            for _, module in pairs:
                module(x)
    return found


def pruned(pairs, *args, **options) -> dict[str, torch.Tensor]:
    return dict(sparsify(pairs, *args, **options))


def zeros(weight: torch.Tensor) -> int:
    return int((weight.float() == 0).sum())


# Which ones go


def test_magnitude_by_hand():
    layers = [("a", linear([[1, -5, 2, 8], [-3, 4, 7, 6]])), ("b", linear([[0.5, 9, -0.1, 10]]))]
    by_layer = pruned(layers, 0.5)
    assert by_layer["a"].tolist() == [[0, -5, 0, 8], [0, 0, 7, 6]] and by_layer["b"].tolist() == [[0, 9, 0, 10]]
    together = pruned(layers, 0.5, scope="global")
    assert together["a"].tolist() == [[0, -5, 0, 8], [0, 0, 7, 6]] and together["b"].tolist() == [[0, 9, 0, 10]]
    third = pruned(layers, 1 / 3, scope="global")
    assert third["a"].tolist() == [[0, -5, 0, 8], [-3, 4, 7, 6]] and third["b"].tolist() == [[0, 9, 0, 10]]
    assert layers[0][1].weight.tolist() == [[1, -5, 2, 8], [-3, 4, 7, 6]], "the module's own weight"


def test_wanda_by_hand():
    """Inputs of norms 1, 10, 1, 1: the small weight of the loud feature stays; each row gives as many."""
    layer = ("a", linear([[5, 1, 2, 3], [80, 10, 60, 90]]))
    statistics = seen([layer], torch.tensor([[1.0, 10, -1, 1], [-1, 10, 1, 1]]))
    assert statistics.norm("a").tolist() == [[1, 10, 1, 1]] and statistics.tokens == {"a": 2}
    assert criteria.wanda(*layer, statistics).tolist() == [[5, 10, 2, 3], [80, 100, 60, 90]]
    found = pruned([layer], 0.5, "wanda", statistics=statistics)["a"]
    assert found.tolist() == [[5, 1, 0, 0], [0, 10, 0, 90]]
    assert pruned([layer], 0.5)["a"].tolist() == [[0, 0, 0, 0], [80, 10, 60, 90]], "magnitude does otherwise"
    both = pruned([layer], 0.5, "wanda", "global", statistics)["a"]
    assert both.tolist() == [[0, 0, 0, 0], [80, 10, 60, 90]]


def test_wanda_against_its_definition():
    layer = ("a", nn.Linear(24, 10))
    inputs = [torch.randn(3, 5, 24) * torch.rand(24) * 9, torch.randn(2, 24)]
    statistics = seen([layer], *inputs)
    x = torch.cat([t.reshape(-1, 24) for t in inputs])
    weight = layer[1].weight
    order = [sorted(range(24), key=lambda j, i=i: float(weight[i, j].abs() * x[:, j].norm())) for i in range(10)]
    found = pruned([layer], 0.25, "wanda", statistics=statistics)["a"]
    for i, row in enumerate(order):
        assert sorted(row[:6]) == (found[i] == 0).nonzero().flatten().tolist()
    kept = found != 0
    assert torch.equal(found[kept], weight[kept])


@pytest.mark.parametrize("count", [0, 1, 7, 500, 999, 1000])
def test_the_lowest_of_several_tensors(count):
    scores = [torch.rand(10, 30), torch.rand(70, 10) * 0.3]
    masks = list(lowest(lambda: iter(scores), count))
    assert [m.shape for m in masks] == [s.shape for s in scores]
    gone = torch.cat([s[m] for s, m in zip(scores, masks, strict=True)]).sort().values
    assert torch.equal(gone, torch.cat([s.flatten() for s in scores]).sort().values[:count])


def test_equal_scores_go_evenly_and_alike():
    scores = [torch.ones(40), torch.ones(60, 10), torch.zeros(10)]
    masks = list(lowest(lambda: iter(scores), 330))
    assert [int(m.sum()) for m in masks] == [20, 300, 10]
    assert {int(m.sum()) for m in masks[1].split(2)} == {10}, "each few rows give their share"
    assert all(torch.equal(a, b) for a, b in zip(masks, lowest(lambda: iter(scores), 330), strict=True))
    rows = lowest_of_rows(torch.ones(4, 6), 10)
    assert rows.sum(dim=1).tolist() == [2, 3, 2, 3] and rows[0].tolist() == [True] * 2 + [False] * 4


def test_a_count_spread_by_sizes():
    assert spread(10, [1, 1, 1, 1]) == [2, 3, 2, 3] and spread(3, [0, 2, 0, 4]) == [0, 1, 0, 2]
    assert spread(7, [3, 4]) == [3, 4] and spread(0, [5]) == [0] and spread(0, []) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shares_to_the_number_and_kept_to_the_bit(method, dtype):
    weights = [t + t.sign() * 0.1 for t in (torch.randn(30, 17), torch.randn(9, 17))]  # none is zero in fp8
    layers = [("a", linear(weights[0], dtype)), ("b.0.c", linear(weights[1], dtype))]
    moved = [(name, linear(module.weight.float())) for name, module in layers]
    statistics = seen(moved, torch.randn(64, 17), hessian=True)
    for sparsity in (0.0, 0.475, 0.9):
        found = list(sparsify(layers, sparsity, method, statistics=statistics))
        assert [name for name, _ in found] == ["a", "b.0.c"]
        wanted = [round(sparsity * 510), round(sparsity * 153)]
        counts = [zeros(weight) for _, weight in found]
        if method == "owl":
            assert sum(counts) == round(sparsity * 663)
        elif method == "sparsegpt" and dtype.itemsize == 1:
            assert all(wanted[i] <= counts[i] <= wanted[i] + 3 for i in range(2))
        else:
            assert counts == wanted
        for (_, weight), (_, layer) in zip(found, layers, strict=True):
            assert weight.dtype == dtype and weight.shape == layer.weight.shape
            if method != "sparsegpt" or not sparsity:
                kept = weight.float() != 0
                assert torch.equal(weight.float()[kept], layer.weight.float()[kept])
            assert weight.data_ptr() != layer.weight.data_ptr()
            assert not torch.signbit(weight.float()[weight.float() == 0]).any(), "a zero is no bits at all"


def test_weights_that_are_zero_go_first():
    weight = torch.randn(10, 10)
    weight[:4] = 0
    found = pruned([("a", linear(weight))], 0.4)["a"]
    assert torch.equal(found, weight)


# What a layer is, and what its weight is


def test_what_is_prunable():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(9, 8), nn.LayerNorm(8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 3)) for _ in range(2))
            self.up, self.group, self.head = (
                nn.ConvTranspose2d(8, 8, 3),
                nn.GroupNorm(2, 8),
                nn.Linear(8, 9, bias=False),
            )
            self.head.weight = self.embed.weight
            self.again, self.proj_out = nn.Linear(8, 8), nn.Conv1d(8, 8, 1)
            self.again.weight = self.blocks[0][0].weight

    model = Model()
    all_ = ["blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.1.1", "proj_out"]
    assert [name for name, _ in prunable(model)] == all_
    assert [name for name, _ in prunable(model, ["blocks.?.1", "proj*"])] == ["blocks.0.0", "blocks.1.0"]
    assert all(model.get_submodule(name) is module for name, module in prunable(model))


def test_comfyuis_layers_are_prunable(comfy):
    import comfy.ops

    operations = [comfy.ops.disable_weight_init, comfy.ops.manual_cast, comfy.ops.fp8_ops, comfy.ops.scaled_fp8_ops()]
    for ops in operations:
        model = nn.ModuleList([ops.Linear(4, 4), ops.Conv2d(4, 4, 3), ops.Embedding(4, 4), ops.LayerNorm(4)])
        assert [name for name, _ in prunable(model)] == ["0", "1"]


def quantised_layer(weight: torch.Tensor, scale: float):
    """ComfyUI's own linear layer of a file with mixed precisions, in fp8."""
    import comfy.ops
    from comfy.quant_ops import QuantizedTensor

    Linear = comfy.ops.mixed_precision_ops({}, torch.float32).Linear
    made = Linear(weight.shape[1], weight.shape[0], bias=False)
    params = {"scale": torch.tensor(scale), "orig_dtype": torch.float32}
    made.weight = nn.Parameter(
        QuantizedTensor(weight.to(torch.float8_e4m3fn), "TensorCoreFP8Layout", params), requires_grad=False
    )
    return made


def test_scaled_fp8(comfy):
    """A scale counts where layers are compared, and what comes back is in it."""
    numbers = torch.tensor([[16.0, 32, -64, 128]])
    layers = [
        ("plain", linear(numbers / 64, torch.float8_e4m3fn)),
        ("beside", linear(numbers, torch.float8_e4m3fn, scale_weight=nn.Parameter(torch.tensor(0.001)))),
        ("inside", quantised_layer(numbers, 0.01)),
    ]
    assert [name for name, _ in prunable(nn.ModuleDict(dict(layers)))] == ["plain", "beside", "inside"]
    assert torch.allclose(stored(*layers[2]).values(), numbers * 0.01)
    found = {name: weight.float().tolist() for name, weight in sparsify(layers, 0.5, scope="global")}
    assert found == {"plain": [[0, 0.5, -1, 2]], "beside": [[0, 0, 0, 0]], "inside": [[0, 32, -64, 128]]}
    halves = {name: weight for name, weight in sparsify(layers, 0.5)}
    assert all(weight.dtype == torch.float8_e4m3fn and zeros(weight) == 2 for weight in halves.values())
    plain = [("a", linear(numbers * 0.01))]
    statistics = seen(plain, torch.randn(50, 4), hessian=True)
    wanted = pruned(plain, 0.5, "sparsegpt", statistics=statistics)["a"]
    made = pruned([("a", layers[2][1])], 0.5, "sparsegpt", statistics=statistics)["a"]
    assert made.dtype == torch.float8_e4m3fn and torch.allclose(made.float() * 0.01, wanted, rtol=0.07)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_what_is_too_large_for_a_type_is_its_largest(dtype):
    most = torch.finfo(dtype).max
    found = stored("a", linear([[1.0, 1]], dtype)).rounded(torch.tensor([[1e6, -1e6]]))
    assert found.dtype == dtype and found.float().tolist() == [[most, -most]]


# Inputs


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1, stride=2), (3, 4, 11)),
    "2d": (nn.Conv2d(4, 6, (3, 2), padding=(2, 1), stride=(1, 2), dilation=(2, 1)), (3, 4, 9, 8)),
    "3d": (nn.Conv3d(2, 4, 2, padding=1), (2, 2, 3, 4, 5)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (3, 4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (1, 4, 6, 6)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "one picture": (nn.Conv2d(4, 6, 3, padding="valid"), (4, 6, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_is_linear_in_its_unfolded_input(name):
    module, shape = CONVOLUTIONS[name]
    x = torch.randn(shape)
    wanted = module(x) - module.bias.reshape([-1] + [1] * len(module.kernel_size))
    wanted = wanted if wanted.ndim == len(module.kernel_size) + 2 else wanted.unsqueeze(0)
    tokens = features(module, x)
    weight = module.weight.reshape(module.groups, -1, tokens.shape[2])
    out = torch.einsum("gtf,gof->got", tokens, weight).reshape(len(module.weight), len(wanted), -1)
    assert torch.allclose(out.movedim(0, 1), wanted.flatten(2), atol=1e-5)


def test_wanda_of_a_convolution_is_that_of_unfold():
    layer = ("a", nn.Conv2d(4, 6, 3, padding=1))
    x = torch.randn(2, 4, 7, 7)
    unfolded = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 36)
    same = ("a", linear(layer[1].weight.flatten(1)))
    for method in ("wanda", "sparsegpt"):
        found = pruned([layer], 0.5, method, statistics=seen([layer], x, hessian=True))["a"]
        wanted = pruned([same], 0.5, method, statistics=seen([same], unfolded, hessian=True))["a"]
        assert torch.allclose(found, wanted.reshape(found.shape), atol=1e-6)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_grouped_convolution_is_several(method):
    layer = ("a", nn.Conv2d(4, 6, 3, groups=2))
    x = torch.randn(8, 4, 7, 7)
    found = pruned([layer], 0.5, method, statistics=seen([layer], x, hessian=True))["a"]
    for g, (rows, channels) in enumerate(((slice(0, 3), slice(0, 2)), (slice(3, 6), slice(2, 4)))):
        alone = nn.Conv2d(2, 3, 3)
        alone.weight.data = layer[1].weight.data[rows]
        own = pruned([("a", alone)], 0.5, method, statistics=seen([("a", alone)], x[:, channels], hessian=True))["a"]
        # 27 of 54 in each; one odd row more or less is where two layers of their own would round otherwise
        assert zeros(found[rows]) == 27 or method == "wanda", g
        assert int((own.ne(0) ^ found[rows].ne(0)).sum()) <= 2 and torch.allclose(
            own.flatten(1).norm(), found[rows].flatten(1).norm(), rtol=0.05
        )


def test_means_over_batches_are_those_of_all():
    """In inference mode, in halves and on several inputs; hooks are gone afterwards."""
    layer = ("a", nn.Linear(6, 2))
    x = torch.randn(40, 6) * 3
    with gathering([layer], hessian=True) as statistics:
        with torch.inference_mode():
            layer[1](x[:7])
        layer[1](x[7:7])
        layer[1](x[7:39].reshape(4, 8, 6))
        layer[1](x[39])
    layer[1](x)
    assert statistics.tokens == {"a": 40}
    assert torch.allclose(statistics.hessian("a")[0], x.T @ x / 40, rtol=1e-4, atol=1e-5)
    assert torch.allclose(statistics.norm("a")[0], x.square().mean(dim=0).sqrt(), rtol=1e-5)
    with pytest.raises(RuntimeError), gathering([layer]):
        layer[1](x[:, :5])
    assert not layer[1]._forward_pre_hooks
    layer[1].half()
    with gathering([layer]) as statistics:
        layer[1](torch.full((3, 6), 300.0, dtype=torch.float16))  # whose square fp16 does not hold
    assert statistics.norm("a").tolist() == [[300] * 6]


def test_hessians_of_some_modules_at_a_time():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    pairs, x, runs = prunable(model), torch.randn(60, 8), []

    def run():
        runs.append(1)
        model(x)

    with gathering(pairs, hessian=True) as whole:
        model(x)
    for memory, times in ((0, 3), (4 * (64 + 256), 2), (10**6, 1)):
        runs.clear()
        repeated = Repeated(pairs, run, memory)
        wanted = pruned(pairs, 0.5, "sparsegpt", statistics=whole)
        found = pruned(pairs, 0.5, "sparsegpt", statistics=repeated)
        assert all(torch.equal(wanted[name], found[name]) for name in wanted) and len(runs) == times
    for name, weight in sparsify(pairs, 0.5, "sparsegpt", statistics=Repeated(pairs, run, 0)):
        model.get_submodule(name).weight.data = weight
    assert not torch.allclose(model[2].weight, wanted["2"]), "later modules see what the pruned ones give"


# SparseGPT


def damped(x: torch.Tensor) -> torch.Tensor:
    """The paper's H, float64, from inputs `[tokens, features]`."""
    h = (x.double().T @ x.double()) / len(x)
    return h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def test_one_weight_gone_is_the_closed_form():
    """OBS: all others change by -w_p / [H^-1]_pp * H^-1[:, p]. The first column's loss moves all columns."""
    layer = ("a", linear([[1e-4, 1, -2, 3, 1.5]]))
    x = torch.randn(100, 5) @ torch.randn(5, 5)
    found = pruned([layer], 0.2, "sparsegpt", statistics=seen([layer], x, hessian=True))["a"]
    inverse = damped(x).inverse()
    w = layer[1].weight.double()[0]
    wanted = w - w[0] / inverse[0, 0] * inverse[:, 0]
    assert found[0, 0] == 0 and torch.allclose(found[0].double(), wanted, rtol=1e-5)
    big = linear([[0.5, 1e3, 1e3, 1e3, 1e3]])
    found = pruned([("a", big)], 0.2, "sparsegpt", statistics=seen([("a", big)], x, hessian=True))["a"]
    moved = big.weight.double()[0] - 0.5 / inverse[0, 0] * inverse[:, 0]
    assert found[0, 0] == 0 and torch.allclose(found[0, 1:].double(), moved[1:], rtol=1e-5)


def test_one_column_left_is_least_squares():
    """Where all columns but the last are gone, the last is what least squares makes of it."""
    w, x = torch.tensor([[0.01, 0.02, -0.03, 5.0]]), torch.randn(200, 4) @ torch.randn(4, 4)
    h = damped(x)
    h_plain = ((x.double().T @ x.double()) / len(x)).float()
    found = sparsegpt.fasterprune(w, h_plain, 3)
    last = (h[3] @ w.double()[0]) / h[3, 3]  # argmin over v of (w - [0, 0, 0, v]) H (w - [0, 0, 0, v])ᵀ
    assert found[0, :3].tolist() == [0, 0, 0] and float(found[0, 3]) == pytest.approx(float(last), rel=1e-5)


def test_blocks_of_columns_change_the_choice_only():
    """With the same zeros, the weights that stay are the same whatever the block: updates are exact, only put off."""
    W, x = torch.randn(6, 20), torch.randn(300, 20) @ torch.randn(20, 20)
    W[:, 1::2] = W[:, 1::2].sign() * 100  # the others are gone in any case, and what they did is made up for
    H = x.T @ x / len(x)
    wanted = sparsegpt.fasterprune(W, H, 60, blocksize=20)
    for blocksize in (2, 4, 6):
        assert torch.allclose(sparsegpt.fasterprune(W, H, 60, blocksize=blocksize), wanted, atol=0.01)
    assert (wanted[:, ::2] == 0).all() and zeros(wanted) == 60
    assert not torch.allclose(wanted[:, 1::2], W[:, 1::2], atol=0.1)


def test_sparsegpt_chooses_by_what_a_loss_costs():
    """w² / [H^-1]_jj: a larger weight of a quiet feature goes before a smaller one of a loud feature."""
    found = sparsegpt.fasterprune(torch.tensor([[5.0, 1.0]]), torch.tensor([[1.0, 0], [0, 100]]), 1)
    assert found[0, 0] == 0 and found[0, 1] != 0


def test_features_without_inputs_go_first():
    x = torch.randn(50, 6)
    x[:, [1, 4]] = 0
    layer = ("a", nn.Linear(6, 6))
    for method in ("sparsegpt", "wanda"):
        found = pruned([layer], 1 / 3, method, statistics=seen([layer], x, hessian=True))["a"]
        assert (found[:, [1, 4]] == 0).all() and zeros(found) == 12
    silent = seen([layer], torch.zeros(9, 6), hessian=True)
    assert zeros(pruned([layer], 0.5, "sparsegpt", statistics=silent)["a"]) == 18


def output_error(module: nn.Linear, weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Mean squared error of a layer's output, from its inputs' second moments."""
    d = (weight - module.weight).double()
    return float(((d @ hessian.double()) * d).sum())


def test_sparsegpt_beats_magnitude_on_smollm2(smollm2_folder):
    """On layers of real weights, on real prompts; all layers: docs/sparse.md."""
    from skrr_engine.files.folder import load
    from skrr_engine.measure.prompts import generate

    encoder = load(smollm2_folder)
    wanted = [
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.o_proj",
        "layers.1.mlp.up_proj",
        "layers.1.mlp.down_proj",
    ]
    pairs = [(name, encoder.module.get_submodule(name)) for name in wanted]
    assert set(wanted) <= {name for name, _ in prunable(encoder.module)} and len(prunable(encoder.module)) == 210
    with gathering(pairs, hessian=True) as statistics:
        for batch in encoder.batches(generate(4)):
            batch.run(encoder.module)
    weights = {m: pruned(pairs, 0.5, m, statistics=statistics) for m in ("magnitude", "wanda", "sparsegpt")}
    for name, module in pairs:
        errors = {m: output_error(module, found[name], statistics.hessian(name)[0]) for m, found in weights.items()}
        assert 0 < errors["sparsegpt"] < 0.8 * errors["magnitude"] and errors["sparsegpt"] < errors["wanda"], name


# OWL


def test_layers_by_name():
    names = {
        "layers.3.mlp.up_proj": "layers.3",
        "encoder.block.0.layer.1.DenseReluDense.wi": "encoder.block.0",
        "joint_blocks.2.x_block.attn.qkv": "joint_blocks.2",
        "context_embedder": "context_embedder",
    }
    assert {name: owl.layer(name) for name in names} == names


def owl_case():
    """Three layers of unlike sizes, with no, some and more outliers."""
    weights = [torch.ones(10, 10), torch.ones(20, 10), torch.ones(5, 10)]
    weights[1].flatten()[:2] = 100.0
    weights[2].flatten()[:2] = 100.0
    pairs = [(f"blocks.{i}.w", linear(weight)) for i, weight in enumerate(weights)]
    return pairs, seen(pairs, torch.ones(3, 10))


def test_owl_by_hand():
    pairs, statistics = owl_case()
    assert owl.outlier_ratios(pairs, statistics) == {"blocks.0": 0, "blocks.1": 2 / 200, "blocks.2": 2 / 50}
    assert owl.outlier_ratios(pairs, statistics, m=99)["blocks.2"] == 0
    found = owl.counts(pairs, 0.5, statistics)
    # D: 0, .01, .04, mean by weights (0 * 100 + .01 * 200 + .04 * 50) / 350 = 4 / 350; a slope of .16 / .04
    shares = [0.5 - 4 * (d - 4 / 350) for d in (0, 0.01, 0.04)]
    assert list(found.values()) == [
        round(shares[0] * 100),
        round(shares[0] * 100 + shares[1] * 200) - round(shares[0] * 100),
        175 - round(shares[0] * 100 + shares[1] * 200),
    ]
    weights = pruned(pairs, 0.5, "owl", statistics=statistics)
    assert {name: zeros(weight) for name, weight in weights.items()} == found
    alike = owl.counts(pairs[:1], 0.37, statistics)
    assert alike == {"blocks.0.w": 37}, "one layer alone: what was asked for"


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.1, 0.35, 0.475, 0.7, 0.99])
def test_owls_mean_is_the_target(sparsity):
    pairs, statistics = owl_case()
    found = owl.counts(pairs, sparsity, statistics)
    assert sum(found.values()) == round(sparsity * 350)
    assert all(0 <= count <= module.weight.numel() for count, (_, module) in zip(found.values(), pairs, strict=True))
    shares = [count / module.weight.numel() for count, (_, module) in zip(found.values(), pairs, strict=True)]
    if 0.1 < sparsity < 0.9:
        assert shares[0] > shares[1] > shares[2] and max(shares) - min(shares) == pytest.approx(0.16, abs=0.03)


def test_a_blocks_modules_share_a_ratio():
    module = small.build("llama", 3)
    pairs = prunable(module)
    with gathering(pairs) as statistics:
        for ids in small.prompts([5, 9, 12]):
            small.forward("llama", ids)(module)
    found = pruned(pairs, 0.5, "owl", statistics=statistics)
    assert sum(zeros(weight) for weight in found.values()) == round(0.5 * sum(m.weight.numel() for _, m in pairs))
    for block in range(3):
        own = [
            fractions.Fraction(zeros(w), w.numel()) for name, w in found.items() if name.startswith(f"layers.{block}.")
        ]
        assert len(own) == 7 and float(max(own) - min(own)) < 0.002


# What can't be


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "best"}, 'method: there is no "best"; take one of magnitude'),
        ({"scope": "row"}, 'scope: there is no "row"; take one of layer, global'),
        ({"method": "owl", "scope": "global"}, "scope: owl has its own shares"),
        ({"method": "wanda"}, "wanda needs calibration inputs"),
        ({"sparsity": 1.0}, "sparsity: 1.0 is no share"),
        ({"sparsity": -0.1}, "from 0 to below 1"),
        ({"sparsity": float("nan")}, "sparsity: nan is no share"),
        ({"sparsity": True}, "sparsity: True is no share"),
        ({"sparsity": "0.5"}, "sparsity: 0.5 is no share"),
    ],
)
def test_what_is_refused_at_once(options, words):
    with pytest.raises(SkrrError, match=words) as caught:
        sparsify([("a", linear([[1.0]]))], **{"sparsity": 0.5, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_refused_on_the_way(method):
    good = linear([[1.0, 2]])
    statistics = seen([("good", good)], torch.randn(9, 2), hessian=True)
    bad = linear([[1.0, float("nan")]])
    for name in ("good", "bad\n"):
        statistics.squares[name], statistics.hessians[name] = statistics.squares["good"], statistics.hessians["good"]
    prune = functools.partial(pruned, method=method, statistics=statistics)
    with pytest.raises(SkrrError, match=r"bad\\n: its weights or its inputs are not all numbers"):
        prune([("good", good), ("bad\n", bad)], 0.5)
    blocks = nn.Linear(2, 1)
    blocks.weight = nn.Parameter(torch.zeros(1, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(SkrrError, match="good: its weights lie in blocks or whole numbers .uint8.*take a file in fp32"):
        prune([("good", blocks)], 0.5)
    if method != "magnitude":
        with pytest.raises(SkrrError, match="never: the calibration inputs never reached it; exclude it"):
            prune([("never", good)], 0.5)


def test_nothing_to_prune():
    assert list(sparsify([], 0.5)) == []
    assert list(sparsify([], 0.5, "owl", statistics=Statistics())) == []
