import pytest
import torch
from random_ranking import random_ranking
from torch import nn

from objectives.canonization import canonize
from objectives.network import shape_of
from objectives.pruning.fusion import fused
from objectives.pruning.program import Program
from objectives.pruning.slimming import Draft, draft, slim
from objectives.pruning.tokens import leave_out_tokens

aten = torch.ops.aten

# Tokens that logits are read from; the others have 16 of patches, their means among the logits.
READ = {"class-token": 1, "average": 17, "no-class-token": 16, "layer-scale": 1, "registers": 1, "distilled": 2}
LAYERS = ("attn.qkv.q", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


def masks_of(canonical, share):
    ranking = random_ranking(canonical)
    return ranking.masks(int(share * len(ranking)))


@pytest.mark.parametrize("share", [0, 0.3, 0.7])
def test_the_last_block_computes_those_tokens_alone_that_are_read(transformer, share):
    masks = masks_of(transformer.canonical, share)
    module = draft(transformer.canonical, masks)
    leave_out_tokens(module)
    expected = slim(transformer.canonical, masks)(transformer.images)
    torch.testing.assert_close(module.written()(transformer.images), expected, rtol=0, atol=1e-12)
    last = f"blocks.{4 if transformer.name == 'layer-scale' else 3}."
    layers = [node for node in module.graph.nodes if node.op == "call_module" and "shape" in node.meta]
    lengths = {str(node.target): shape_of(node)[0] for node in layers}
    n_read = READ[transformer.name]
    for layer in LAYERS:
        if layer == "attn.qkv.q" and transformer.name == "layer-scale":
            continue  # its queries are normed by head, which is done for all tokens
        assert lengths.get(last + layer, n_read) == n_read, layer  # all of the block's heads may be gone
    for layer in ("norm1", "attn.qkv.k", "attn.qkv.v"):
        assert lengths.get(last + layer, 17) >= 16
    assert all(lengths.get("blocks.0." + layer, 17) >= 16 for layer in LAYERS)


def test_shapes_are_those_that_are_computed(transformer):
    module = draft(transformer.canonical, masks_of(transformer.canonical, 0.5))
    leave_out_tokens(module)
    written = module.written()
    seen = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            seen[n] = super().run_node(n)
            return seen[n]

    Watch(written).run(transformer.images)
    shapes = {node: shape_of(node) for node in written.graph.nodes if "shape" in node.meta}
    assert len(shapes) > 30
    assert {node: tuple(seen[node].shape[1:]) for node in shapes} == shapes


def test_heads_of_the_last_block_may_all_go(transformer):
    canonical = transformer.canonical.choosing("heads")
    masks = masks_of(canonical, 0)
    last = list(masks)[-1]
    masks[last][:] = False
    expected = slim(canonical, masks)(transformer.images)
    torch.testing.assert_close(fused(draft(canonical, masks))(transformer.images), expected, rtol=0, atol=1e-12)


class Patches(nn.Module):
    """Positions of an image as tokens, without attention; logits are read from the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.embed(x)).flatten(2).transpose(1, 2)
        return self.head(x[:, 0])


def test_channels_before_they_are_transposed_are_no_tokens():
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    canonical = canonize(Patches().double().eval(), (3, 16, 16))
    masks = masks_of(canonical, 0.3)
    torch.testing.assert_close(
        fused(draft(canonical, masks))(images), slim(canonical, masks)(images), rtol=0, atol=1e-12
    )


def test_a_value_read_twice_is_cut_for_each_reader():
    """Three tokens of one summand are needed elsewhere, two of the sum."""
    torch.manual_seed(0)
    network, graph = Draft(), torch.fx.Graph()
    network.first, network.second = nn.Linear(4, 4), nn.Linear(4, 4)
    tokens = graph.placeholder("tokens")
    first, second = graph.call_module("first", (tokens,)), graph.call_module("second", (tokens,))
    total = graph.call_function(aten.add.Tensor, (first, second))
    read = [graph.call_function(aten.select.int, (value, 1, n)) for value, n in ((total, 1), (first, 2))]
    for node in (tokens, first, second, total):
        node.meta["shape"] = (7, 4)
    graph.output(graph.call_function(aten.add.Tensor, tuple(read)))
    network.graph = graph
    given = torch.randn(2, 7, 4)
    expected = Program(network)(given)
    leave_out_tokens(network)
    torch.testing.assert_close(Program(network)(given), expected)
    assert [shape_of(node)[0] for node in (first, second, total)] == [3, 2, 2]
