"""The whole grid on CIFAR-10 with ResNet-20: 512 composites, 10 references a class, 1,000 evaluation images.

    python benchmarks/cifar10_resnet20.py

A resumable study through the command line: stop it and start it again as you like. It needs the data pack
(`HPO_DATA_PACK`, by default `../shared/data` beside the repository) and about an hour of one core; the search evaluates
in bfloat16, confirmation in float32. Prints the ten best, and writes them, the heuristics, the confirmation and the AUC
of every composite to `benchmarks/results/cifar10_resnet20.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data_pack import data_pack

HERE = Path(__file__).resolve().parent
STUDY = "cifar10_resnet20"
N_BEST = 10


def main() -> None:
    """Runs the study, or what is left of it, and prints its results."""
    from hpo.cli import cli
    from search_spaces.composites import CompositeSpec
    from storage.store import StudyStore

    pack = data_pack()
    url = f"sqlite:///{HERE / 'results' / STUDY}.db"
    launch = ["launch", "--study", STUDY, "--storage", url, "--sampler", "grid", "--exact"]
    launch += ["--space", str(HERE / f"{STUDY}.toml"), "--dtype", "bf16", "--evaluation-images", "1000"]
    launch += ["--model", "cifar_resnet20", "--checkpoint", str(pack / "weights" / "cifar10_resnet20.safetensors")]
    launch += ["--data", f"npz:{pack / 'cifar10' / 'train_10k.npz'},{pack / 'cifar10' / 'test_dev.npz'}"]
    if status := cli(launch, prog_name="hpo", standalone_mode=False):
        sys.exit(status)  # interrupted: the same command goes on
    with StudyStore.open(url, read_only=True) as store:
        study = store.load(STUDY)
        finished = [trial for trial in study.trials if trial.value is not None]
        searched = sorted((t for t in finished if t.user_attrs["role"] == "search"), key=lambda t: -t.value)
        result = {
            "best": [{"trial": t.number, "auc": t.value, **t.params} for t in searched[:N_BEST]],
            "heuristics": {t.user_attrs["heuristic"]: t.value for t in finished if t.user_attrs["role"] == "heuristic"},
            "confirmation": study.user_attrs.get("confirmation"),
            "n_searched": len(searched),
            "median_auc": searched[len(searched) // 2].value,
            "auc": {CompositeSpec.from_json(t.user_attrs["composite"]).label: t.value for t in searched},
        }
    (HERE / "results" / f"{STUDY}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"The {N_BEST} best of {len(searched)} composites:")
    for row in result["best"]:
        print(f"  {row['auc']:.4f}  {'/'.join(row[group] for group in ('LLR', 'MLL', 'HLL', 'FCL'))}  abs={row['abs']}")


if __name__ == "__main__":
    main()
