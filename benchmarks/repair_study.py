"""A search for the composite that prunes best with refit: CIFAR ResNet-20, 120 trials of TPE, 10 rates.

    python benchmarks/repair_study.py

A resumable study through the command line: stop it and start it again as you like. Trials race; every heuristic is
measured wholly with refit, and confirmed with it beside the best composite. It needs the data pack (`HPO_DATA_PACK`, by
default `../shared/data` beside the repository) and an hour of one core; the search evaluates in bfloat16,
confirmation in float32. Writes `benchmarks/results/repair_study.json`.
"""

from __future__ import annotations

from pathlib import Path

from data_pack import cifar10, data_pack
from studies import run

STUDY = "repair_study"


def main() -> None:
    """Runs the study, or what is left of it, and prints its results."""
    pack = data_pack()
    network = ["--model", "cifar_resnet20", "--checkpoint", str(pack / "weights" / "cifar10_resnet20.safetensors")]
    network += ["--data", cifar10(pack), "--repair", "refit", "--rates", "0:0.9:0.1"]
    search = ["--sampler", "tpe", "--n-trials", "120", "--pruner", "race", "--dtype", "bf16"]
    run(STUDY, [*search, "--space", str(Path(__file__).with_suffix(".toml"))], network)


if __name__ == "__main__":
    main()
