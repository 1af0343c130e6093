"""Repaired networks, in float64: what is exact, what stays as it is, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from objectives.canonization import canonize
from objectives.errors import RepairError
from objectives.memory import Batches
from objectives.pruning.masking import masked
from objectives.pruning.slimming import slim
from objectives.repair.chunks import Chunks
from objectives.repair.moments import MatchMoments
from objectives.repair.order import order
from objectives.repair.original import observe
from objectives.repair.own import repaired
from objectives.repair.refit import Refit
from objectives.repair.repairer import Repairer, with_layers
from objectives.repair.ridge import KernelEquations, NormalEquations
from objectives.repair.strength import STRENGTHS, choose_strength
from search_spaces.repairs import NO_REPAIR, RepairSpec

NETWORKS = ["vgg11_bn", "resnet18", "mobilenetv3_small_100", "inception", "padded", "cifar_resnet20"]
REFIT, BN = RepairSpec("refit", 0.1), RepairSpec("bn", 0.1)


def repairer_of(subject, batch_size=3):
    return Repairer(subject.canonical, subject.images, Batches("a test", batch_size))


def close(given, expected, tolerance=1e-9):
    torch.testing.assert_close(given, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("repair", [REFIT, BN], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_slim_with_repair_is_masked_with_repair(name, repair, prunable):
    """Design section 9: logits to 1e-9 relative, equal predictions wherever the top two logits differ by more."""
    subject = prunable(name)
    repairer = repairer_of(subject)
    ranking = subject.ranking()
    modules = (subject.network, subject.canonical.module)
    before = [copy.deepcopy(module.state_dict()) for module in modules]
    parameters = [id(parameter) for module in modules for parameter in module.parameters()]
    for n in (len(ranking) // 3, len(ranking)):
        masks = ranking.masks(n)
        layers = repairer.layers(masks, repair)
        small = slim(repairer.repaired(masks, repair), masks)(subject.images)
        with (
            repaired(subject.network, subject.canonical.layers, layers) as own,
            masked(own, subject.canonical.layers, masks),
        ):
            large = subject.network(subject.images)
        close(small, large)
        top = large.topk(2).values
        differ = top[:, 0] - top[:, 1] > 1e-9 * large.abs().max()
        assert torch.equal(small.argmax(1)[differ], large.argmax(1)[differ])
    for module, state in zip(modules, before, strict=True):
        assert module.state_dict().keys() == state.keys()
        assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())
    assert [id(parameter) for module in modules for parameter in module.parameters()] == parameters


@pytest.mark.parametrize("repair", [REFIT, BN, RepairSpec("refit"), RepairSpec("bn"), NO_REPAIR], ids=str)
def test_where_nothing_is_pruned_nothing_changes(repair, prunable):
    subject = prunable("cifar_resnet20")
    masks = subject.ranking().masks(0)
    assert repairer_of(subject).repaired(masks, repair) is subject.canonical
    assert repairer_of(subject).layers(subject.ranking().masks(99), NO_REPAIR) == {}


@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenetv3_small_100"])
def test_layers_before_what_is_pruned_stay_as_they_are(name, prunable):
    subject = prunable(name)
    masks = subject.ranking().masks(0)
    last = list(masks)[-1]
    masks[last][::2] = False
    changed = repairer_of(subject).layers(masks, REFIT)
    assert subject.canonical.classifier in changed
    assert not set(changed) & set(list(masks)[: len(masks) // 2])


@pytest.mark.parametrize("name", ["vgg11_bn", "cifar_resnet20", "mobilenetv3_small_100"])
def test_repair_brings_the_logits_nearer(name, prunable):
    subject = prunable(name)
    repairer, masks = repairer_of(subject), subject.ranking().masks(len(subject.ranking()) // 4)
    wanted = subject.network(subject.images)

    def error(spec):
        return float((slim(repairer.repaired(masks, spec), masks)(subject.images) - wanted).norm())

    unrepaired = error(NO_REPAIR)
    assert error(REFIT) < 0.5 * unrepaired
    assert error(BN) < unrepaired
    assert error(RepairSpec("refit", 1e9)) < unrepaired  # biases are fitted whatever the penalty


@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenetv3_small_100", "vgg11_bn"])
def test_chunks_and_batches_make_no_difference(name, prunable):
    subject = prunable(name)
    network = order(subject.canonical.module)
    masks = subject.ranking().masks(len(subject.ranking()) // 2)
    logits = []
    for batch_size, n_rows in ((4, 10_000), (1, 37)):
        targets = observe(network, subject.images, batch_size, n_positions=300, seed=0)
        layers = Refit(network, targets, masks, Chunks.of(subject.images, batch_size), 0.1, n_rows).repair()
        logits.append(slim(with_layers(subject.canonical, layers), masks)(subject.images))
    close(*logits, tolerance=1e-8)


class Linearly(nn.Module):
    """Two convolutions and a classifier without activations; the second half of the filters repeats the first."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, stride=2, bias=False)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.second(self.first(x)).mean((2, 3)))


def linear_network():
    torch.manual_seed(0)
    network = Linearly().double().eval()
    with torch.no_grad():
        mixing = torch.randn(4, 4, dtype=torch.float64)
        network.first.weight[4:] = torch.einsum("ij,jchw->ichw", mixing, network.first.weight[:4])
        network.first.bias[4:] = mixing @ network.first.bias[:4] + 1  # what a bias alone makes up for
    return network.requires_grad_(False)


def test_on_a_linear_network_dependent_inputs_are_recovered_exactly():
    network = linear_network()
    canonical = canonize(network, (3, 9, 9))
    references, others = (torch.randn(n, 3, 9, 9, dtype=torch.float64) for n in (60, 5))
    masks = {name: torch.ones(width, dtype=torch.bool) for name, width in canonical.components.items()}
    masks["first"][4:] = False
    repairer = Repairer(canonical, references, Batches("a test", 100))
    small = slim(repairer.repaired(masks, RepairSpec("refit", 1e-13)), masks)
    close(small(others), network(others), tolerance=1e-8)
    unrepaired = slim(canonical, masks)(others)
    assert float((unrepaired - network(others)).abs().max()) > 0.1


def test_the_penalty_pulls_towards_weights_scaled_as_bn_scales_them():
    network = linear_network()
    canonical = canonize(network, (3, 9, 9))
    references = torch.randn(20, 3, 9, 9, dtype=torch.float64)
    masks = {name: torch.ones(width, dtype=torch.bool) for name, width in canonical.components.items()}
    masks["first"][2:] = False
    layers = Repairer(canonical, references, Batches("a test", 7)).layers(masks, RepairSpec("refit", 1e12))
    kept = network.first(references)
    wanted, given = (
        network.second(values).var(dim=(0, 2, 3)) for values in (kept, kept * masks["first"].view(-1, 1, 1))
    )
    scale = (1.05 * wanted / (given + 0.05 * wanted)).sqrt()
    assert float(scale.min()) > 1.1
    close(layers["second"].weight[:, :2], network.second.weight[:, :2] * scale.view(-1, 1, 1, 1))


def test_dead_inputs_leave_a_fitted_bias():
    network = linear_network()
    canonical = canonize(network, (3, 9, 9))
    references = torch.randn(20, 3, 9, 9, dtype=torch.float64)
    masks = {name: torch.ones(width, dtype=torch.bool) for name, width in canonical.components.items()}
    masks["first"][:] = False
    repairer = Repairer(canonical, references, Batches("a test", 100))
    small = slim(repairer.repaired(masks, REFIT), masks)(references)
    close(small[0], network(references).mean(0))
    close(small[1], small[0])


@pytest.mark.parametrize("repair", [REFIT, BN], ids=str)
def test_what_a_wholly_pruned_layer_would_read_is_left_as_it_is(repair):
    network = linear_network()
    canonical = canonize(network, (3, 9, 9))
    references = torch.randn(20, 3, 9, 9, dtype=torch.float64)
    masks = {name: torch.ones(width, dtype=torch.bool) for name, width in canonical.components.items()}
    masks["first"][:3] = False
    masks["second"][:] = False
    repairer = Repairer(canonical, references, Batches("a test", 7))
    assert set(repairer.layers(masks, repair)) == {"fc"}
    small = slim(repairer.repaired(masks, repair), masks)(references)
    close(small[1], small[0])
    if repair is REFIT:
        close(small[0], network(references).mean(0))


class Grouped(nn.Module):
    """A convolution in four groups behind another one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(self.grouped(self.first(x).relu()).relu().mean((2, 3)))


def test_groups_that_are_silent_or_pruned_take_no_part_in_the_choice_of_a_strength():
    torch.manual_seed(0)
    canonical = canonize(Grouped().double().eval().requires_grad_(False), (3, 9, 9))
    network, references = order(canonical.module), torch.randn(20, 3, 9, 9, dtype=torch.float64)
    targets = observe(network, references, 20, 10_000, seed=0)
    masks = {name: torch.ones(width, dtype=torch.bool) for name, width in canonical.components.items()}
    masks["first"][[0, 1, 2]] = False  # the inputs of the first group, and one of the second's
    masks["grouped"][[3, 6, 7, 8]] = False  # an output of the second, all of the third
    seen = {}

    class Watched(Refit):
        def chosen(self, name, parts):
            seen[name] = sum(part.square for part in parts)
            return super().chosen(name, parts)

    layers = Watched(network, targets, masks, Chunks.of(references, 20), 0.1).repair()
    grouped, old = layers["grouped"], canonical.module.get_submodule("grouped")
    inputs = canonical.module.get_submodule("first")(references).relu() * masks["first"][None, :, None, None]
    wanted = old(canonical.module.get_submodule("first")(references).relu())
    assert seen["grouped"] == pytest.approx(float((wanted - old(inputs))[:, [4, 5, 9, 10, 11]].square().sum()))
    for output in (*range(3), 3, *range(6, 12)):  # what hears nothing, is pruned, or lacks nothing
        close(grouped.weight[output], old.weight[output])
    assert float((grouped.weight[[4, 5]] - old.weight[[4, 5]]).abs().max()) > 0.01
    close(grouped.bias[:3], wanted[:, :3].mean((0, 2, 3)))
    masks["first"][:] = False
    grouped = Refit(network, targets, masks, Chunks.of(references, 20), 0.1).repair()["grouped"]
    close(grouped.weight, old.weight)
    close(grouped.bias, wanted.mean((0, 2, 3)))


def values_of(module, images):
    """What each step of a graph computes, by name."""
    values = {}

    class Recorded(fx.Interpreter):
        def run_node(self, n):
            values[n.name] = super().run_node(n)
            return values[n.name]

    Recorded(module).run(images)
    return values


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet18", "mobilenetv3_small_100", "inception", "padded"])
def test_a_pass_computes_what_the_repaired_network_does_though_it_stores_less(name, prunable):
    subject = prunable(name)
    ranking, network = subject.ranking(), order(subject.canonical.module)
    masks = ranking.masks(len(ranking) // 2)
    targets = observe(network, subject.images, 3, 500, seed=0)
    values, n_narrow = {}, 0

    class Watched(Refit):
        def run_node(self, n):
            nonlocal n_narrow
            value = super().run_node(n)
            if isinstance(value, Chunks) and isinstance(value.parts[0], torch.Tensor):
                n_narrow += value.stored is not None
                values[n.name] = torch.cat(list(value.full()))
            return value

    layers = Watched(network, targets, masks, Chunks.of(subject.images, 3), 0.1).repair()
    module = copy.deepcopy(with_layers(subject.canonical, layers).module)
    for layer, mask in masks.items():
        factors = mask.view(-1, 1, 1) if isinstance(module.get_submodule(layer), nn.Conv2d) else mask
        module.get_submodule(layer).register_forward_hook(lambda _, __, output, factors=factors: output * factors)
    expected = values_of(module, subject.images)
    assert n_narrow > 5
    assert len(values) > 15
    for step, value in values.items():
        close(value, expected[step])


def test_of_many_layers_some_choose_the_strength(prunable, monkeypatch):
    subject = prunable("cifar_resnet20")
    masks = subject.ranking().masks(300)
    network = order(subject.canonical.module)
    targets = observe(network, subject.images, 8, 200, seed=0)
    asked, used = [], []

    def errors(parts, strengths):
        asked.append(len(used))
        return [float(strength != 0.03) for strength in strengths]

    monkeypatch.setattr("objectives.repair.strength._N_LAYERS", 5)
    monkeypatch.setattr("objectives.repair.strength.left_out_errors", errors)
    for kind in (NormalEquations, KernelEquations):

        def solve(equations, strength, own=kind.solve):
            used.append(strength)
            return own(equations, strength)

        monkeypatch.setattr(kind, "solve", solve)
    assert choose_strength(network, targets, subject.images, masks, 8) == 0.03
    assert len(asked) == 5
    assert asked[-1] == len(used) - 1 > 15  # the classifier
    assert used == [10.0] * asked[0] + [0.03] * (len(used) - asked[0])
    assert asked[0] > 0


def test_where_no_layer_that_is_asked_is_reached_the_strength_is_the_largest():
    canonical = canonize(Grouped().double().eval().requires_grad_(False), (3, 9, 9))
    masks = {name: torch.ones(width, dtype=torch.bool) for name, width in canonical.components.items()}
    network, references = order(canonical.module), torch.randn(4, 3, 9, 9, dtype=torch.float64)
    targets = observe(network, references, 4, 100, seed=0)
    assert choose_strength(network, targets, references, masks, 4) == STRENGTHS[-1]


def test_the_last_layer_of_a_block_makes_up_for_its_shortcut(prunable):
    """The sum is nearer to the original's than with the layer fitted to its own outputs."""
    subject = prunable("cifar_resnet20")
    network = order(subject.canonical.module)
    assert set(network.sums) == {f"layer{i}.{j}.conv2" for i in (1, 2, 3) for j in range(3)}
    targets = observe(network, subject.images, 4, 10_000, seed=0)
    alone = replace(network, sums={}, shortcuts={})
    targets_alone = observe(alone, subject.images, 4, 10_000, seed=0)
    masks = subject.ranking().masks(0)
    masks["layer1.0.conv2"][::2] = False
    silence = masks["layer1.0.conv2"].double()[None, :, None, None]
    last = "layer1.1.conv2"
    end = network.sums[last].target

    def the_sum(module):
        seen = []
        handle = module.get_submodule(end).register_forward_hook(lambda module, inputs, output: seen.append(output))
        module(subject.images)
        handle.remove()
        return seen[0]

    wanted = the_sum(subject.canonical.module)
    error = {}
    for name, ordered, own in (("sum", network, targets), ("alone", alone, targets_alone)):
        layers = Refit(ordered, own, masks, Chunks.of(subject.images, 4), 1e-4).repair()
        assert last in layers
        pruned = with_layers(subject.canonical, layers).module
        shared = pruned.get_submodule("layer1.0.conv2")  # with the network of all tests
        handle = shared.register_forward_hook(lambda module, inputs, output: output * silence)
        error[name] = float((the_sum(pruned) - wanted).norm())
        handle.remove()
    assert error["sum"] < 0.9 * error["alone"]
    # A shortcut that lacks channels is made up for by a layer whose inputs alone aren't touched, too.
    masks = subject.ranking().masks(0)
    masks["conv1"][:] = False
    assert "layer1.0.conv2" in Refit(network, targets, masks, Chunks.of(subject.images, 4), 1e-4).repair()


def test_moments_are_those_of_the_original(prunable):
    subject = prunable("vgg11_bn")
    network = order(subject.canonical.module)
    targets = observe(network, subject.images, 3, 10, seed=0)
    masks = subject.ranking().masks(len(subject.ranking()) // 4)
    layers = MatchMoments(network, targets, masks, Chunks.of(subject.images, 2), 1e-9).repair()
    small = with_layers(subject.canonical, layers).module
    name = next(iter(layers))
    seen = {}
    small.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.update(value=output))
    first = next(iter(masks))
    silence = masks[first].double()[None, :, None, None]
    handle = small.get_submodule(first).register_forward_hook(lambda module, inputs, output: output * silence)
    small(subject.images)
    handle.remove()  # the layer is shared with the network of all tests
    variance, mean = torch.var_mean(seen["value"], dim=(0, 2, 3), correction=0)
    close(mean, targets[name].moments.mean, tolerance=1e-6)
    close(variance, targets[name].moments.variance, tolerance=1e-6)


def test_few_references_choose_a_larger_strength(prunable):
    subject = prunable("cifar_resnet20")
    images = torch.randn(40, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    chosen = [
        Repairer(subject.canonical, images[:n], Batches("a test", 100)).strength(RepairSpec("refit"))
        for n in (1, 2, 40)
    ]
    assert chosen[0] == STRENGTHS[-1] >= chosen[1] >= chosen[2]
    assert chosen[2] < chosen[0]
    assert set(chosen) <= set(STRENGTHS)
    repairer = repairer_of(subject)
    assert repairer.strength(RepairSpec("bn")) == 0.25
    assert (repairer.strength(REFIT), repairer.strength(NO_REPAIR)) == (0.1, None)


def test_what_is_repaired_is_kept_for_the_next_look(prunable):
    subject = prunable("cifar_resnet20")
    repairer, masks = repairer_of(subject), subject.ranking().masks(300)
    assert repairer.layers(masks, REFIT) is repairer.layers(masks, REFIT)
    assert repairer.layers(masks, REFIT) is not repairer.layers(masks, BN)
    assert repairer.layers(masks, REFIT) is not repairer.layers(subject.ranking().masks(301), REFIT)
    # What it took isn't what the second look takes.
    assert repairer.seconds(masks, REFIT) == repairer.seconds(masks, REFIT) > 0
    assert repairer.seconds(subject.ranking().masks(0), REFIT) == 0


@pytest.mark.parametrize("repair", [REFIT, BN], ids=str)
def test_values_that_are_not_finite_are_refused(repair, prunable):
    subject = prunable("cifar_resnet20")
    images = subject.images.clone()
    images[0, 0, 0, 0] = float("nan")
    repairer = Repairer(subject.canonical, images, Batches("a test", 4))
    with pytest.raises(RepairError, match=r"^The layer '[\w.]+' can't be repaired: its .* aren't finite\.$"):
        repairer.layers(subject.ranking().masks(200), repair)


def test_memory_limits_the_references(prunable, monkeypatch):
    subject = prunable("cifar_resnet20")
    monkeypatch.setattr("objectives.repair.repairer._BYTES_KEPT", 1)
    assert len(repairer_of(subject).images) == 1
    assert repairer_of(subject).layers(subject.ranking().masks(200), REFIT)
