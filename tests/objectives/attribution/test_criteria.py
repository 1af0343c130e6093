"""Criteria without relevance, against their definitions on the user's own network by autograd."""

import copy

import pytest
import torch
import torch_pruning
from timm.layers import LayerScale
from torch import Tensor, nn

import objectives.attribution.criteria as criteria
from objectives.attribution.criteria import ReferenceSamples, conductance, criterion_scores, plain
from objectives.attribution.operations import plain_gradients
from objectives.canonization import canonize
from objectives.datasets import LabelledImages
from objectives.errors import RelevanceError
from objectives.memory import Batches
from objectives.network import CanonicalNetwork
from objectives.pruning.ranking import rank
from search_spaces.criteria import CRITERIA, CriterionSpec
from search_spaces.heuristics import BASELINES

SPECS = [spec for spec in BASELINES.values() if isinstance(spec, CriterionSpec)]


def samples_of(canonical: CanonicalNetwork, images: Tensor, labels: Tensor, batch_size: int = 2) -> ReferenceSamples:
    references = LabelledImages(images, labels)
    return ReferenceSamples(canonical, references, Batches("attribution", batch_size))


def raw(name: str, samples: ReferenceSamples) -> dict[str, Tensor]:
    return criterion_scores(CriterionSpec(name, normalize="none", seed=0 if name == "random" else None), samples)


def users_values(network: nn.Module, canonical: CanonicalNetwork, image: Tensor, label: int) -> dict[str, list[Tensor]]:
    """Outputs of all components on one image and their dL/dz, (components, values), by hooks on the user's network."""
    network = copy.deepcopy(network)
    kept: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, of_input: bool = False) -> None:
        def keep_value(value: Tensor) -> Tensor:
            kept[name] = value
            return value.clone()  # in-place steps overwrite this one

        if of_input:
            module.register_forward_pre_hook(lambda module, inputs: keep_value(inputs[0]))
        else:
            module.register_forward_hook(lambda module, inputs, output: keep_value(output))

    for name in canonical.components:
        if name in canonical.heads:
            projection = canonical.heads[name].projection.removesuffix("qkv") + "proj"
            keep(name, network.get_submodule(projection), of_input=True)
            continue
        module = network.get_submodule(canonical.layers[name].norm or name)
        block, _, layer = name.partition(".mlp.")
        if layer == "fc2" and isinstance(scale := network.get_submodule(f"{block}.ls2"), LayerScale):
            module = scale  # folded as a batch norm is
        # timm's batch norms may hold the nonlinearity
        keep(name, getattr(module, "act", module), of_input=hasattr(module, "act"))
    with torch.enable_grad():
        logits = network(image[None].clone().requires_grad_())
        loss = nn.functional.cross_entropy(logits, torch.tensor([label]))
    gradients = torch.autograd.grad(loss, [kept[name] for name in canonical.components])
    values = {}
    for name, gradient in zip(canonical.components, gradients, strict=True):
        values[name] = [by_component(canonical, name, each.detach()[0]) for each in (kept[name], gradient)]
    return values


def by_component(canonical: CanonicalNetwork, name: str, value: Tensor) -> Tensor:
    """(components, values) of one image."""
    if name in canonical.heads:  # (tokens, heads * head_dim)
        return torch.stack([part.flatten() for part in value.chunk(canonical.heads[name].n_heads, dim=-1)])
    return value.T if value.ndim == 2 else value.flatten(1) if value.ndim == 3 else value[:, None]


def assert_gradients_and_taylor(network, canonical, images, labels) -> None:
    values = [
        users_values(network, canonical, image, label) for image, label in zip(images, labels.tolist(), strict=True)
    ]
    samples = samples_of(canonical, images, labels)
    gradient, taylor = raw("gradient", samples), raw("taylor", samples)
    assert list(gradient) == list(taylor) == list(canonical.components)
    for name in canonical.components:
        of_gradient = [g.sum(dim=1).abs() for _, g in (of_image[name] for of_image in values)]
        of_taylor = [(z * g).sum(dim=1).abs() for z, g in (of_image[name] for of_image in values)]
        for scores, expected in ((gradient[name], of_gradient), (taylor[name], of_taylor)):
            mean = torch.stack(expected).mean(dim=0)
            torch.testing.assert_close(scores, mean, rtol=1e-6, atol=1e-9 * float(mean.max()))


def test_gradient_and_taylor_are_those_of_the_users_network(classifier):
    assert_gradients_and_taylor(classifier.network, classifier.canonical, classifier.images, classifier.labels)


def test_gradient_and_taylor_are_those_of_the_users_transformer(transformer):
    canonical = transformer.canonical.choosing("all")
    assert_gradients_and_taylor(transformer.network, canonical, transformer.images, transformer.labels)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([0, 1, 2, 3, 1])


@pytest.fixture(scope="module")
def network(lively) -> nn.Module:
    """Both kinds of layers, with and without batch norm; the second convolution is read by no ReLU alone."""
    torch.manual_seed(0)
    return lively(
        nn.Sequential(
            *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 5, 3), nn.AvgPool2d(2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(20, 7), nn.GELU(), nn.Linear(7, 4)),
        )
    )


@pytest.fixture(scope="module")
def canonical(network) -> CanonicalNetwork:
    return canonize(network, (3, 8, 8))


@pytest.fixture
def samples(canonical, images) -> ReferenceSamples:
    return samples_of(canonical, images, LABELS)


def test_activation_is_taken_after_the_nonlinearity(network, samples, images):
    with torch.no_grad():
        after = [network[:3](images), network[:4](images), network[:9](images)[..., None, None]]
    scores = raw("activation", samples)
    assert list(scores) == ["0", "3", "7"]
    for of_layer, values in zip(scores.values(), after, strict=True):
        torch.testing.assert_close(of_layer, values.sum(dim=(2, 3)).abs().mean(dim=0))


def test_weight_is_the_norm_of_the_folded_rows(network, samples):
    scores = raw("weight", samples)
    norm = network[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(scores["0"], (network[0].weight.flatten(1).norm(dim=1) * scale.abs()).detach())
    for name in ("3", "7"):
        rows = network[int(name)].weight.detach()
        assert scores[name].tolist() == pytest.approx([float(row.square().sum()) ** 0.5 for row in rows])
        sums = raw("weight-l1", samples)[name]
        assert sums.tolist() == pytest.approx([float(row.abs().sum()) for row in rows])


def test_weight_of_a_head_is_that_of_its_values(build_transformer, images):
    network = build_transformer("class-token")
    canonical = canonize(network, (3, 16, 16)).choosing("heads")
    scores = raw("weight", samples_of(canonical, images, LABELS))
    for (name, heads), block in zip(canonical.heads.items(), network.blocks, strict=True):
        values = block.attn.qkv.weight.detach()[48:].reshape(heads.n_heads, -1)
        torch.testing.assert_close(scores[name], values.norm(dim=1))


def test_hessian_is_the_mean_of_torch_prunings_over_samples(images):
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(80, 7), nn.ReLU(), nn.Linear(7, 4)),
    )
    network = network.double().eval()
    expected = {name: [] for name in ("0", "2", "5")}
    for image, label in zip(images, LABELS, strict=True):  # of several samples torch-pruning 1.6.1 keeps the last alone
        importance = torch_pruning.importance.GroupHessianImportance("first", normalizer=None)
        network.zero_grad()
        nn.functional.cross_entropy(network(image[None]), label[None]).backward()
        importance.accumulate_grad(network)
        graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=images[:1])
        for name, scores in expected.items():
            layer = network.get_submodule(name)
            handler = graph.get_pruner_of_module(layer).prune_out_channels
            group = graph.get_pruning_group(layer, handler, list(range(len(layer.weight))))
            scores.append(importance(group).double())
    found = raw("hessian", samples_of(canonize(network.requires_grad_(False), (3, 8, 8)), images, LABELS))
    for name, scores in expected.items():
        torch.testing.assert_close(found[name], torch.stack(scores).mean(dim=0), rtol=1e-6, atol=0)


def test_conductance_adds_up_over_layers_that_all_paths_cross(network, canonical, images):
    with plain(canonical) as of_gradients:
        parts = conductance(of_gradients, images, LABELS, n_steps=2000)
    with torch.no_grad():
        gain = (network(images) - network(torch.zeros_like(images))).gather(1, LABELS[:, None])[:, 0]
    for name, part in parts.items():
        assert part.shape[1:] == canonical.layers[name].output_shape
        torch.testing.assert_close(part.flatten(1).sum(dim=1), gain, rtol=1e-3, atol=1e-3 * float(gain.abs().max()))


def test_conductance_of_the_usual_steps_adds_up_on_a_residual_network(build):
    network = build("cifar_resnet20")
    canonical = canonize(network, (3, 32, 32))
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 3, 5, 9])
    with plain(canonical) as of_gradients:
        first = conductance(of_gradients, images, labels)["conv1"].flatten(1).sum(dim=1)
    with torch.no_grad():
        gain = (network(images) - network(torch.zeros_like(images))).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(first, gain, rtol=0.02, atol=0.02 * float(gain.abs().max()))


def test_conductance_of_a_linear_network_is_its_contributions(images):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)).double().eval()
    samples = samples_of(canonize(network, (3, 8, 8)), images, LABELS)
    with torch.no_grad():
        rise = network[0](images) - network[0](torch.zeros_like(images))
        expected = (rise.flatten(1) * network[2].weight[LABELS]).reshape(5, 4, 36).sum(dim=2).abs().mean(dim=0)
    torch.testing.assert_close(raw("integrated-gradients", samples)["0"], expected)


def test_random_scores_come_from_their_seed(samples):
    def order(seed: int) -> list[int]:
        return rank(criterion_scores(CriterionSpec("random", seed=seed), samples)).order.tolist()

    assert order(0) == order(0)
    assert len({tuple(order(seed)) for seed in range(5)}) == 5


def test_random_scores_favour_no_layer():
    network = nn.Sequential(nn.Conv2d(3, 20, 1), nn.ReLU(), nn.Conv2d(20, 180, 1), nn.Flatten(), nn.Linear(180, 2))
    canonical = canonize(network.eval(), (3, 1, 1))
    samples = samples_of(canonical, torch.zeros(1, 3, 1, 1), torch.tensor([0]))
    n_kept = [0, 0]
    for seed in range(50):
        masks = rank(criterion_scores(CriterionSpec("random", seed=seed), samples)).masks(100)
        n_kept = [n + int(mask.sum()) for n, mask in zip(n_kept, masks.values(), strict=True)]
    assert n_kept[0] / 1000 == pytest.approx(0.5, abs=0.06)
    assert n_kept[1] / 9000 == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_scores_of_every_criterion(spec, samples, canonical, snapshot):
    before = snapshot(canonical.module)
    scores = criterion_scores(spec, samples)
    assert snapshot(canonical.module) == before
    assert {name: len(of_layer) for name, of_layer in scores.items()} == canonical.components
    for of_layer in scores.values():
        assert of_layer.dtype == torch.float64
        assert bool((of_layer >= 0).all())
        if spec.name != "random":
            assert float(of_layer.square().sum()) == pytest.approx(1)


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("components", ["heads", "mlp", "all"])
def test_every_criterion_scores_the_components_of_a_transformer(name, components, transformer):
    canonical = transformer.canonical.choosing(components)
    scores = raw(name, samples_of(canonical, transformer.images, transformer.labels))
    assert {name: len(of_layer) for name, of_layer in scores.items()} == canonical.components


@pytest.mark.parametrize("name", CRITERIA)
def test_batches_change_rounding_only(name, canonical, images):
    alone, together = (raw(name, samples_of(canonical, images, LABELS, size)) for size in (1, 5))
    for layer, of_layer in alone.items():
        torch.testing.assert_close(of_layer, together[layer])


def test_magnitudes_of_elements(canonical, images, samples):
    with plain(canonical) as of_gradients:
        logits, outputs = of_gradients.run(images)
        loss = nn.functional.cross_entropy(logits, LABELS, reduction="sum")
        gradients = torch.autograd.grad(loss, list(outputs.values()))
    elements = ReferenceSamples(canonical, samples.references, Batches("attribution", 2), "element")
    for of_layer, gradient in zip(raw("gradient", elements).values(), gradients, strict=True):
        values = gradient.reshape(*gradient.shape[:2], -1)
        torch.testing.assert_close(of_layer, values.abs().sum(dim=2).mean(dim=0))


def test_gradients_last_as_long_as_their_block(classifier, snapshot):
    module = classifier.canonical.module
    before = snapshot(module)
    with plain_gradients(module):
        assert snapshot(module) != before
    assert snapshot(module) == before
    with pytest.raises(KeyError), plain_gradients(module):
        raise KeyError
    assert snapshot(module) == before


def test_scores_that_are_not_finite_are_an_error(canonical, images):
    with pytest.raises(RelevanceError, match=r"^The criterion taylor normalize=none of layer '0' isn't finite;"):
        raw("taylor", samples_of(canonical, images * float("nan"), LABELS))


def test_a_layer_without_any_score_is_an_error(network, images):
    silent = copy.deepcopy(network)
    nn.init.zeros_(silent[7].weight)
    with pytest.raises(RelevanceError, match=r"^The criterion gradient normalize=none is 0 all over layer '0';"):
        raw("gradient", samples_of(canonize(silent, (3, 8, 8)), images, LABELS))


def test_out_of_memory_halves_the_batch(canonical, images, monkeypatch):
    expected = raw("taylor", samples_of(canonical, images, LABELS, 4))
    run = criteria.PlainNetwork.run

    def limited(self, images, **keywords):
        if len(images) > 2:
            raise torch.OutOfMemoryError("no room")
        return run(self, images, **keywords)

    monkeypatch.setattr(criteria.PlainNetwork, "run", limited)
    samples = samples_of(canonical, images, LABELS, 4)
    for name, of_layer in raw("taylor", samples).items():
        torch.testing.assert_close(of_layer, expected[name])
    assert samples.batches.size == 2


def test_every_criterion_is_defined():
    assert set(criteria._CRITERIA) == set(CRITERIA)
