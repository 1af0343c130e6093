"""The whole grid on CIFAR-10 with a vision transformer: 1,536 composites, 10 references a class, 1,000 images.

    python benchmarks/cifar10_vit.py [mlp|heads]

The network is the data pack's: 4 blocks of 4 heads, 128 channels, 1,536 neurons in its MLPs. Trials race against the
best one so far, confirmation is exact. A resumable study through the command line: stop it and start it
again as you like. It needs the data pack (`HPO_DATA_PACK`, by default `../shared/data` beside the repository) and hours
of one core; the search evaluates in bfloat16, confirmation in float32. Writes the ten best, the heuristics and the
confirmation to `benchmarks/results/cifar10_vit_mlp.json` or `..._heads.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data_pack import data_pack

HERE = Path(__file__).resolve().parent
NETWORK = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2,
    "num_classes": 10,
}
COMPONENTS = ("mlp", "heads")
N_BEST = 10


def main(components: str) -> None:
    """Runs the study, or what is left of it, and prints its results."""
    from hpo.cli import cli
    from storage.store import StudyStore

    pack, name = data_pack(), f"cifar10_vit_{components}"
    url = f"sqlite:///{HERE / 'results' / name}.db"
    launch = ["launch", "--study", name, "--storage", url, "--sampler", "grid", "--components", components]
    launch += ["--space", str(HERE / "cifar10_vit.toml"), "--dtype", "bf16", "--evaluation-images", "1000"]
    launch += ["--model", "vit_tiny_patch16_224"]
    launch += [part for key, value in NETWORK.items() for part in ("--model-option", f"{key}={value}")]
    launch += ["--checkpoint", str(pack / "weights" / "cifar10_vit_p4_d128_l4_h4.safetensors")]
    launch += ["--size", "32", "--crop", "1", "--mean", "0.4914,0.4822,0.4465", "--std", "0.2470,0.2435,0.2616"]
    launch += ["--data", f"npz:{pack / 'cifar10' / 'train_10k.npz'},{pack / 'cifar10' / 'test_dev.npz'}"]
    if status := cli(launch, prog_name="hpo", standalone_mode=False):
        sys.exit(status)  # interrupted: the same command goes on
    with StudyStore.open(url, read_only=True) as store:
        study = store.load(name)
        finished = [trial for trial in study.trials if trial.value is not None]
        searched = sorted((t for t in finished if t.user_attrs["role"] == "search"), key=lambda t: -t.value)
        result = {
            "best": [{"trial": t.number, "auc": t.value, **t.params} for t in searched[:N_BEST]],
            "heuristics": {t.user_attrs["heuristic"]: t.value for t in finished if t.user_attrs["role"] == "heuristic"},
            "confirmation": study.user_attrs.get("confirmation"),
            "n_trials": sum(t.user_attrs.get("role") == "search" for t in study.trials),
            "n_evaluated": len(searched),
        }
    (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"The {N_BEST} best of {result['n_trials']} composites:")
    for row in result["best"]:
        rules = "/".join(row[group] for group in ("LLR", "MLL", "HLL", "FCL"))
        print(f"  {row['auc']:.4f}  {rules}  attention={row['attention']}  abs={row['abs']}")


if __name__ == "__main__":
    given = sys.argv[1:] or COMPONENTS[:1]
    if len(given) != 1 or given[0] not in COMPONENTS:
        sys.exit(f"Usage: python {Path(__file__).name} [{'|'.join(COMPONENTS)}]")
    main(given[0])
