import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FixedTrial, TrialState, create_trial

from search_spaces import (
    GROUPS,
    SPACES,
    CompositeError,
    CompositeSpec,
    ContinuousSpace,
    DiscreteSpace,
    OutsideSpaceError,
    RepairedSpace,
    RepairSpec,
    RuleSpec,
    SearchSpace,
    SpaceError,
    SpaceImportError,
    SpaceNotFiniteError,
    UnknownRuleError,
    UnknownSpaceError,
    load_space,
    register,
)

RULES = """
[parameters]
LLR = ["Epsilon", "Gamma(1)", "Gamma"]
MLL = ["ZPlus"]
HLL = ["Epsilon", "AlphaBeta"]
FCL = ["Epsilon"]
"""


class TestRepairedSpace:
    SPACE = RepairedSpace(load_space("cnn"), ("none", "refit"), (0.1, 1.0))

    def test_every_repair_is_a_neighbour(self) -> None:
        grid = self.SPACE.grid()
        assert self.SPACE.size() == len(grid) == len(set(grid)) == 3 * 1212
        assert [str(point.repair) for point in grid[:3]] == ["none", "refit(0.1)", "refit(1)"]
        assert len({point.attribution_key for point in grid[:3]}) == 1

    def test_suggests_points_and_finds_their_parameters_again(self) -> None:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        repairs = set()
        for _ in range(50):
            trial = study.ask(self.SPACE.distributions())
            composite = self.SPACE.suggest(trial)
            assert trial.params.keys() == self.SPACE.distributions().keys()
            parameters = self.SPACE.parameters(composite)
            assert parameters.keys() == trial.params.keys()
            assert self.SPACE.suggest(FixedTrial(parameters)) == composite
            repairs.add(str(composite.repair))
        assert repairs == {"none", "refit(0.1)", "refit(1)"}

    def test_a_registered_space_is_repaired_by_its_suffix(self) -> None:
        space = load_space("cnn-extended+repair")
        assert space == RepairedSpace(load_space("cnn-extended"), ("none", "bn", "refit"))
        assert space.name == "cnn-extended+repair"
        assert space.to_json()["parameters"]["repair"] == ["none", "bn", "refit"]
        assert load_space("cnn-continuous+repair").size() is None
        with_strength = load_space("cnn+repair-strength")
        assert with_strength == RepairedSpace(load_space("cnn"), ("none", "bn", "refit"), (0.01, 0.1, 1.0))
        assert with_strength.name == "cnn+repair-strength"
        assert with_strength.size() == 1212 * (1 + 2 * 3)
        with pytest.raises(UnknownSpaceError, match="cnm"):
            load_space("cnm+repair")

    def test_a_file_lists_repairs(self, tmp_path: Path) -> None:
        path = write(tmp_path / "mine.toml", RULES + 'repair = ["refit", "bn"]\nrepair_strength = [0.1, 1]\n')
        space = load_space(path)
        assert isinstance(space, RepairedSpace)
        assert (space.repair, space.repair_strength) == (("refit", "bn"), (0.1, 1.0))
        assert load_space(write(tmp_path / "mine.toml", RULES)) == space.base

    def test_other_composites_are_outside(self) -> None:
        base = self.SPACE.base.grid()[0]
        for composite in (base, replace(base, repair=RepairSpec("bn"))):
            with pytest.raises(OutsideSpaceError):
                self.SPACE.parameters(composite)
        for name in ("cnn", "cnn-continuous"):
            with pytest.raises(OutsideSpaceError):
                load_space(name).parameters(self.SPACE.grid()[0])

    @pytest.mark.parametrize(
        ("repair", "strength"),
        [((), ()), (("rifit",), ()), (("bn", "bn"), ()), (("bn",), (0.0,)), (("bn",), (1, 1.0)), (("none",), (0.1,))],
    )
    def test_lists_that_cannot_be_searched_are_refused(
        self, repair: tuple[str, ...], strength: tuple[float, ...]
    ) -> None:
        with pytest.raises(SpaceError, match=r"^Parameter repair"):
            RepairedSpace(self.SPACE.base, repair, strength)


@pytest.fixture(params=sorted(SPACES))
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return load_space(request.param)


def attention_of(space: SearchSpace) -> str | None:
    """A rule that its composites can have for attention."""
    return "CP" if "attention" in space.distributions() else None


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


class TestEveryRegisteredSpace:
    def test_is_a_space_of_its_name(self, space: SearchSpace) -> None:
        assert isinstance(space, SearchSpace)
        assert SPACES[space.name]() == space
        assert SPACES[space.name].__doc__

    def test_suggests_points_and_finds_their_parameters_again(self, space: SearchSpace) -> None:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(50):
            trial = study.ask(space.distributions())
            composite = space.suggest(trial)
            assert trial.params.keys() == space.distributions().keys()
            assert space.suggest(FixedTrial(space.parameters(composite))) == composite

    def test_parameters_make_trials_for_the_store(self, space: SearchSpace) -> None:
        composite = CompositeSpec.parse_rules(
            "LLR=ZPlus,MLL=AlphaBeta,HLL=Gamma,FCL=Epsilon", attention=attention_of(space)
        )
        trial = create_trial(
            state=TrialState.COMPLETE,
            value=0.5,
            params=space.parameters(composite),
            distributions=space.distributions(),
        )
        assert CompositeSpec.from_parameters(trial.params) == composite

    def test_refuses_composites_that_it_does_not_contain(self, space: SearchSpace) -> None:
        for rules in ("LLR=AlphaBeta(3,2)", "LLR=Gamma(1000)", "LLR=Epsilon(1e-12)"):
            composite = CompositeSpec.parse_rules(
                f"{rules},MLL=ZPlus,HLL=ZPlus,FCL=ZPlus", attention=attention_of(space)
            )
            with pytest.raises(OutsideSpaceError, match=space.name):
                space.parameters(composite)
        other = "CP" if attention_of(space) is None else None
        composite = CompositeSpec(*[RuleSpec("ZPlus")] * 4, abs=True, attention=other)
        with pytest.raises(OutsideSpaceError, match=space.name):
            space.parameters(composite)
        composite = CompositeSpec.parse_rules("LLR=Epsilon(0.1),MLL=Epsilon(0.01),HLL=ZPlus,FCL=ZPlus")
        with pytest.raises(OutsideSpaceError, match=space.name):
            space.parameters(composite)

    def test_content_is_json(self, space: SearchSpace) -> None:
        content = space.to_json()
        assert content["parameters"].keys() == space.distributions().keys()
        assert content["groups"] is None


class TestCnn:
    def test_grid_holds_each_distinct_point_once(self) -> None:
        assert load_space("vit").size() == 3 * load_space("cnn").size() == 3636
        space = load_space("cnn")
        points = space.grid()
        combinations = [
            CompositeSpec.from_parameters(dict(zip((*GROUPS, "abs", "epsilon"), values, strict=True)))
            for values in itertools.product(
                *[("Epsilon", "ZPlus", "AlphaBeta", "Gamma")] * 4, (False, True), (1e-6, 1e-2, 1e-1)
            )
        ]
        assert len(combinations) == 1536
        assert len(points) == len(set(points)) == space.size() == 1212
        assert set(points) == set(combinations)

    def test_parameters_and_suggest_are_inverse(self) -> None:
        space = load_space("cnn")
        distributions = space.distributions()
        for point in space.grid():
            parameters = space.parameters(point)
            assert parameters.keys() == distributions.keys()
            assert space.suggest(FixedTrial(parameters)) == point

    def test_an_unused_epsilon_has_its_first_value(self) -> None:
        parameters = load_space("cnn").parameters(CompositeSpec(*[RuleSpec("ZPlus")] * 4, abs=True))
        assert parameters == {**dict.fromkeys(GROUPS, "ZPlus"), "abs": True, "epsilon": 1e-6}

    def test_grid_walks_the_tree_of_rules(self) -> None:
        """Each node (the rules from the output down to a group) is entered once; the values of abs are neighbours."""
        points = load_space("cnn").grid()
        for depth in range(1, 5):
            nodes = [tuple(reversed(point.rules.values()))[:depth] for point in points]
            assert len(list(itertools.groupby(nodes))) == len(set(nodes))
        for signed, absolute in zip(points[::2], points[1::2], strict=True):
            assert signed.attribution_key == absolute.attribution_key
            assert (signed.abs, absolute.abs) == (False, True)


class TestExtended:
    def test_grid_holds_each_distinct_ranking_once(self) -> None:
        space = load_space("cnn-extended")
        points = space.grid()
        assert len(points) == len(set(points)) == space.size() == 606 * 3 * 3
        plain = load_space("cnn").grid()
        assert set(plain) < set(points)
        assert {point.attribution_key for point in points} == {point.attribution_key for point in plain}
        ways = {(point.abs, point.aggregate, point.normalize) for point in points}
        means = itertools.product((False, True), ("mean",), ("none", "l2", "mean"))
        assert ways == {*means, *itertools.product((True,), ("rms",), ("none", "l2", "mean"))}

    def test_rankings_of_one_attribution_are_neighbours(self) -> None:
        points = load_space("cnn-extended").grid()
        keys = [point.attribution_key for point in points]
        assert [len(list(group)) for _, group in itertools.groupby(keys)] == [9] * 606

    def test_parameters_and_suggest_are_inverse(self) -> None:
        space = load_space("cnn-extended")
        for point in space.grid()[::7]:
            assert space.suggest(FixedTrial(space.parameters(point))) == point

    def test_the_sign_is_a_parameter_that_root_mean_squares_do_not_use(self) -> None:
        signed_only = DiscreteSpace("x", dict.fromkeys(GROUPS, ("ZPlus",)), abs=(False,), aggregate=("mean", "rms"))
        mean, rms = signed_only.grid()
        assert (mean.abs, rms.abs) == (False, True)
        assert signed_only.parameters(rms) == {**dict.fromkeys(GROUPS, "ZPlus"), "abs": False, "epsilon": 1e-6} | {
            "aggregate": "rms"
        }
        assert signed_only.suggest(FixedTrial(signed_only.parameters(rms))) == rms

    def test_spaces_without_a_choice_have_no_such_parameters(self) -> None:
        assert load_space("cnn").distributions().keys() == {*GROUPS, "abs", "epsilon"}
        composite = CompositeSpec(*[RuleSpec("ZPlus")] * 4, abs=True, normalize="l2")
        with pytest.raises(OutsideSpaceError, match="'cnn' does not contain"):
            load_space("cnn").parameters(composite)
        with pytest.raises(OutsideSpaceError, match="'cnn' does not contain"):
            load_space("cnn").parameters(CompositeSpec(*[RuleSpec("ZPlus")] * 4, abs=True, aggregate="rms"))

    def test_from_a_file(self, tmp_path: Path) -> None:
        text = f'{RULES}aggregate = ["rms"]\nnormalize = ["none", "l2"]\n'
        space = load_space(write(tmp_path / "mine.toml", text))
        assert space.size() == 3 * 2 * 2
        assert {point.aggregate for point in space.grid()} == {"rms"}
        assert space.to_json()["parameters"]["normalize"] == ["none", "l2"]
        for line, message in [
            ('aggregate = ["max"]', "Parameter aggregate has the unknown value 'max'. Known: mean, rms."),
            ('normalize = ["l2", "l2"]', "Parameter normalize has l2 twice; list each value once."),
            ("normalize = []", "Parameter normalize has no values"),
        ]:
            with pytest.raises(SpaceError) as caught:
                load_space(write(tmp_path / "mine.toml", f"{RULES}{line}\n"))
            assert message in str(caught.value)


class TestContinuous:
    def test_has_no_grid(self) -> None:
        space = load_space("cnn-continuous")
        assert space.size() is None
        with pytest.raises(SpaceNotFiniteError, match="'cnn-continuous' is continuous and has no grid; use `--sampler"):
            space.grid()

    def test_ranges(self) -> None:
        distributions = load_space("cnn-continuous").distributions()
        for group in GROUPS:
            assert distributions[f"{group}_gamma"] == optuna.distributions.FloatDistribution(0.01, 10, log=True)
        assert distributions["epsilon"] == optuna.distributions.FloatDistribution(1e-6, 1, log=True)

    def test_unused_parameters_have_the_usual_values(self) -> None:
        parameters = load_space("cnn-continuous").parameters(CompositeSpec(*[RuleSpec("ZPlus")] * 4, abs=True))
        assert [parameters[name] for name in ("epsilon", "LLR_gamma", "FCL_gamma")] == [1e-6, 0.25, 0.05]
        narrow = ContinuousSpace("narrow", gamma=(1.0, 2.0), epsilon=(0.1, 0.2))
        parameters = narrow.parameters(CompositeSpec(*[RuleSpec("ZPlus")] * 4, abs=True))
        assert [parameters[name] for name in ("epsilon", "LLR_gamma", "FCL_gamma")] == [0.1, 1.0, 1.0]

    @pytest.mark.parametrize("bounds", [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)])
    def test_refuses_other_ranges(self, bounds: tuple[float, float]) -> None:
        with pytest.raises(SpaceError, match="range of gamma must increase from above 0"):
            ContinuousSpace("x", gamma=bounds)


class TestToml:
    def test_values_and_groups(self, tmp_path: Path) -> None:
        text = f'name = "mine"\n{RULES}abs = [true]\nepsilon = [0.1, 1]\n[groups]\nLLR = ["features.0*", "stem"]\n'
        space = load_space(write(tmp_path / "space.toml", text))
        assert space == DiscreteSpace(
            name="mine",
            rules={
                "LLR": ("Epsilon", "Gamma(1)", "Gamma"),
                "MLL": ("ZPlus",),
                "HLL": ("Epsilon", "AlphaBeta"),
                "FCL": ("Epsilon",),
            },
            abs=(True,),
            epsilon=(0.1, 1.0),
            layer_groups={"LLR": ("features.0*", "stem")},
        )
        assert space.size() == len(space.grid()) == 3 * 2 * 2
        for point in space.grid():
            assert space.suggest(FixedTrial(space.parameters(point))) == point
        assert space.to_json()["groups"] == {"LLR": ["features.0*", "stem"]}

    def test_what_is_left_out(self, tmp_path: Path) -> None:
        space = load_space(write(tmp_path / "small.toml", RULES))
        assert space.name == "small"
        assert space.layer_groups is None
        assert space.distributions()["abs"] == optuna.distributions.CategoricalDistribution((False, True))
        assert space.distributions()["epsilon"] == optuna.distributions.CategoricalDistribution((1e-6,))

    def test_signed_only(self, tmp_path: Path) -> None:
        space = load_space(write(tmp_path / "signed.toml", f"{RULES}abs = [false]\n"))
        with pytest.raises(OutsideSpaceError, match="'signed' does not contain composite"):
            space.parameters(CompositeSpec.parse_rules("LLR=Epsilon,MLL=ZPlus,HLL=Epsilon,FCL=Epsilon", abs=True))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("parameters = ", "is not valid TOML: "),
            ("\udcff", "is not valid TOML: 'utf-8' codec"),
            ("[parameter]", "Unknown key 'parameter'. Did you mean 'parameters'? Known: groups, name, parameters."),
            ("name = 3", "Key name must be a text, but got 3."),
            ("", "Table [parameters] is missing; list the rules of LLR, MLL, HLL and FCL in it."),
            ("parameters = 3", "[parameters] must be a table, but got 3."),
            ("[parameters]\nLLR = ['ZPlus']", "Parameter MLL is missing; list the rules to try, as MLL = ['Epsilon']."),
            (
                f"{RULES}LLRR = ['ZPlus']",
                "Unknown parameter 'LLRR'. Did you mean 'LLR'? Known: FCL, HLL, LLR, MLL, abs, ",
            ),
            (f"{RULES}abs = []", "Parameter abs has no values; list at least one or leave the key out."),
            (f"{RULES}abs = true", "abs must be a list, as abs = [...], but got True."),
            (f"{RULES}abs = [1]", "Parameter abs takes true and false, but got 1."),
            (f"{RULES}abs = [true, true]", "Parameter abs has True twice; list each value once."),
            (
                f"{RULES}epsilon = [0]",
                "Parameter epsilon has a value out of range: Rule Epsilon needs epsilon > 0, but",
            ),
            (f"{RULES}epsilon = [-1e-6]", "Rule Epsilon needs epsilon > 0, but got -1e-06."),
            (f"{RULES}epsilon = [nan]", "Rule Epsilon needs a finite number as epsilon, but got nan."),
            (f"{RULES}epsilon = ['a']", "Rule Epsilon needs a finite number as epsilon, but got 'a'."),
            (f"{RULES}epsilon = [1, 1.0]", "Parameter epsilon has 1.0 twice; list each value once."),
            (RULES.replace('"ZPlus"', ""), "Parameter MLL has no values"),
            (RULES.replace('"ZPlus"', '"Zplus"'), "Unknown rule 'Zplus'. Did you mean 'ZPlus'? Known: AlphaBeta, "),
            (RULES.replace('"ZPlus"', "[1]"), "Unknown rule [1]."),
            (RULES.replace('"ZPlus"', '"Gamma", "Gamma(0.25)"'), "Parameter MLL has Gamma(0.25) twice"),
            (RULES.replace('"ZPlus"', '"Epsilon(0.1)"'), "Parameter MLL has 'Epsilon(0.1)'; write 'Epsilon' and list"),
            (
                f"{RULES}repair_strength = [0.1]",
                "Parameter repair_strength needs repair beside it; list its methods of ",
            ),
            (
                f"{RULES}repair = ['none']\nrepair_strength = [0.1]",
                "Parameter repair_strength has values, but repair only none; add bn or refit to it.",
            ),
            (
                f"{RULES}[groups]\nLLr = ['x']",
                "Unknown layer group 'LLr'. Did you mean 'LLR'? Known: FCL, HLL, LLR, MLL.",
            ),
            (f"{RULES}[groups]", "Table [groups] is empty; give name patterns for each group, or leave the table out."),
            (
                f"{RULES}[groups]\nLLR = []",
                "Layer group LLR has no patterns; list at least one or leave the group out.",
            ),
            (f"{RULES}[groups]\nLLR = 'x'", "LLR must be a list, as LLR = [...], but got 'x'."),
            (f"{RULES}[groups]\nLLR = [3]", "Layer group LLR has 3; a pattern is a text such as 'layer1.*'."),
            (f"{RULES}[groups]\nLLR = ['x']\nFCL = ['x']", "Pattern 'x' stands in LLR and in FCL; list it once."),
        ],
    )
    def test_errors_name_the_file_and_the_value(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "bad.toml"
        path.write_text(text, errors="surrogateescape")
        with pytest.raises((SpaceError, CompositeError)) as caught:
            load_space(str(path))
        assert str(caught.value).startswith(f"Search space file {str(path)!r}")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_unknown_rules_keep_their_class(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownRuleError):
            load_space(write(tmp_path / "bad.toml", RULES.replace("ZPlus", "Nothing")))

    def test_missing_file(self, tmp_path: Path) -> None:
        path = tmp_path / "missing.toml"
        with pytest.raises(SpaceError) as caught:
            load_space(str(path))
        assert str(caught.value) == f"Search space file {str(path)!r} cannot be read: No such file or directory."
        path.mkdir()
        with pytest.raises(SpaceError, match="cannot be read: Is a directory"):
            load_space(str(path))


class TestNames:
    def test_unknown(self) -> None:
        with pytest.raises(
            UnknownSpaceError, match=r"^Unknown search space 'cn'. Did you mean 'cnn'\? Known: cnn, cnn-"
        ):
            load_space("cn")

    def test_own_registration(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(SPACES, "mine", raising=False)  # so that the registration is undone

        @register("mine")
        def mine() -> SearchSpace:
            return ContinuousSpace("mine")

        assert load_space("mine") == mine()
        del SPACES["mine"]


class TestImports:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "modules", dict(sys.modules))
        (tmp_path / "users_space.py").write_text(
            "from search_spaces import ContinuousSpace\nspace = ContinuousSpace('mine')\nother = 3\n"
        )

    def test_object(self) -> None:
        assert load_space("users_space:space") == ContinuousSpace("mine")

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("users_space:other", "Search space 'users_space:other' is a int, not a SearchSpace: it lacks name, "),
            ("users_space:ContinuousSpace", "Search space 'users_space:ContinuousSpace' is a class; name an instance"),
            ("users_space:nothing", "Search space 'users_space:nothing' cannot be loaded: module 'users_space' has no"),
            ("no_such_module:x", "Search space 'no_such_module:x' cannot be loaded: module 'no_such_module' cannot be"),
            ("a:b:c", "Search space 'a:b:c' cannot be loaded: 'a:b:c' is not of the form package.module:object."),
        ],
    )
    def test_other_objects(self, path: str, message: str) -> None:
        with pytest.raises(SpaceImportError) as caught:
            load_space(path)
        assert str(caught.value).startswith(message)

    def test_refused_where_a_document_names_it(self) -> None:
        with pytest.raises(SpaceImportError, match="pass `--space` on the command line"):
            load_space("users_space:space", allow_imports=False)
        assert "users_space" not in sys.modules
        assert load_space("cnn", allow_imports=False).size() == 1212


def test_a_space_made_in_python_is_checked_too() -> None:
    with pytest.raises(SpaceError, match="Unknown parameter 'XXX'"):
        DiscreteSpace("x", {"XXX": ("ZPlus",)})
    any_rules: dict[str, Any] = dict.fromkeys(GROUPS, ("ZPlus",))
    with pytest.raises(SpaceError, match="Unknown layer group 'X'"):
        DiscreteSpace("x", any_rules, layer_groups={"X": ("y",)})
    with pytest.raises(SpaceError, match="Unknown layer group 'X'"):
        ContinuousSpace("x", layer_groups={"X": ("y",)})
