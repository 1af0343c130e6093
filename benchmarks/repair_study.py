"""Searches for the composite that prunes best with refit: CIFAR ResNet-20, 10 rates.

    python benchmarks/repair_study.py tpe|grid

`tpe` has 120 trials in a space of 1,024 composites, `grid` tries all 24 of a small one. Resumable studies through the
command line: stop one and start it again as you like. Trials race; every heuristic is measured wholly with refit, and
confirmed with it beside the best composite. It needs the data pack (`HPO_DATA_PACK`, by default `../shared/data` beside
the repository) and an hour of one core; the search evaluates in bfloat16, confirmation in float32. Writes
`benchmarks/results/repair_study_tpe.json` or `..._grid.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from data_pack import cifar10, data_pack
from studies import run

SAMPLERS = {"tpe": ["--n-trials", "120"], "grid": []}


def main(sampler: str) -> None:
    """Runs the study, or what is left of it, and prints its results."""
    pack = data_pack()
    name = f"repair_study_{sampler}"
    network = ["--model", "cifar_resnet20", "--checkpoint", str(pack / "weights" / "cifar10_resnet20.safetensors")]
    network += ["--data", cifar10(pack), "--repair", "refit", "--rates", "0:0.9:0.1"]
    search = ["--sampler", sampler, *SAMPLERS[sampler], "--pruner", "race", "--dtype", "bf16"]
    run(name, [*search, "--space", str(Path(__file__).with_name(f"{name}.toml"))], network)


if __name__ == "__main__":
    given = sys.argv[1:]
    if len(given) != 1 or given[0] not in SAMPLERS:
        sys.exit(f"Usage: python {Path(__file__).name} {'|'.join(SAMPLERS)}")
    main(given[0])
