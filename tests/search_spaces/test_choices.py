"""The choices that options, objectives and documents share."""

from typing import get_args

import pytest

from search_spaces import choices
from search_spaces.choices import AbsScope, Components, OutputRelevance, RankingScope, ReferenceSampling
from search_spaces.documents import document_schema


@pytest.mark.parametrize(
    ("path", "choice"),
    [
        (("abs_scope",), AbsScope),
        (("output_relevance",), OutputRelevance),
        (("components",), Components),
        (("ranking",), RankingScope),
        (("references", "properties", "sample"), ReferenceSampling),
    ],
)
def test_the_schema_knows_the_same_ones(path, choice):
    schema = document_schema()["properties"]
    for key in path:
        schema = schema[key]
    assert set(schema["enum"]) == set(get_args(choice))


@pytest.mark.parametrize("name", choices.__all__)
def test_each_holds_distinct_words(name):
    words = get_args(getattr(choices, name))
    assert len(set(words)) == len(words) > 1
