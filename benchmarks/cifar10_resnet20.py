"""The whole grid on CIFAR-10 with ResNet-20: 512 composites, 10 references a class, 1,000 evaluation images.

    python benchmarks/cifar10_resnet20.py

A resumable study through the command line: stop it and start it again as you like. It needs the data pack
(`HPO_DATA_PACK`, by default `../shared/data` beside the repository) and about an hour of one core; the search evaluates
in bfloat16, confirmation in float32. Prints the ten best and the comparison with the heuristics, and writes them and
the AUC of every composite to `benchmarks/results/cifar10_resnet20.json`.
"""

from __future__ import annotations

from pathlib import Path

from data_pack import cifar10, data_pack
from studies import run

STUDY = "cifar10_resnet20"


def main() -> None:
    """Runs the study, or what is left of it, and prints its results."""
    pack = data_pack()
    space = str(Path(__file__).with_suffix(".toml"))
    network = ["--model", "cifar_resnet20", "--checkpoint", str(pack / "weights" / "cifar10_resnet20.safetensors")]
    network += ["--data", cifar10(pack)]
    run(STUDY, ["--sampler", "grid", "--exact", "--space", space, "--dtype", "bf16"], network)


if __name__ == "__main__":
    main()
