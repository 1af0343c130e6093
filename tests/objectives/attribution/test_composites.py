"""zennit serves the rules as they are defined; a composite for the user's own network does what the engine does."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from zennit.core import Composite

from objectives import load_composite
from objectives.attribution.composites import check_groups, hook_of, zennit_composite
from objectives.attribution.engine import ZennitAttribution, captured
from objectives.canonization import canonize
from objectives.datasets import LabelledImages
from objectives.errors import UnsupportedNetworkError
from objectives.layer_groups import group_layers
from search_spaces.composites import CompositeSpec
from search_spaces.documents import CompositeDocument
from search_spaces.rules import GROUPS, RuleSpec

RULES = [
    RuleSpec("Epsilon"),
    RuleSpec("Epsilon", epsilon=0.1),
    RuleSpec("ZPlus"),
    RuleSpec("AlphaBeta", alpha=2, beta=1),
    RuleSpec("AlphaBeta", alpha=1.5, beta=0.5),
    RuleSpec("Gamma", gamma=0.25),
    RuleSpec("Gamma", gamma=10),
]


def everywhere(rule: RuleSpec) -> CompositeSpec:
    return CompositeSpec(**dict.fromkeys(GROUPS, rule), abs=False)


LAYERS = {
    "plain": nn.Conv2d(3, 4, 3),
    "padded": nn.Conv2d(3, 4, 3, padding=1, stride=2),
    "dilated": nn.Conv2d(3, 4, (2, 3), dilation=(1, 2), padding=(1, 0)),
    "grouped": nn.Conv2d(4, 4, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_equal_their_definition(rule, kind, trace, slow_relevance):
    # Negative values, values of zero and biases of both signs reach the convolution and the dense layer.
    torch.manual_seed(0)
    convolution = LAYERS[kind].double()
    images = torch.randn(2, convolution.in_channels, 5, 5).double()
    images[0, 0, :2] = 0
    width = convolution(images).flatten(start_dim=1).shape[1]
    network = nn.Sequential(convolution, nn.Flatten(), nn.Linear(width, 3).double()).eval()
    canonical = canonize(network, images.shape[1:])
    composite = zennit_composite(everywhere(rule), group_layers(canonical))
    steps = trace(canonical.module, composite, images, torch.tensor([2, 0]))
    by_layer = {step.node.target: step for step in steps.values()}
    for name in ("0", "2"):
        step = by_layer[name]
        expected = slow_relevance(rule, network.get_submodule(name), step.inputs[0], step.relevance_out)
        torch.testing.assert_close(step.relevance_in[0], expected, rtol=1e-9, atol=1e-12)


def relevance_of(rule: RuleSpec, weight: list[float], bias: float, inputs: list[float]) -> list[float]:
    """Relevance of a single neuron's inputs where the neuron's is 1."""
    layer = nn.Linear(len(weight), 1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weight]))
        layer.bias.fill_(bias)
    x = torch.tensor([inputs], dtype=torch.float64, requires_grad=True)
    composite = Composite(module_map=lambda context, name, module: hook_of(rule))
    with composite.context(layer) as modified:
        (relevance,) = torch.autograd.grad(modified(x), x, torch.ones(1, 1).double())
    return relevance[0].tolist()


def test_neurons_without_positive_or_negative_contributions():
    assert relevance_of(RuleSpec("ZPlus"), [-1.0, 1.0], -0.5, [2.0, -1.0]) == [0.0, 0.0]
    twice = relevance_of(RuleSpec("AlphaBeta", alpha=2, beta=1), [1.0, 3.0], 0.0, [1.0, 1.0])
    assert twice == pytest.approx([0.5, 1.5], rel=1e-6)
    assert relevance_of(RuleSpec("Gamma"), [1.0, 1.0], 0.0, [1.0, -1.0]) == [0.0, 0.0]


def test_rules_that_are_the_same_rule(trace):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).double().eval()
    canonical = canonize(network, (3, 5, 5))
    images = torch.randn(2, 3, 5, 5).double()

    def at_images(rule: RuleSpec) -> Tensor:
        composite = zennit_composite(everywhere(rule), group_layers(canonical))
        return next(iter(trace(canonical.module, composite, images, torch.tensor([0, 1])).values())).relevance_in[0]

    assert torch.equal(at_images(RuleSpec("AlphaBeta", alpha=1, beta=0)), at_images(RuleSpec("ZPlus")))
    torch.testing.assert_close(at_images(RuleSpec("Gamma", gamma=0)), at_images(RuleSpec("Epsilon", epsilon=1e-6)))


def test_each_group_gets_its_own_rule():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(16, 2)
    ).eval()
    canonical = canonize(network, (3, 2, 2))
    text = "LLR=Epsilon(0.5),MLL=ZPlus,HLL=AlphaBeta(3,2),FCL=Gamma(0.7)"
    composite = zennit_composite(CompositeSpec.parse_rules(text, abs=True), group_layers(canonical))
    hooks = {name: composite.module_map({}, name, module) for name, module in canonical.module.named_modules()}
    kinds = {name: type(hook).__name__ for name, hook in hooks.items() if hook is not None}
    assert kinds == {"0": "Epsilon", "1": "ZPlus", "2": "AlphaBeta", "4": "Gamma"}


def test_groups_must_cover_the_network():
    canonical = canonize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 2)).eval(), (3, 2, 2))
    check_groups(canonical, {"0": "LLR", "2": "FCL"})
    with pytest.raises(UnsupportedNetworkError, match=r"^The layer '0' has no group, so that no rule would serve it"):
        check_groups(canonical, {"2": "FCL"})
    with pytest.raises(UnsupportedNetworkError, match=r"^The layer groups name '7', which the network doesn't have\.$"):
        check_groups(canonical, {"0": "LLR", "2": "FCL", "7": "FCL"})


# A composite of a document, on the user's own network.

COMPOSITE = CompositeSpec.parse_rules("LLR=Gamma,MLL=AlphaBeta,HLL=ZPlus,FCL=Epsilon", abs=True)


@pytest.fixture(scope="module")
def network(build) -> nn.Module:
    return build("cifar_resnet20")


def document(network: nn.Module, **changes: object) -> CompositeDocument:
    canonical = canonize(network, (3, 32, 32))
    model = {
        "name": "cifar_resnet20",
        "options": {},
        "fingerprint": "1",
        "num_classes": canonical.n_outputs,
        "classes": None,
        "component_widths": canonical.components,
    }
    return CompositeDocument(
        composite=COMPOSITE,
        layer_groups=changes.pop("layer_groups", group_layers(canonical)),
        abs_scope="sum",
        output_relevance="one",
        rates=(0.0, 0.5),
        preprocessing={"size": [32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        references={"per_class": 1, "seed": 0, "sha256": "0" * 64, "source": "digits"},
        model={**model, **changes},
        data={"source": "digits", "fingerprint": "1", "classes": list(range(10))},
        versions={},
    )


@pytest.mark.parametrize(("components", "named"), [("heads", "heads"), ("mlp", "MLPs")])
def test_a_document_of_a_transformers_components_says_so_to_another_network(network, components, named):
    made = replace(document(network), components=components)
    message = (
        f"^The document was made for a vision transformer's {named}; this network has no attention. Pass the `--model` "
        "it names.$"
    )
    with pytest.raises(UnsupportedNetworkError, match=message):
        load_composite(made, network)


def test_loaded_composite_works_on_the_users_network_as_the_engine_does(network, snapshot):
    images, labels = torch.randn(3, 3, 32, 32).double(), torch.tensor([1, 5, 5])
    before = snapshot(network)
    expected_logits = network(images).detach()
    composite = load_composite(document(network), network)
    assert isinstance(composite, Composite)

    canonical = canonize(network, (3, 32, 32), classes=[1, 5])  # the engine restricts, the user keeps all outputs
    engine = ZennitAttribution(
        canonical, group_layers(canonical), LabelledImages(images, torch.tensor([0, 1, 1])), batch_size=2
    )
    expected = engine.attribute(COMPOSITE).signed
    for _ in range(2):  # a composite may be used again
        with composite.context(network) as modified:
            assert modified is network
            with captured(modified.canonical_form, canonical) as captured_values:
                x = images.clone().requires_grad_()
                logits = modified(x)
                outputs = [captured_values.outputs[name] for name in expected]
                start = nn.functional.one_hot(labels, 10).double()
                at_images, *relevances = torch.autograd.grad(logits, [x, *outputs], start)
        torch.testing.assert_close(logits, expected_logits, rtol=1e-10, atol=0)
        assert at_images.isfinite().all()
        for name, relevance in zip(expected, relevances, strict=True):
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(
                relevance.sum(dim=(2, 3)).mean(dim=0), expected[name], rtol=0, atol=1e-10 * scale
            )
        assert snapshot(network) == before
    assert torch.equal(network(images), expected_logits)


def test_loaded_composite_restores_the_network_after_an_error_and_an_own_forward(network, snapshot):
    composite, before = load_composite(document(network), network), snapshot(network)
    with pytest.raises(ZeroDivisionError), composite.context(network):
        raise ZeroDivisionError
    assert snapshot(network) == before

    def own(images: Tensor) -> Tensor:
        return images

    network.forward = own
    try:
        with composite.context(network) as modified:
            assert modified(torch.zeros(1, 3, 32, 32).double()).shape == (1, 10)
        assert vars(network)["forward"] is own
    finally:
        del network.forward
    assert snapshot(network) == before


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar_resnet32", {}, "^The document was made for a network without the layer 'layer1.3.conv1'"),
        ("resnet18", {}, "^The document was made for a network whose layer 'conv1' has 16 components; this one has 64"),
        ("regnety_002", {}, "^The document was made for a network whose layer 'conv1' has 16 .* has no such layer"),
        ("cifar_resnet20", {"num_classes": 7}, "whose layer 'linear' has 10 outputs; this one has 7"),
    ],
)
def test_another_network_than_the_documents_is_refused_by_layer(network, build, name, options, message):
    with pytest.raises(UnsupportedNetworkError, match=message):
        load_composite(document(network), build(name, **options))


def test_document_without_a_layers_group_is_refused(network):
    groups = group_layers(canonize(network, (3, 32, 32)))
    del groups["layer2.0.conv1"]
    with pytest.raises(UnsupportedNetworkError, match=r"^The layer 'layer2\.0\.conv1' has no group"):
        load_composite(document(network, layer_groups=groups), network)
