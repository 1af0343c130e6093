"""Vision transformers through the command line: a small one with random weights on the digits."""

import json

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner

from hpo.cli import cli
from objectives import load_slim
from objectives.pruning.slim_files import load_coupled
from search_spaces.documents import load_document
from search_spaces.heuristics import TRANSFORMER_BASELINES, TRANSFORMER_HEURISTICS
from search_spaces.repairs import RepairSpec

OPTIONS = {
    "img_size": 8,
    "patch_size": 2,
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 3,
    "mlp_ratio": 2,
    "in_chans": 1,
    "num_classes": 10,
}
QUICK = ["--rates", "0,0.3,0.6", "--evaluation-images", "40", "--references-per-class", "1", "--data", "digits"]


pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", **OPTIONS)
    safetensors.torch.save_file(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    options = [part for key, value in OPTIONS.items() for part in ("--model-option", f"{key}={value}")]
    return [
        *("--model", "vit_tiny_patch16_224", *options, "--checkpoint", checkpoint),
        *("--size", "8", "--mean", "0.3", "--std", "0.4"),
    ]


def hpo(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], prog_name="hpo")
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def refused(*arguments):
    *_, line = hpo(*arguments, code=1).stderr.splitlines()
    assert line.startswith("Error: ")
    return line.removeprefix("Error: ")


def test_a_study_is_launched_resumed_exported_and_pruned(model, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{tmp_path / 'studies.db'}")
    launch = ["launch", "--study", "vit", "--exact", *model, *QUICK]
    hpo(*launch, "--n-trials", 2)
    resumed = hpo(*launch, "--n-trials", 3, "--space", "vit")  # the space that the network had by default
    assert "3 of 3 trials, 10 heuristics" in resumed.stdout
    status = json.loads(hpo("status", "vit", "--json").stdout)
    assert {heuristic["heuristic"] for heuristic in status["heuristics"]} == set(TRANSFORMER_HEURISTICS)

    path = tmp_path / "best.json"
    hpo("export", "vit", "-o", path)
    document = load_document(path)
    assert (document.components, document.ranking) == ("mlp", "global")
    assert document.composite.attention in ("AttnLRP", "CP", "ZPlus")

    evaluated = json.loads(hpo("evaluate", "--composite", path, "--checkpoint", checkpoint, "--json").stdout)
    stored = json.loads(hpo("show", status["best"]["number"], "--json").stdout)
    assert evaluated["accuracies"] == stored["curve"]["accuracies"]

    message = "The document was made for `--components mlp`, but got heads; leave the option out."
    assert refused("evaluate", "--composite", path, "--checkpoint", checkpoint, "--components", "heads") == message

    report = tmp_path / "slim"
    options = "--repair", "none", "--coupled", "--checkpoint", checkpoint
    hpo("prune", path, "--rate", "0.6", *options, "-o", report)
    figures = json.loads((report / "report.json").read_text())
    assert figures["exact"]["accuracy"] == figures["masked_accuracy"] == figures["coupled"]["accuracy"]
    # Only the exact network loses the neurons that write to the stream.
    sizes = [figures[network]["parameters"] for network in ("exact", "coupled", "unpruned")]
    assert sizes == sorted(set(sizes))
    images = torch.rand(3, 1, 8, 8)
    slim = load_slim(report / "slim.safetensors")
    torch.testing.assert_close(torch.export.load(report / "slim.pt2").module()(images), slim(images))
    coupled = load_coupled(report / "coupled.safetensors", timm.create_model("vit_tiny_patch16_224", **OPTIONS).eval())
    torch.testing.assert_close(coupled(images), slim(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", [("--repair", "refit"), ("--space", "vit+repair")], ids=["refit", "searched"])
def test_a_study_of_all_components_with_repair_is_launched_exported_and_pruned(
    model, checkpoint, tmp_path, monkeypatch, asked
):
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{tmp_path / 'studies.db'}")
    hpo("launch", "--study", "vit", "--exact", *model, *QUICK, "--components", "all", *asked, "--n-trials", 2)
    path, report = tmp_path / "best.json", tmp_path / "slim"
    hpo("export", "vit", "-o", path)
    document = load_document(path)
    assert (document.components, document.ranking) == ("all", "kind")
    repair = document.repair
    assert repair == {"method": "refit", "strength": None} or "--repair" not in asked
    evaluated = json.loads(hpo("evaluate", "--composite", path, "--checkpoint", checkpoint, "--json").stdout)
    best = json.loads(hpo("status", "vit", "--json").stdout)["best"]
    assert best["repair"] == (None if "--repair" in asked else str(RepairSpec(**repair)))
    assert evaluated["accuracies"] == json.loads(hpo("show", best["number"], "--json").stdout)["curve"]["accuracies"]
    assert evaluated["repair"] == repair

    said = hpo("prune", path, "--rate", "0.6", "--checkpoint", checkpoint, "-o", report).stdout
    figures = json.loads((report / "report.json").read_text())
    assert figures["repair"]["method"] == ("refit" if repair["method"] == "none" else repair["method"])
    assert figures["exact"]["accuracy"] == figures["masked_accuracy"]
    strengths = figures["repair"]["strength"]
    if figures["repair"]["method"] == "refit":
        layers = [f"blocks.{i}.{name}" for i in range(4) for name in ("attn.proj", "mlp.fc2")]
        assert set(strengths) == {*layers, "head"}
        least, most = min(strengths.values()), max(strengths.values())
        assert f"strength {least:.3g} to {most:.3g} by layer" in said
    images = torch.rand(3, 1, 8, 8)
    slim = load_slim(report / "slim.safetensors")
    torch.testing.assert_close(torch.export.load(report / "slim.pt2").module()(images), slim(images))


def test_wrong_use_ends_in_one_line(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{tmp_path / 'studies.db'}")
    rules = "LLR=Epsilon,MLL=Epsilon,HLL=Epsilon,FCL=Epsilon"
    assert "`--space cnn` lack a rule for it; pass `--space vit`." in refused(
        "launch", *model, *QUICK, "--space", "cnn"
    )
    assert "pass `--space cnn`." in refused("launch", "--space", "vit", "--n-trials", 1)
    assert "attention, but the composite has no rule" in refused("evaluate", *model, *QUICK, "--heuristic", "epsilon")
    assert "the network has no attention" in refused("evaluate", "--heuristic", "epsilon-cp")
    assert "`--components heads` is for vision transformers" in refused(
        "evaluate", "--heuristic", "epsilon", "--components", "heads"
    )
    assert "pass `--space cnn`." in refused("launch", "--space", "vit+repair", "--n-trials", 1)
    unknown = refused("evaluate", *model, *QUICK, "--rules", rules, "--attention", "CPP")
    assert unknown == "Unknown attention rule 'CPP'. Did you mean 'CP'? Known: AttnLRP, CP, ZPlus."
    shallow = [part.replace("depth=4", "depth=3") if isinstance(part, str) else part for part in model]
    path = shallow[shallow.index("--checkpoint") + 1] = tmp_path / "shallow.safetensors"
    network = timm.create_model("vit_tiny_patch16_224", **{**OPTIONS, "depth": 3})
    safetensors.torch.save_file(network.state_dict(), path)
    few = refused("evaluate", *shallow, *QUICK, "--heuristic", "epsilon-cp")
    assert "has 3 blocks, but its groups need at least 4" in few
    assert not (tmp_path / "studies.db").exists()


def test_an_attention_that_is_not_known_ends_in_one_line(tmp_path):
    path = tmp_path / "mobilevit.safetensors"
    network = timm.create_model("mobilevitv2_050", in_chans=1, num_classes=10)
    safetensors.torch.save_file(network.state_dict(), path)
    size = ["--size", 64, "--mean", "0.3", "--std", "0.4"]
    model = ["--model", "mobilevitv2_050", "--model-option", "in_chans=1", "--model-option", "num_classes=10"]
    assert refused("evaluate", *model, "--checkpoint", path, *size, *QUICK, "--heuristic", "epsilon-cp") == (
        "The step 'permute' in module 'stages.2.1' has no relevance rule here, so the network can't be attributed "
        "correctly."
    )


def test_rules_of_the_command_line_with_attention(model):
    rules = "LLR=Epsilon,MLL=Epsilon,HLL=Epsilon,FCL=Epsilon"
    named = hpo("evaluate", *model, *QUICK, "--heuristic", "epsilon-attnlrp-abs", "--json")
    given = hpo("evaluate", *model, *QUICK, "--rules", rules, "--abs", "--attention", "AttnLRP", "--json")
    one, other = (json.loads(result.stdout) for result in (named, given))
    assert one["composite"] == other["composite"]
    assert one["accuracies"] == other["accuracies"]


@pytest.mark.parametrize("components", ["mlp", "heads"])
@pytest.mark.parametrize("name", ["weight", "taylor", "integrated-gradients", "random-0", "alpha1-beta0-cp-abs"])
def test_evaluate_takes_baselines_of_transformers(model, name, components):
    options = "--heuristic", name, "--components", components, "--json"
    result = json.loads(hpo("evaluate", *model, *QUICK, *options).stdout)
    assert result["composite"] == TRANSFORMER_BASELINES[name].to_json()
    assert len(result["accuracies"]) == 3
