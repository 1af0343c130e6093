"""The plan states only what holds on any images, and cuts the way wherever composites may part."""

import pytest
import torch
from torch import Tensor, fx, nn

from objectives.attribution.composites import zennit_composite
from objectives.attribution.operations import Activation
from objectives.attribution.plan import Plan, make_plan
from objectives.canonization import canonize
from objectives.layer_groups import group_layers
from search_spaces.composites import CompositeSpec

MIXED = CompositeSpec.parse_rules("LLR=Gamma,MLL=AlphaBeta,HLL=Gamma,FCL=Epsilon", abs=True)


def plan_of(canonical, groups=None) -> Plan:
    plan = make_plan(canonical, group_layers(canonical) if groups is None else groups)
    assert isinstance(plan, Plan)
    return plan


class Values(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        self.found[n] = super().run_node(n)
        return self.found[n]


def test_what_is_said_of_values_and_relevances_holds(classifier, trace):
    plan = plan_of(classifier.canonical)
    values = Values(classifier.canonical.module)
    values.run(3 * classifier.images)
    for node in plan.non_negative:
        assert (values.found[node] >= 0).all(), node
    rules = zennit_composite(MIXED, group_layers(classifier.canonical))
    steps = trace(classifier.canonical.module, rules, classifier.images, classifier.labels)
    assert bool(plan.silent) == (classifier.name != "efficientnet_b0")  # whose activations are SiLU
    for node in plan.silent:
        if node.name in steps:
            step = steps[node.name]
            assert not step.relevance_out[step.output <= 0].any(), node


def test_every_layer_is_in_one_segment_of_its_group(classifier):
    groups = group_layers(classifier.canonical)
    plan = plan_of(classifier.canonical, groups)
    assert [segment.group for segment in plan.segments] == ["FCL", "HLL", "MLL", "LLR"]
    assert all(segment.groups == (segment.group,) for segment in plan.segments)
    found = [name for segment in plan.segments for name in segment.components]
    assert found[::-1] == list(classifier.canonical.components)
    assert sorted(sum((segment.nodes for segment in plan.segments), start=()), key=str) == sorted(plan.wanted, key=str)


def chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1),
        nn.ReLU(), nn.Flatten(), nn.Linear(16, 2),
    ).eval()  # fmt: skip


def test_groups_may_alternate():
    canonical = canonize(chain(), (3, 2, 2))
    groups = {"0": "LLR", "2": "HLL", "3": "MLL", "5": "HLL", "8": "FCL"}
    segments = plan_of(canonical, groups).segments
    assert [segment.groups for segment in segments] == [("FCL",), ("HLL",), ("MLL", "HLL")]
    assert [segment.components for segment in segments] == [(), ("5",), ("3", "2", "0")]


def test_rectifiers_make_values_non_negative_and_relevance_silent():
    canonical = canonize(chain(), (3, 2, 2))
    plan = plan_of(canonical)
    named = {str(node.target): node for node in canonical.module.graph.nodes}
    assert {name for name in ("0", "2", "3", "5", "8") if named[name] in plan.silent} == {"0", "5"}
    layers = [name for name in ("2", "3", "5", "8") if named[name].all_input_nodes[0] in plan.non_negative]
    assert layers == ["2", "8"]


@pytest.mark.parametrize(("lowest", "silent"), [(0.0, True), (-1.0, False)])
def test_clipping_rectifies_from_zero_only(lowest, silent):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardtanh(lowest, 6.0), nn.Flatten(), nn.Linear(16, 2)).eval()
    plan = plan_of(canonize(network, (3, 2, 2)))
    assert {str(node.target) for node in plan.silent} == ({"0"} if silent else set())


def test_logits_that_are_rectified_are_not_silent():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2), nn.Flatten()).eval()
    plan = plan_of(canonize(network, (3, 2, 2)))
    assert {str(node.target) for node in plan.silent} == {"0"}


def test_a_step_without_a_rule_is_named():
    class Odd(Activation):
        pass

    canonical = canonize(chain(), (3, 2, 2))
    (name,) = (n for n, module in canonical.module.named_modules() if n.startswith("activation_silu"))
    canonical.module.set_submodule(name, Odd(torch.ops.aten.silu.default))
    assert make_plan(canonical, group_layers(canonical)) == f"the step {name!r}"
