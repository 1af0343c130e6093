from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from objectives.attribution.composites import zennit_composite
from objectives.attribution.engine import ZennitAttribution, captured
from objectives.canonization import canonize
from objectives.datasets import LabelledImages
from objectives.errors import RelevanceError, UnsupportedNetworkError
from objectives.layer_groups import group_layers
from objectives.network import CanonicalNetwork
from search_spaces.composites import CompositeSpec

MIXED = CompositeSpec.parse_rules("LLR=Gamma,MLL=AlphaBeta,HLL=ZPlus,FCL=Epsilon", abs=True)


def all_layers(rule: str) -> CompositeSpec:
    return CompositeSpec.parse_rules(",".join(f"{group}={rule}" for group in ("LLR", "MLL", "HLL", "FCL")), abs=True)


@pytest.fixture(scope="module")
def references() -> LabelledImages:
    images = torch.randn(50, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return LabelledImages(images, torch.arange(50) % 10)


@pytest.fixture(scope="module")
def network(build) -> nn.Module:
    return build("cifar_resnet20")


@pytest.fixture(scope="module")
def engine(network, references) -> ZennitAttribution:
    canonical = canonize(network, (3, 16, 16))
    few = LabelledImages(references.images[:6], references.labels[:6])
    return ZennitAttribution(canonical, group_layers(canonical), few, batch_size=4)


def relevance_at_outputs(engine: ZennitAttribution, composite: CompositeSpec) -> dict[str, Tensor]:
    """Relevance of all elements of every component's output, in one pass."""
    rules = zennit_composite(composite, engine.layer_groups)
    with rules.context(engine.network.module) as module, captured(module, engine.network) as values:
        logits = module(engine.references.images.clone().requires_grad_())
        start = nn.functional.one_hot(engine.references.labels, logits.shape[1]).double()
        names = list(engine.network.components)
        return dict(zip(names, torch.autograd.grad(logits, [values.outputs[n] for n in names], start), strict=True))


def hooks(module: nn.Module) -> list[list[int]]:
    return [list(value) for part in module.modules() for key, value in vars(part).items() if key.endswith("_hooks")]


@pytest.mark.parametrize("abs_scope", ["sum", "element"])
def test_both_rankings_come_from_one_attribution(engine, abs_scope):
    relevance = replace(engine, abs_scope=abs_scope).attribute(MIXED)
    scores, magnitudes = relevance.scores(absolute=False), relevance.scores(absolute=True)
    elements = relevance_at_outputs(engine, MIXED)
    assert list(scores) == list(magnitudes) == list(engine.network.components)
    for name, width in engine.network.components.items():
        signed, magnitude = torch.zeros(width).double(), torch.zeros(width).double()
        for sample in elements[name]:
            for component, values in enumerate(sample.flatten(start_dim=1)):
                signed[component] += values.sum() / 6
                of_one = values.abs().sum() if abs_scope == "element" else values.sum().abs()
                magnitude[component] += of_one / 6
        torch.testing.assert_close(scores[name], signed, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(magnitudes[name], magnitude, rtol=1e-9, atol=1e-14)
    assert (magnitudes["conv1"] >= scores["conv1"].abs() - 1e-14).all()


def test_abs_scopes_differ(engine):
    by_sum = engine.attribute(MIXED).scores(absolute=True)["conv1"]
    by_element = replace(engine, abs_scope="element").attribute(MIXED).scores(absolute=True)["conv1"]
    assert (by_element > 1.01 * by_sum).any()
    assert (by_element >= by_sum).all()


@pytest.mark.parametrize("rule", ["Epsilon", "ZPlus", "AlphaBeta", "Gamma"])
def test_relevance_of_the_logit_is_the_logit_times_relevance_of_one(engine, rule):
    references = LabelledImages(engine.references.images[:1], engine.references.labels[:1])
    one = replace(engine, references=references).attribute(all_layers(rule)).signed
    logit = replace(engine, references=references, output_relevance="logit").attribute(all_layers(rule)).signed
    with torch.no_grad():
        factor = engine.network.module(references.images)[0, references.labels[0]]
    for name in one:
        scale = float(logit[name].abs().max())
        torch.testing.assert_close(logit[name], one[name] * factor, rtol=1e-9, atol=1e-12 * scale)


def test_batches_change_rounding_only(engine, references):
    one, all_of_them = (
        replace(engine, references=references, batch_size=batch_size).attribute(MIXED) for batch_size in (1, 50)
    )
    for name in one.signed:
        assert one.signed[name].shape == (engine.network.components[name],)
        scale = float(all_of_them.magnitude[name].max())
        torch.testing.assert_close(one.signed[name], all_of_them.signed[name], rtol=0, atol=1e-10 * scale)
        torch.testing.assert_close(one.magnitude[name], all_of_them.magnitude[name], rtol=0, atol=1e-10 * scale)


def test_attribution_is_repeatable_and_leaves_no_hooks(engine):
    module = engine.network.module
    first, again = (replace(engine).attribute(MIXED) for _ in range(2))
    assert all(torch.equal(first.signed[name], again.signed[name]) for name in first.signed)
    assert not any(hooks(module))
    assert all(parameter.grad is None for parameter in module.parameters())
    logits = module(engine.references.images)
    assert logits.grad_fn is None


def test_the_latest_relevances_are_kept(engine):
    fresh = replace(engine)
    composites = [CompositeSpec.parse_rules(f"LLR=Epsilon({i}),MLL=ZPlus,HLL=ZPlus,FCL=ZPlus") for i in range(1, 10)]
    first, *_, eighth = [fresh.attribute(composite) for composite in composites[:8]]
    assert fresh.attribute(replace(composites[7], abs=True)) is eighth
    assert fresh.attribute(composites[0]) is first
    fresh.prepare(composites)
    fresh.attribute(composites[8])
    assert fresh.attribute(composites[0]) is first
    second = fresh.attribute(composites[1])
    assert fresh.attribute(composites[1]) is second


def test_out_of_memory_halves_the_batches(engine, monkeypatch):
    backward = ZennitAttribution._backward

    def limited(self, module, values, images, labels):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return backward(self, module, values, images, labels)

    monkeypatch.setattr(ZennitAttribution, "_backward", limited)
    fresh = replace(engine)
    given = fresh.attribute(MIXED)
    assert fresh.batches.remark == "Out of memory: batches in attribution were halved from 4 to 1 images."
    monkeypatch.undo()
    expected = replace(engine).attribute(MIXED)
    for name, sums in expected.sums.items():
        torch.testing.assert_close(given.sums[name], sums, rtol=1e-9, atol=1e-12 * float(sums.abs().max()))


def test_users_network_is_bit_for_bit_what_it_was(build, references, snapshot):
    network = build("mobilenetv3_small_100")
    network.conv_stem.weight.requires_grad_(False)
    network.act2.training = True  # a mode of its own that changes nothing
    network.register_forward_hook(lambda module, inputs, output: None)
    before = snapshot(network)
    canonical = canonize(network, (3, 16, 16))
    few = LabelledImages(references.images[:2], references.labels[:2])
    ZennitAttribution(canonical, group_layers(canonical), few, batch_size=2).attribute(MIXED)
    assert snapshot(network) == before
    assert all(parameter.grad is None for parameter in network.parameters())


def small_engine(canonical: CanonicalNetwork, images: Tensor) -> ZennitAttribution:
    groups = dict.fromkeys(canonical.layers, "LLR")
    return ZennitAttribution(canonical, groups, LabelledImages(images, torch.zeros(len(images)).long()), 4)


def dense(network: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        network(torch.zeros(1, 3, 4, 4))  # sizes the lazy layer
    return network.double().eval()


def test_relevance_that_is_not_finite_is_an_error():
    network = dense(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)))
    engine = small_engine(canonize(network, (3, 4, 4)), torch.full((1, 3, 4, 4), float("inf")).double())
    relevance = engine.attribute(all_layers("Epsilon"))
    with pytest.raises(RelevanceError, match=r"^The relevance of layer '0' isn't finite"):
        relevance.scores(absolute=True)
    assert not any(hooks(engine.network.module))


def test_layer_without_relevance_is_an_error():
    network = dense(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)))
    with torch.no_grad():
        network[3].weight.copy_(-network[3].weight.abs())  # no positive contribution: ZPlus loses everything
        network[0].bias.fill_(1.0)
    engine = small_engine(canonize(network, (3, 4, 4)), torch.rand(2, 3, 4, 4).double())
    with pytest.raises(RelevanceError, match=r"^No relevance reaches layer '0' under this composite"):
        engine.attribute(all_layers("ZPlus")).scores(absolute=False)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(48, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        return self.fc((x + self.conv2(x)).flatten(1))


def test_branches_that_nearly_cancel_are_no_error_in_float32():
    torch.manual_seed(0)
    network = Residual().eval()
    with torch.no_grad():
        network.conv2.weight.copy_(-torch.eye(3)[:, :, None, None] * (1 - 1e-6))
        network.conv2.bias.zero_()
    canonical = canonize(network, (3, 4, 4))
    engine = small_engine(canonical, torch.randn(2, 3, 4, 4) * 100)
    assert engine.attribute(all_layers("Epsilon")).scores(absolute=True).keys() == {"conv1", "conv2"}


def test_branches_that_do_not_add_up_are_an_error(monkeypatch):
    canonical = canonize(Residual().double().eval(), (3, 4, 4))
    (name,) = canonical.residual_sums
    residual_sum = canonical.module.get_submodule(name)
    monkeypatch.setattr(residual_sum, "forward", lambda left, right: left + right)  # the gradient: 1 to each branch
    engine = small_engine(canonical, torch.randn(2, 3, 4, 4).double())
    with pytest.raises(RelevanceError, match=rf"^The branches of the residual sum '{name}' don't add up"):
        engine.attribute(all_layers("Epsilon"))
    assert not any(hooks(canonical.module))


def test_engine_refuses_groups_that_leave_a_layer_out(engine):
    groups = {name: group for name, group in engine.layer_groups.items() if name != "layer1.0.conv1"}
    with pytest.raises(UnsupportedNetworkError, match=r"^The layer 'layer1\.0\.conv1' has no group"):
        replace(engine, layer_groups=groups)


def test_hidden_dense_neurons_have_scores():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 2))
    engine = small_engine(canonize(network.double().eval(), (3, 4, 4)), torch.randn(3, 3, 4, 4).double())
    scores = engine.attribute(all_layers("Epsilon")).scores(absolute=True)
    assert {name: len(values) for name, values in scores.items()} == {"0": 4, "3": 5}


def test_captured_values_are_let_go(engine):
    with captured(engine.network.module, engine.network) as values:
        engine.network.module(engine.references.images[:1])
        assert values.outputs.keys() == engine.network.components.keys()
        assert list(values.sums) == list(engine.network.residual_sums)
    assert not values.outputs
    assert not values.sums
