import dataclasses
from pathlib import Path

import pytest

from hpo.config import OPTIONS, LaunchConfiguration, resolve
from hpo.errors import ConfigurationError
from objectives.pruning.rates import PruningRatesError
from search_spaces.errors import RepairSpecError
from search_spaces.procedures import Iterative, OneShot, PruneAndGrow, TaskRelevant
from search_spaces.repairs import RepairSpec
from search_spaces.task_splits import TaskSplit


@pytest.fixture(autouse=True)
def storage(monkeypatch, tmp_path):
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{tmp_path / 'default.db'}")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_are_the_embedded_digits():
    configuration = resolve({})
    assert (configuration.study, configuration.model, configuration.data) == ("digits", "digits_cnn", "digits")
    assert (configuration.sampler, configuration.n_trials, configuration.space) == ("tpe", 60, None)
    assert (configuration.metric, configuration.references_per_class) == ("auc", 10)
    assert (configuration.confirmation_share, configuration.evaluation_images) == (0.5, None)
    assert configuration.rates == tuple(round(0.05 * step, 2) for step in range(20))
    assert configuration.storage.endswith("default.db")


def test_other_data_have_a_hundred_trials_and_a_name_of_their_own():
    configuration = resolve({"model": "resnet18", "data": "folder:pictures/flowers"})
    assert (configuration.n_trials, configuration.study) == (100, "resnet18-flowers")


@pytest.mark.parametrize(
    ("model", "data", "name"),
    [
        ("cifar_resnet20", "npz:a/train.npz,a/eval.npz", "cifar_resnet20-eval"),
        ("my.nets:Tiny", "my.data:load", "Tiny-load"),
        ("vgg16", "timm:torch/cifar10", "vgg16-cifar10"),
        ("hf-hub:timm/resnet18", "folder:x/", "hf-hub-timm-resnet18-x"),
    ],
)
def test_study_names(model, data, name):
    assert resolve({"model": model, "data": data}).study == name


def test_a_grid_has_no_number_of_trials():
    assert resolve({"sampler": "grid"}).n_trials is None
    assert resolve({"sampler": "grid", "n_trials": "7"}).n_trials == 7


def test_command_line_over_file_over_fallback_over_default(tmp_path):
    file = write(tmp_path / "study.toml", 'seed = 1\nmetric = "top_rate"\n')
    configuration = resolve({"seed": "2"}, file, {"seed": 3, "metric": "auc_flops", "batch_size": 4})
    assert (configuration.seed, configuration.metric, configuration.batch_size) == (2, "top_rate", 4)
    assert configuration.confirmation_share == 0.5


def test_every_option_can_stand_in_a_file(tmp_path):
    file = write(
        tmp_path / "study.toml",
        """
        study = "s"
        storage = "sqlite:///x.db"
        space = "cnn"
        sampler = "random"
        n-trials = 3
        timeout = "2m"
        metric = "auc"
        pruner = "race"
        race-risk = 0.05
        components = "all"
        procedure = "dynamic"
        step-share = 0.1
        tolerance = 0.02
        search-width = 4
        rankings-per-step = 2
        evaluations-per-step = 30
        fixed-rate = true
        fixed-order = true
        ranking = "global"
        executor = "ray"
        workers = 2
        gpus-per-trial = 0.5
        cpus-per-trial = 2
        ray-address = "auto"
        trials-per-batch = 4
        trial-timeout = "10m"
        max-losses = 1
        store-timeout = 60
        model = "resnet18"
        checkpoint = "weights.pt"
        size = [32, 48]
        mean = [0.5, 0.5, 0.5]
        std = [0.2, 0.2, 0.2]
        crop = 0.9
        interpolation = "bilinear"
        data = "folder:flowers"
        classes = [3, "rose"]
        class-map = "map.json"
        references-per-class = 5
        sample = "first"
        evaluation-images = 50
        confirmation-share = 0.25
        seed = 9
        baselines = true
        rates = [0, 0.5]
        abs-scope = "element"
        output-relevance = "logit"
        dtype = "bf16"
        repair = "refit"
        repair-strength = 0.1
        batch-size = 7
        attribution = "zennit"
        attribution-memory = 64
        device = "cuda"
        [model-option]
        width = 2
        """,
    )
    other = write(
        tmp_path / "of-another-procedure.toml",
        """
        procedure = "prune_and_grow"
        core-share = 0.5
        finetune-epochs = 3
        finetune-learning-rate = 0.01
        finetune-batch-size = 8
        """,
    )
    third = write(
        tmp_path / "of-a-split.toml",
        """
        procedure = "task_relevant"
        pretrain-epochs = 0
        patience = 2
        [splits]
        scenario = "new_classes"
        P = ["cat"]
        F = ["dog"]
        """,
    )
    configuration = resolve({}, file)
    written = file.read_text() + other.read_text() + third.read_text()
    given = {name for name in OPTIONS if f"{name} =" in written} | {"model-option", "splits"}
    assert given == set(OPTIONS)
    assert resolve({}, other).procedure_spec() == PruneAndGrow(0.5, 0.2, 3, 0.01, 8)
    assert resolve({}, third).procedure_spec() == TaskRelevant(pretrain_epochs=0, patience=2)
    assert resolve({}, third).splits == TaskSplit("new_classes", T=(), P=("cat",), F=("dog",))
    assert (configuration.timeout_s, configuration.trial_timeout_s, configuration.store_timeout_s) == (120, 600, 60)
    assert (configuration.workers, configuration.gpus_per_trial, configuration.cpus_per_trial) == (2, 0.5, 2)
    assert (configuration.trials_per_batch, configuration.max_losses) == (4, 1)
    assert configuration.baselines is True
    assert configuration.size == (32, 48)
    assert configuration.classes == (3, "rose")
    assert configuration.rates == (0, 0.5)
    assert configuration.model_options == (("width", 2),)
    assert configuration.checkpoint == str(Path("weights.pt").absolute())
    assert configuration.data == f"folder:{Path('flowers').absolute()}"


def test_the_json_form_is_reversible():
    configuration = resolve(
        {"model": "resnet18", "data": "npz:a.npz,b.npz", "model_options": ("pad=same", "n=2"), "size": "8x9"}
    )
    assert LaunchConfiguration.from_json(configuration.to_json()) == configuration


def test_the_json_form_has_no_credentials():
    configuration = resolve({"storage": "postgresql://ann:secret@host/studies?password=other"})
    assert configuration.to_json()["storage"] == "postgresql://host/studies"
    assert "secret" not in repr(configuration)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=0.5", 0.5),
        ("a=True", True),
        ("a=false", False),
        ("a=same", "same"),
        ("a=[1, 2]", [1, 2]),
        ("a=", ""),
    ],
)
def test_model_options_have_types(text, value):
    assert resolve({"model_options": (text,)}).model_options == (("a", value),)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n_trials", "0", "`--n-trials` must be a whole number of at least 1, but got '0'."),
        ("n_trials", "many", "`--n-trials` must be a whole number of at least 1, but got 'many'."),
        ("timeout_s", "soon", "`--timeout` must be a duration above 0, such as 90, 90s, 30m or 2h, but got 'soon'."),
        ("metric", "auk", "Unknown metric 'auk'. Did you mean 'auc'? Known: auc, auc_flops, "),
        ("executor", "rey", "Unknown executor 'rey'. Did you mean 'ray'?"),
        ("workers", "2", "`--workers` is for workers of Ray; add `--executor ray`."),
        ("gpus_per_trial", "1", "`--gpus-per-trial` is for workers of Ray; add `--executor ray`."),
        ("cpus_per_trial", "1", "`--cpus-per-trial` is for workers of Ray; add `--executor ray`."),
        ("ray_address", "auto", "`--ray-address` is for workers of Ray; add `--executor ray`."),
        ("trial_timeout_s", "9", "`--trial-timeout` is for workers of Ray; add `--executor ray`."),
        ("workers", "0", "`--workers` must be a whole number of at least 1, but got '0'."),
        (
            "gpus_per_trial",
            "1.5",
            "`--gpus-per-trial` must be 0, a share of a GPU such as 0.25, or a whole number, but",
        ),
        ("cpus_per_trial", "0", "`--cpus-per-trial` must be a number of at least 0.01, but got '0'."),
        ("cpus_per_trial", "0.0001", "`--cpus-per-trial` must be a number of at least 0.01, but got '0.0001'."),
        ("ray_address", "ray://h:1", "`--ray-address` must be auto or HOST:PORT, but got 'ray://h:1'."),
        ("dtype", "fp16", "`--dtype` must be one of fp32, bf16, but got 'fp16'."),
        ("device", "gpu", "`--device` must be auto, cpu, cuda or cuda:N, but got 'gpu'."),
        ("confirmation_share", "1", "`--confirmation-share` must be a share of at least 0 and below 1, but got '1'."),
        ("crop", "0", "`--crop` must be a share above 0 and at most 1, but got '0'."),
        ("std", "0.1,0", "`--std` must hold numbers above 0, but got '0.1,0'."),
        ("mean", "x", "`--mean` must be a number, but got 'x'."),
        ("size", "8x8x8", "`--size` must be an edge in pixels such as 224, or HEIGHTxWIDTH such as 224x160, but got"),
        ("classes", "3", "`--classes` must name at least two classes, but got '3'."),
        ("classes", "3,3", "`--classes` must name each class once, but got '3,3'."),
        ("classes", "3,,4", "`--classes` must be class indices or class names separated by commas, but got '3,,4'."),
        ("model_options", ("a",), "`--model-option` must be NAME=VALUE, for example pad_type=same, but got 'a'."),
        ("seed", "-1", "`--seed` must be a whole number of at least 0, but got '-1'."),
        ("study", "a/b", "`--study` must not hold slashes or line breaks, but got 'a/b'."),
        ("model", "resnet18", "`--model resnet18` needs images: pass `--data`, for example `--data folder:DIR`."),
        ("data", "folder:x", "`--data folder:x` needs a network: pass `--model`, for example `--model resnet18`."),
    ],
)
def test_bad_values_are_named_with_the_remedy(field, value, message):
    with pytest.raises(ConfigurationError) as caught:
        resolve({field: value})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:1"}, "Ray chooses each worker's GPU, so `--device cuda:1` cannot hold; write cuda."),
        (
            {"device": "cpu", "gpus_per_trial": "0.5"},
            "`--gpus-per-trial 0.5` contradicts `--device cpu`; leave one out.",
        ),
        ({"device": "cuda", "gpus_per_trial": 0}, "`--gpus-per-trial 0` contradicts `--device cuda`; leave one out."),
    ],
)
def test_ray_chooses_gpus(options, message):
    with pytest.raises(ConfigurationError) as caught:
        resolve({"executor": "ray", **options})
    assert str(caught.value) == message


def test_samplers_that_do_not_learn_have_large_batches():
    sizes = {sampler: resolve({"sampler": sampler}).trials_per_batch for sampler in ("grid", "random", "tpe")}
    assert sizes == {"grid": 8, "random": 8, "tpe": 1}
    assert resolve({"sampler": "grid", "trials_per_batch": "2"}).trials_per_batch == 2


@pytest.mark.parametrize("rates", ["0.1,0.5", "0,0.5,0.5", "0:1:0.1", "0", "x"])
def test_rates_must_increase_from_0(rates):
    with pytest.raises(PruningRatesError):
        resolve({"rates": rates})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n_trails = 3", "Unknown key 'n_trails' in '{file}'. Did you mean 'n-trials'?"),
        ("n-trials = true", "Key 'n-trials' of '{file}' must be a whole number of at least 1, but got True."),
        ("seed = 1.5", "Key 'seed' of '{file}' must be a whole number of at least 0, but got 1.5."),
        ("seed = ", "Configuration file '{file}' is not TOML: "),
    ],
)
def test_bad_files_are_named_with_the_remedy(tmp_path, content, message):
    file = write(tmp_path / "study.toml", content)
    with pytest.raises(ConfigurationError) as caught:
        resolve({}, file)
    assert str(caught.value).startswith(message.format(file=file))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"Cannot read configuration file '.*nowhere\.toml': No such file"):
        resolve({}, tmp_path / "nowhere.toml")


@pytest.mark.parametrize("repair", ["none", "bn", "refit"])
@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_repair_that_is_given_has_no_strength_of_a_documents(tmp_path, repair, in_a_file):
    saved = {"repair": "refit", "repair_strength": 0.1}
    given, file = {"repair": repair}, None
    if in_a_file:
        given, file = {}, write(tmp_path / "study.toml", f'repair = "{repair}"')
    assert resolve(given, file, saved).repair_spec() == RepairSpec(repair)
    assert resolve({}, None, saved).repair_spec() == RepairSpec("refit", 0.1)
    assert resolve({"repair_strength": 2.0}, None, saved).repair_spec() == RepairSpec("refit", 2.0)


def test_a_strength_without_a_repair_is_refused_before_anything_is_loaded():
    message = r"^Repair none takes no strength, but got 1\.0; choose bn or refit, or omit it\.$"
    with pytest.raises(RepairSpecError, match=message):
        resolve({"repair": "none", "repair_strength": 1.0})


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve({}).seed = 1


def test_a_flag_of_the_file_is_true_or_false(tmp_path):
    assert resolve({}).baselines is False
    assert resolve({"baselines": True}, write(tmp_path / "off.toml", "baselines = false")).baselines is True
    with pytest.raises(ConfigurationError, match=r"Key 'baselines' of '.*' must be true or false, but got 'no'"):
        resolve({}, write(tmp_path / "no.toml", 'baselines = "no"'))


def test_a_procedure_has_its_own_options(tmp_path):
    assert resolve({}).procedure_spec() == OneShot()
    assert resolve({"procedure": "iterative"}).procedure_spec() == Iterative()
    assert resolve({"procedure": "iterative", "step_share": "0.1"}).procedure_spec() == Iterative(0.1)
    with pytest.raises(ConfigurationError) as caught:
        resolve({"step_share": 0.1})
    assert str(caught.value) == (
        "`--step-share` is for `--procedure iterative or dynamic or prune_and_grow or task_relevant`, but the "
        "procedure is one_shot; leave one out."
    )
    with pytest.raises(ConfigurationError, match=r"^`--fixed-rate` is for `--procedure dynamic`, but"):
        resolve({"procedure": "iterative", "fixed_rate": True})
    for bad in (0, 1.5, "all"):
        with pytest.raises(ConfigurationError, match=r"^`--step-share` must be a "):
            resolve({"procedure": "iterative", "step_share": bad})
    with pytest.raises(ConfigurationError, match=r"^`--procedure` must be one of one_shot, iterative, dynamic, prune"):
        resolve({"procedure": "iterativ"})


def test_prune_and_grow_trains_unless_told_otherwise():
    given = {"procedure": "prune_and_grow", "core_share": "0.5", "finetune_learning_rate": "0.01"}
    spec = resolve(given).procedure_spec()
    assert spec == PruneAndGrow(0.5, finetune_learning_rate=0.01)
    assert resolve({"procedure": "prune_and_grow", "repair": "bn"}).repair_spec() == RepairSpec("bn")
    with pytest.raises(ConfigurationError, match=r"^`--core-share` must be a share of at least 0\.0001 and below 1"):
        resolve({"procedure": "prune_and_grow", "core_share": "1"})


def test_task_relevant_pruning_has_the_papers_defaults():
    split = {"scenario": "new_classes", "T": ["bird"], "P": ["cat"], "F": ["dog"]}
    configuration = resolve({"procedure": "task_relevant", "splits": split})
    assert configuration.procedure_spec() == TaskRelevant()
    usual = (configuration.ranking, configuration.abs_scope, configuration.output_relevance, configuration.metric)
    assert usual == ("layer", "element", "logit", "auc_parameters")
    assert configuration.references_per_class == 100
    assert len(configuration.rates) == 11
    assert configuration.rates[:3] == (0, 0.2, 0.36)
    own = {"metric": "auc", "ranking": "global", "rates": "0,0.5", "step_share": "0.5"}
    chosen = resolve({"procedure": "task_relevant", "splits": split, **own})
    assert (chosen.metric, chosen.ranking, chosen.rates) == ("auc", "global", (0, 0.5))
    saved = configuration.to_json()
    assert saved["splits"] == split
    assert LaunchConfiguration.from_json(saved) == configuration
    # Another procedure takes neither the split nor the options of a document's.
    fallback = {"procedure": "task_relevant", "splits": split, **TaskRelevant().options}
    assert resolve({"procedure": "one_shot"}, fallback=fallback).splits is None


def test_a_documents_options_are_of_its_own_procedure():
    saved = {"procedure": "iterative", "step_share": 0.1}
    assert resolve({}, fallback=saved).procedure_spec() == Iterative(0.1)
    assert resolve({"step_share": 0.2}, fallback=saved).procedure_spec() == Iterative(0.2)
    assert resolve({"procedure": "iterative"}, fallback=saved).procedure_spec() == Iterative(0.1)
    assert resolve({"procedure": "one_shot"}, fallback=saved).procedure_spec() == OneShot()
    tuned = {**saved, **Iterative(0.1, 2).options}
    assert resolve({}, fallback=tuned).procedure_spec() == Iterative(0.1, 2)
    assert resolve({"finetune_epochs": 0}, fallback=tuned).procedure_spec() == Iterative(0.1)
    assert resolve({"procedure": "one_shot"}, fallback=tuned).procedure_spec() == OneShot()
