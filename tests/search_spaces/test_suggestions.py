import pytest

from search_spaces import did_you_mean


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("epsilom", ["ZPlus", "Epsilon"], " Did you mean 'Epsilon'? Known: Epsilon, ZPlus."),
        ("ZPLUS", ["ZPlus", "Epsilon"], " Did you mean 'ZPlus'? Known: Epsilon, ZPlus."),
        ("q", ["ZPlus", "Epsilon"], " Known: Epsilon, ZPlus."),
        ("q", [], ""),
        ("net7", [f"net{i:02}" for i in range(40)], " Did you mean 'net37' or 'net27' or 'net17'?"),
        ("q", [f"net{i:02}" for i in range(40)], ""),
    ],
)
def test_did_you_mean(name: str, known: list[str], text: str) -> None:
    assert did_you_mean(name, known) == text
