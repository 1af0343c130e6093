"""The shared engine against its oracle, zennit."""

import itertools
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from objectives.attribution import shared
from objectives.attribution.attention import AttentionProduct
from objectives.attribution.engine import ZennitAttribution
from objectives.attribution.operations import Activation, LayerNorm
from objectives.attribution.propagation import Batch
from objectives.attribution.relevance import Relevance
from objectives.attribution.shared import SharedAttribution
from objectives.canonization import canonize
from objectives.datasets import LabelledImages
from objectives.errors import OptionError, OutOfMemoryError, UnsupportedNetworkError
from objectives.layer_groups import group_layers
from objectives.network import CanonicalNetwork
from objectives.pruning.ranking import rank
from objectives.pruning.rates import DEFAULT_RATES, n_pruned, parse_rates
from search_spaces.composites import ATTENTION_RULES, CompositeSpec
from search_spaces.rules import GROUPS, RULE_DEFAULTS, RuleSpec

RULES = [
    RuleSpec("Epsilon"),
    RuleSpec("ZPlus"),
    RuleSpec("AlphaBeta"),
    RuleSpec("Gamma"),
    RuleSpec("Epsilon", epsilon=0.1),
    RuleSpec("Gamma", gamma=3.0),
]
# Every rule in every group.
VARIED = [CompositeSpec(*(RULES[(i + i * k + k) % 6] for k in range(4)), abs=True) for i in range(6)]
GRID = [CompositeSpec(*rules, abs=True) for rules in itertools.product(map(RuleSpec, RULE_DEFAULTS), repeat=4)]
RATES = parse_rates(DEFAULT_RATES)
# The same with every rule of attention.
OF_TRANSFORMERS = [replace(spec, attention=rule) for rule in ATTENTION_RULES for spec in VARIED]


def engines(
    canonical: CanonicalNetwork, images: Tensor, labels: Tensor, groups: Mapping[str, str] | None = None, **options: Any
) -> tuple[ZennitAttribution, SharedAttribution]:
    references = LabelledImages(images, labels)
    groups = group_layers(canonical) if groups is None else groups
    kept = {key: value for key, value in options.items() if key != "memory"}
    return (
        ZennitAttribution(canonical, groups, references, len(images), **kept),
        SharedAttribution(canonical, groups, references, len(images), **options),
    )


def difference(one: Relevance, other: Relevance) -> float:
    """Largest difference of two scores, in terms of their layer's largest."""
    assert list(one.sums) == list(other.sums)
    worst = 0.0
    for absolute in (False, True):
        scores, others = one.scores(absolute=absolute), other.scores(absolute=absolute)
        for name, values in scores.items():
            error = float((values - others[name]).abs().max()) / float(one.magnitude[name].max())
            worst = max(worst, error)
    return worst


def differing_masks(one: Relevance, other: Relevance, tolerance: float) -> int:
    """Masks that differ, at all rates; each component that does has a score within `tolerance` of the cut's."""
    n_differing = 0
    for absolute in (False, True):
        scores, others = one.scores(absolute=absolute), other.scores(absolute=absolute)
        flat = torch.cat(list(scores.values()))
        slack = torch.cat([torch.full_like(v, tolerance * float(one.magnitude[n].max())) for n, v in scores.items()])
        order, other_order = rank(scores), rank(others)
        for rate in RATES:
            n = n_pruned(rate, len(order))
            masks, other_masks = (torch.cat(list(r.masks(n).values())) for r in (order, other_order))
            differing = masks != other_masks
            cut = flat[order.order[max(n - 1, 0)]]
            assert ((flat - cut).abs() <= 2 * (slack + slack.max()))[differing].all()
            n_differing += bool(differing.any())
    return n_differing


def test_every_network_and_rule_gives_zennits_scores_and_masks(classifier):
    zennit, engine = engines(classifier.canonical, classifier.images, classifier.labels)
    engine.prepare(VARIED)
    is_large = sum(parameter.numel() for parameter in classifier.network.parameters()) > 5_000_000
    for composite in VARIED[1::4] if is_large else VARIED[::2]:
        expected, given = zennit.attribute(composite), engine.attribute(composite)
        assert difference(expected, given) < 1e-10
        assert differing_masks(expected, given, 1e-10) == 0


@pytest.mark.parametrize(("name", "size"), [("alexnet", 64), ("resnet50", 32), ("mobilenet_v2", 32)])
def test_torchvisions_networks(name, size, lively):
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None, num_classes=5)
    if name == "alexnet":  # its dense layers would take half a gigabyte in float64
        network.avgpool = nn.AdaptiveAvgPool2d(1)
        network.classifier = nn.Sequential(nn.Linear(256, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 5))
    canonical = canonize(lively(network), (3, size, size))
    zennit, engine = engines(canonical, torch.randn(2, 3, size, size).double(), torch.tensor([1, 4]))
    for composite in VARIED[1:3]:
        assert difference(zennit.attribute(composite), engine.attribute(composite)) < 1e-10


@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenetv3_small_100", "resnet18"])
def test_in_float32_scores_agree_to_rounding(name, build):
    torch.manual_seed(0)
    canonical = canonize(build(name).float(), (3, 32, 32))
    zennit, engine = engines(canonical, torch.randn(10, 3, 32, 32), torch.arange(10))
    engine.prepare(VARIED)
    n_differing = 0
    for composite in VARIED:
        expected, given = zennit.attribute(composite), engine.attribute(composite)
        assert difference(expected, given) < 1e-4
        n_differing += differing_masks(expected, given, 1e-4)
    assert n_differing <= 0.3 * len(VARIED) * 2 * len(RATES)


def small(lively) -> nn.Module:
    torch.manual_seed(0)

    def block(n_in: int, n_out: int) -> list[nn.Module]:
        return [nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU()]

    layers = [*block(3, 6), nn.MaxPool2d(2), *block(6, 8), *block(8, 8), nn.AvgPool2d(2)]
    return lively(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 4)))


@pytest.fixture(scope="module")
def canonical(lively) -> CanonicalNetwork:
    return canonize(small(lively), (3, 8, 8))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(12, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


LABELS = torch.arange(12) % 4


@pytest.fixture(scope="module")
def whole_grid(canonical, images) -> dict[str, Relevance]:
    _, engine = engines(canonical, images, LABELS)
    engine.prepare(GRID)
    return {composite.key: engine.attribute(composite) for composite in GRID}


def test_the_whole_grid(canonical, images, whole_grid):
    zennit, _ = engines(canonical, images, LABELS)
    n_masks = 0
    for composite in GRID:
        expected = zennit.attribute(composite)
        assert difference(expected, whole_grid[composite.key]) < 1e-10
        n_masks += differing_masks(expected, whole_grid[composite.key], 1e-10)
    assert n_masks == 0


@pytest.mark.parametrize("output_relevance", ["one", "logit"])
@pytest.mark.parametrize("abs_scope", ["sum", "element"])
def test_options_are_zennits(canonical, images, abs_scope, output_relevance):
    zennit, engine = engines(canonical, images, LABELS, abs_scope=abs_scope, output_relevance=output_relevance)
    engine.prepare(VARIED)
    for composite in VARIED:
        expected, given = zennit.attribute(composite), engine.attribute(composite)
        assert difference(expected, given) < 1e-10
        for name, sums in expected.sums.items():
            torch.testing.assert_close(given.sums[name], sums, rtol=1e-9, atol=1e-12 * float(sums.abs().max()))


def test_groups_of_a_users_own_need_not_follow_the_depth(canonical, images):
    names = list(canonical.layers)
    orders = [("FCL", "LLR", "HLL", "MLL", "LLR"), ("LLR", "HLL", "LLR", "HLL", "LLR"), ("MLL",) * 5]
    for order in orders:
        zennit, engine = engines(canonical, images, LABELS, dict(zip(names, order, strict=True)))
        engine.prepare(VARIED)
        for composite in VARIED:
            assert difference(zennit.attribute(composite), engine.attribute(composite)) < 1e-10


@pytest.mark.parametrize("memory", [1, 200_000, 2_000_000, 10**12])
def test_any_memory_gives_the_same_scores(canonical, images, whole_grid, memory):
    _, engine = engines(canonical, images, LABELS, memory=memory)
    engine.prepare(GRID[:100])
    for composite in (*GRID[:100], *GRID[140:200:7]):
        assert difference(whole_grid[composite.key], engine.attribute(composite)) < 1e-10


def test_little_memory_makes_small_chunks(canonical, images):
    sizes = [engines(canonical, images, LABELS, memory=memory)[1].batches.size for memory in (1, 300_000, 2**30)]
    assert sizes[0] == 1 < sizes[1] < sizes[2] == 12


def test_kept_values_stay_within_the_memory(canonical, images):
    for memory in (100_000, 1_000_000, 4_000_000):
        _, engine = engines(canonical, images, LABELS, memory=memory)
        for composite in GRID[::5]:
            engine.attribute(composite)
        values = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for chunks in engine._prefixes.kept.values()
            for prefix in chunks.values()
            for value in (*prefix.pending.values(), prefix.sums)
        }
        assert sum(values.values()) <= memory / 8
        assert sum(relevance.nbytes for relevance in engine._relevances.values()) <= max(memory / 8, 20_000)


class Counted:
    """How many images passed forward, and relevances through the layers, row by row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = self.layers = 0
        run, propagate = Batch.of, Batch.propagate

        def counted_run(plan: Any, images: Tensor) -> Batch:
            self.images += len(images)
            return run(plan, images)

        def counted_propagate(batch: Batch, node: Any, relevance: Tensor, rule: Any) -> Any:
            self.layers += 0 if rule is None else len(relevance) // len(batch.logits)
            return propagate(batch, node, relevance, rule)

        monkeypatch.setattr(Batch, "of", counted_run)
        monkeypatch.setattr(Batch, "propagate", counted_propagate)


def test_one_forward_pass_and_one_propagation_an_edge_serve_the_whole_grid(canonical, images, monkeypatch):
    counted = Counted(monkeypatch)
    _, engine = engines(canonical, images, LABELS)
    engine.prepare(GRID)
    # 2 dense layers in FCL, one convolution in HLL and one in MLL; the stem's own rule never matters.
    assert (counted.images, counted.layers) == (12, 4 * 2 + 16 + 64)
    for composite in GRID:
        engine.attribute(composite)
    engine.prepare(GRID)
    assert (counted.images, counted.layers) == (12, 4 * 2 + 16 + 64)


def test_composites_asked_one_at_a_time_share_what_is_known(canonical, images, whole_grid, monkeypatch):
    counted = Counted(monkeypatch)
    _, engine = engines(canonical, images, LABELS)
    first, *others = [
        CompositeSpec.parse_rules(f"LLR=ZPlus,MLL={mll},HLL={hll},FCL={fcl}")
        for fcl, hll, mll in [
            ("Epsilon", "ZPlus", "ZPlus"),  # two dense layers and two convolutions
            ("Epsilon", "ZPlus", "AlphaBeta"),  # one convolution
            ("Epsilon", "AlphaBeta", "AlphaBeta"),  # two
            ("ZPlus", "AlphaBeta", "AlphaBeta"),  # all
            ("Epsilon", "AlphaBeta", "ZPlus"),  # one
        ]
    ]
    engine.attribute(first)
    steps = []
    for composite in others:
        before = counted.layers
        given = engine.attribute(composite)
        steps.append(counted.layers - before)
        assert difference(whole_grid[replace(composite, abs=True).key], given) < 1e-10
    assert steps == [1, 2, 4, 1]
    assert counted.images == 12


@pytest.mark.parametrize("n_fitting", [1, 5])
def test_out_of_memory_halves_the_chunks(canonical, images, whole_grid, monkeypatch, n_fitting):
    run, propagated = Batch.of, Batch.propagate

    def limited_run(plan: Any, images: Tensor) -> Batch:
        if len(images) > n_fitting:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(plan, images)

    monkeypatch.setattr(Batch, "of", limited_run)
    _, engine = engines(canonical, images, LABELS)
    assert engine.batches.remark is None
    engine.prepare(GRID[:8])
    n_halved = {1: 1, 5: 3}[n_fitting]
    assert engine.batches.remark == f"Out of memory: batches in attribution were halved from 12 to {n_halved} images."
    for composite in GRID[:16]:
        assert difference(whole_grid[composite.key], engine.attribute(composite)) < 1e-10
    assert Batch.propagate is propagated


def test_out_of_memory_for_one_image_is_an_error(canonical, images, monkeypatch):
    def none_fits(plan: Any, images: Tensor) -> Batch:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Batch, "of", none_fits)
    _, engine = engines(canonical, images, LABELS)
    with pytest.raises(OutOfMemoryError, match=r"^Out of memory in attribution with batches of 12 images"):
        engine.attribute(GRID[0])


def test_a_composite_that_fails_leaves_the_others_alone(images):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).double().eval()
    with torch.no_grad():
        network[3].weight.copy_(-network[3].weight.abs())  # no positive contribution: ZPlus loses everything
    _, engine = engines(canonize(network, (3, 8, 8)), images, LABELS % 2)
    lost, kept = (CompositeSpec(*[RuleSpec(rule)] * 4, abs=True) for rule in ("ZPlus", "Epsilon"))
    engine.prepare([lost, kept])
    assert engine.attribute(kept).scores(absolute=True).keys() == {"0"}
    with pytest.raises(ArithmeticError, match=r"^No relevance reaches layer '0' under this composite"):
        engine.attribute(lost).scores(absolute=True)


def test_what_the_engine_has_no_rule_for_goes_to_zennit(lively, images, caplog):
    class Odd(Activation):
        pass

    canonical = canonize(small(lively), (3, 8, 8))
    name = next(name for name, module in canonical.module.named_modules() if isinstance(module, Activation))
    canonical.module.set_submodule(name, Odd(torch.ops.aten.relu.default))
    with caplog.at_level(logging.WARNING):
        zennit, engine = engines(canonical, images, LABELS)
        engine.prepare(VARIED)
        for composite in VARIED[:2]:
            assert difference(zennit.attribute(composite), engine.attribute(composite)) == 0
    said = [record.getMessage() for record in caplog.records if record.name == shared.__name__]
    assert said == [f"The shared attribution engine has no rule for the step {name!r}; zennit attributes this network."]


def test_attribution_is_repeatable_and_leaves_the_network_alone(canonical, images, snapshot):
    before = snapshot(canonical.module)
    first, again = (engines(canonical, images, LABELS)[1] for _ in range(2))
    first.prepare(VARIED)
    again.prepare(VARIED)
    for composite in VARIED:
        one, other = first.attribute(composite), again.attribute(composite)
        assert all(torch.equal(one.sums[name], other.sums[name]) for name in one.sums)
    assert snapshot(canonical.module) == before


def test_engine_refuses_groups_that_leave_a_layer_out_and_memory_of_nothing(canonical, images):
    groups = group_layers(canonical)
    with pytest.raises(OptionError, match=r"^`memory` must be at least 1 byte, but got 0\.$"):
        SharedAttribution(canonical, groups, LabelledImages(images, LABELS), 4, memory=0)
    del groups["0"]
    with pytest.raises(UnsupportedNetworkError, match=r"^The layer '0' has no group"):
        SharedAttribution(canonical, groups, LabelledImages(images, LABELS), 4)


def test_defaults_are_bounded():
    assert shared.DEFAULT_MEMORY == 2**30
    assert set(GROUPS) == {"LLR", "MLL", "HLL", "FCL"}


# Transformers.


@pytest.mark.parametrize("components", ["all", "heads", "mlp"])
def test_scores_are_zennits_on_every_transformer(transformer, components):
    canonical = transformer.canonical.choosing(components)
    zennit, engine = engines(canonical, transformer.images, transformer.labels)
    assert engine._plan is not None
    engine.prepare(OF_TRANSFORMERS)
    for spec in OF_TRANSFORMERS:
        expected, found = zennit.attribute(spec), engine.attribute(spec)
        assert difference(expected, found) < 1e-10
        differing_masks(expected, found, 1e-10)


def test_composites_of_a_transformer_asked_one_at_a_time_and_in_chunks(build_transformer):
    canonical = canonize(build_transformer("class-token"), (3, 16, 16)).choosing("all")
    images = torch.randn(7, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(7)
    together, alone = (engines(canonical, images, labels)[1] for _ in range(2))
    small = engines(canonical, images, labels, memory=2**20, abs_scope="element")
    together.prepare(OF_TRANSFORMERS)
    for spec in OF_TRANSFORMERS:
        assert difference(together.attribute(spec), alone.attribute(spec)) < 1e-10
        assert difference(*(engine.attribute(spec) for engine in small)) < 1e-10


@pytest.mark.parametrize(
    "parted",
    [
        {"blocks.3.attn.qkv.v": "MLL", "blocks.3.attn.qkv.k": "LLR", "blocks.1.attn.qkv.q": "LLR"},
        {"blocks.3.attn.qkv.k": "MLL", "blocks.3.attn.qkv.q": "LLR"},  # a segment of each alone
    ],
)
def test_borders_of_groups_that_part_query_and_key_from_their_attention(build_transformer, parted):
    canonical = canonize(build_transformer("class-token"), (3, 16, 16)).choosing("all")
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    groups = dict.fromkeys(canonical.layers, "HLL") | {"head": "FCL", "patch_embed.proj": "LLR"} | parted
    zennit, engine = engines(canonical, images, torch.tensor([1, 2]), groups)
    engine.prepare(OF_TRANSFORMERS)
    for spec in OF_TRANSFORMERS:
        assert difference(zennit.attribute(spec), engine.attribute(spec)) < 1e-10


def test_what_composites_share_of_attention_and_norms_is_computed_once_a_pass(build_transformer, monkeypatch):
    canonical = canonize(build_transformer("class-token"), (3, 16, 16)).choosing("all")
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, engine = engines(canonical, images, torch.tensor([1, 2]))
    calls: Counter[tuple[nn.Module, str]] = Counter()

    def counted(kind, name):
        plain = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, *args: calls.update([(self, name)]) or plain(self, *args))

    counted(AttentionProduct, "plain")
    counted(LayerNorm, "parts")
    rules = [RuleSpec("Epsilon", epsilon=epsilon) for epsilon in (1e-6, 1e-3)]
    for first, last in itertools.product(rules, rules):
        spec = CompositeSpec(first, first, first, last, abs=False, attention="ZPlus")
        engine.attribute(spec)
        counts = Counter(calls)
        calls.clear()
        if (first, last) == (rules[0], rules[0]):
            products = [n for (module, name), n in counts.items() if name == "plain"]
            assert max(products) == 2  # the product itself, and of positive values
        else:
            assert not any(name == "plain" for _, name in counts)
            assert max(counts.values(), default=0) == 1  # norms only divide relevance into parts


def test_queries_and_keys_cost_nothing_where_attention_is_a_constant(build_transformer, monkeypatch):
    canonical = canonize(build_transformer("class-token"), (3, 16, 16))
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    passed: list[str] = []
    own = Batch.propagate

    def propagate(self, node, relevance, rule):
        passed.append(str(node.target))
        return own(self, node, relevance, rule)

    monkeypatch.setattr(Batch, "propagate", propagate)
    for attention in ATTENTION_RULES:
        passed.clear()
        _, engine = engines(canonical, images, torch.tensor([1, 2]))
        engine.attribute(replace(VARIED[0], attention=attention))
        parts = {name for name in passed if name.endswith((".q", ".k", ".weights"))}
        assert bool(parts) == (attention == "AttnLRP")


def test_attention_needs_a_rule(build_transformer):
    canonical = canonize(build_transformer("class-token"), (3, 16, 16))
    _, engine = engines(canonical, torch.zeros(1, 3, 16, 16).double(), torch.tensor([1]))
    with pytest.raises(UnsupportedNetworkError, match="the composite has no rule for it"):
        engine.attribute(VARIED[0])
