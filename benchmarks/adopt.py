"""Take the trainings of an earlier `benchmarks.paper_scale` into a store, where a study finds them.

    python -m benchmarks.adopt runs/paper_e40 --study paper-scale --level forty --store runs/store

A run is taken if its config.yaml is what the study would train, but for where and how often it reports. Its records
stay where they are: their attacks have other seeds than those of a study, so they are no answers to its questions.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from learn2perturb.engine.identity import fingerprint_of_state
from learn2perturb.experiments.ledger import Ledger
from learn2perturb.experiments.store import MODEL, Finished, Store, run_address
from learn2perturb.experiments.study_file import read_study
from learn2perturb.experiments.tasks import data_address
from learn2perturb.runs.checkpoint import read_model
from learn2perturb.runs.files import checkpoints
from learn2perturb.training import TrainConfig, read_config, read_metrics


def main() -> None:
    """Copy what fits; say what was taken and what was not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path, help="its folder, with runs/")
    parser.add_argument("--study", default="paper-scale")
    parser.add_argument("--level", default="forty")
    parser.add_argument("--store", default="runs/store")
    given = parser.parse_args()
    ledger = Ledger(read_study(given.study, given.level), Store(given.store))
    wanted = {ledger.address(run): run for run in ledger.study.runs if run.config is not None}
    for folder in sorted((given.state / "runs").glob("*/")):
        config = TrainConfig.from_dict(read_config(folder / "config.yaml")).resolve()
        key = run_address(config, data_address(config.dataset, "train", config.data_dir, config.download))
        if key not in wanted:
            print(f"{folder.name}: the study trains nothing of its settings")
        elif (place := ledger.folder(wanted[key])).exists():
            print(f"{folder.name}: is there")
        else:
            shutil.copytree(folder, place)
            print(f"{folder.name}: {_finished(ledger.store, place, config)}")


def _finished(store: Store, folder: Path, config: TrainConfig) -> str:
    """Mark a training as finished if it is; return what to say."""
    lines = read_metrics(folder)
    model = folder / MODEL
    if not model.exists():
        found = checkpoints(folder)
        if not found or len(lines) < config.closed().epochs:
            return f"epoch {len(lines)} of {config.epochs}, to be gone on with"
        model = found[-1] / MODEL
    state, header = read_model(model)
    where = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    seconds = sum(float(line.get("seconds", 0)) for line in lines)
    store.finish(folder, model, Finished(fingerprint_of_state(state), header.get("step"), seconds, where))
    return "taken"


if __name__ == "__main__":
    main()
