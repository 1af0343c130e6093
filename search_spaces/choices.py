"""Closed choices that options, objectives and documents share, each declared once."""

from typing import Literal

__all__ = [
    "AbsScope",
    "AttributionEngine",
    "Components",
    "Dtype",
    "ImageSet",
    "OutputRelevance",
    "RankingScope",
    "ReferenceSampling",
]

AbsScope = Literal["sum", "element"]
"""Where the absolute value is taken: of each sample's sum over space (Hatefi et al. 2024), or of every element before
any sum (Yeom et al. 2021)."""

AttributionEngine = Literal["shared", "zennit"]
"""What attributes: many composites together, or zennit one at a time."""

Components = Literal["all", "heads", "mlp"]
"""Which components are pruned: attention heads, neurons of a transformer's MLPs, or all that there are."""

Dtype = Literal["fp32", "bf16"]
"""In what networks are evaluated while searching."""

ImageSet = Literal["search", "confirmation"]
"""The images to measure accuracy on: those of the search, or those that it never saw."""

OutputRelevance = Literal["one", "logit"]
"""What relevance the true class's output starts with."""

RankingScope = Literal["kind", "layer", "global"]
"""Whether components of each kind, or of each layer, are ranked within themselves, or all over the whole network."""

ReferenceSampling = Literal["random", "first"]
"""Which training images of a class are references: drawn ones, or the first ones."""
