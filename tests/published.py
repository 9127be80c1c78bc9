"""A workspace with published runs of known numbers, for the tests of what reads them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from flows import workspace
from mim_core.params import EncoderOf
from mim_core.spec import check
from mim_core.tasks.task import tuned

ENCODER = {"name": "vit", "patch_px": 4, "width": 48, "depth": 2, "heads": 3}
TUNE = {"batch": 128, "epochs": 15}
CLUSTERS = {"name": "clusters", "fitted": "colours", "cell_px": 2}
OPTIM = {"lr": 1.0e-3, **TUNE}
JUDGED = {
    "task": {"name": "classify", "smoothing": 0.1},
    "data": "scenes",
    "lr_grid": [5.0e-4, 1.0e-3, 2.0e-3],
    "optim": TUNE,
}
MD5 = "d41d8cd98f00b204e9800998ecf8427e.dir"
RATES = {5.0e-4: 0.20, 1.0e-3: 0.30, 2.0e-3: 0.25}
PIECES = {
    "mask": {"name": "random", "ratio": 0.6, "unit_px": 8},
    "fill": "mask_token",
    "encoder": ENCODER,
    "head": "linear",
    "target": "pixels",
    "loss": "l1",
}


class Published:
    """Writes rows and runs as the stages do; `rows()` has to come first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "params").mkdir(parents=True)
        (root / "dvc.yaml").write_text("stages: {}\n")
        self.encoders: dict[str, Any] = {}

    def rows(
        self,
        pretrain: Sequence[str] | Mapping[str, Any],
        baselines: Mapping[str, Any],
        downstream: Mapping[str, Any],
        data: str = "scenes",
        fitted: Mapping[str, Any] | None = None,
        laboratory: Mapping[str, Any] | None = None,
    ) -> None:
        """Write params; a row's value holds what differs from the common row.

        `fitted` rows predict the colours of the palette `colours`, which is there when they are. `laboratory` holds
        sections of ablations and searches.
        """
        own = pretrain if isinstance(pretrain, Mapping) else {row: {} for row in pretrain}
        common = {"data": data, **PIECES, "optim": OPTIM}
        files = {
            "data.yaml": {"data": {data: {"source": {"name": "scenes", "train": 12000}}}},
            "targets.yaml": {
                "targets": {"colours": {"data": data, "tokenizer": {"name": "palette", "codes": 8}}} if fitted else {}
            },
            "pretrain.yaml": {
                "pretrain_fitted": {
                    row: {**common, "target": CLUSTERS, "loss": "cross_entropy", **one}
                    for row, one in (fitted or {}).items()
                },
                "pretrain": {row: {**common, **one} for row, one in own.items()},
            },
            "downstream.yaml": {
                "supervised": {},
                "continued": {},
                "baselines": {
                    row: {**JUDGED, "init": "scratch", "encoder": ENCODER, **one} for row, one in baselines.items()
                },
                "downstream": {row: {**JUDGED, **one} for row, one in downstream.items()},
            },
        }
        laboratory = laboratory or {}
        for name, sections in (
            ("ablations", ("ablations_fitted", "ablations")),
            ("search", ("search_fitted", "search")),
        ):
            files[f"{name}.yaml"] = {section: dict(laboratory.get(section, {})) for section in sections}
        begun = {**files["pretrain.yaml"]["pretrain_fitted"], **files["pretrain.yaml"]["pretrain"]}
        for row, one in files["downstream.yaml"]["baselines"].items():
            self.encoders[row] = one["encoder"]
        for row, one in files["downstream.yaml"]["downstream"].items():
            self.encoders[row] = begun[one["init"]]["encoder"]
        for name, content in files.items():
            (self.root / "params" / name).write_text(yaml.safe_dump(content, sort_keys=False))

    def pack(self, name: str = "scenes", quarantined: Sequence[Mapping[str, str]] = ()) -> None:
        meta = {
            "name": name,
            "md5": MD5,
            "row": {"source": {"name": "scenes", "seed": 0}},
            "channels": 3,
            "size": [32, 32],
            "classes": [str(digit) for digit in range(10)],
            "counts": {"train": 12000, "validation": 1000, "test": 2000},
            "annotations": ["boxes", "instances", "labels"],
            "segments": [],
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "quarantined": list(quarantined),
        }
        self._json(self.root / "packs" / name / "meta.json", meta)

    def tokenizer(self, row: str = "colours", hours: float = 0.25, **manifest: Any) -> None:
        folder = self.root / "runs" / "targets" / row
        metrics = {"psnr": 27.5, "codes_used": 0.875, "perplexity": 6.2, "parameters": 0, "seconds": 3600 * hours}
        self._manifest(folder, "fit_target", row, hours, metrics, manifest)
        Image.new("RGB", (64, 32), "grey").save(folder / "gallery.png")

    def pretrained(
        self, row: str, hours: float = 0.5, lines: int = 41, without: Sequence[str] = (), **manifest: Any
    ) -> None:
        folder = self.root / "runs" / "pretrain" / row
        metrics = {
            "loss": 0.21, "validation_loss": 0.22, "hole_psnr": 17.9, "seconds": 3600 * hours, "images_seen": 180000,
            "images_per_s": 412.0, "parameters": 2700000, "steps": 1400, "hidden_share": 0.59, "avg_distance_px": 2.345,
            "encoder_parameters": 2600000,
        }  # fmt: skip
        for key in without:
            del metrics[key]
        self._manifest(folder, "pretrain", row, hours, {**metrics}, manifest)
        self._json(folder / "metrics.json", metrics)
        keys = ["step", "seconds", "loss", "grad_norm", "lr", "images_per_s", "validation_loss", "hole_psnr"]
        with (folder / "curve.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, keys)
            writer.writeheader()
            for index in range(lines):
                step = 1 + 35 * index
                writer.writerow({"step": step, "seconds": step, "loss": 0.2 + 8 / (step + 10), "lr": 1e-3})
                if index % 5 == 0:
                    told = {"validation_loss": 0.21 + 8 / (step + 10), "hole_psnr": 18 - 60 / (step + 10)}
                    kept = {key: value for key, value in told.items() if key not in without}
                    writer.writerow({"step": step, "seconds": step, **kept})
        for name in ("gallery.png", "recovery.png"):
            Image.new("RGB", (64, 32), "grey").save(folder / name)

    def judged(
        self,
        row: str,
        init: str,
        accuracies: Mapping[int, float],
        labels: int | None = 1000,
        lr: float = 1.0e-3,
        hours: float = 0.1,
        rates: Mapping[float, float] = RATES,
        **manifest: Any,
    ) -> None:
        folder = self.root / "runs" / "downstream" / row
        first = next(iter(accuracies))
        results = {
            "task": JUDGED["task"], "metric": "accuracy", "encoder": self._tuned(row),
            "init": init, "labels": labels, "data": "scenes", "lr": lr,
            "grid": [{"lr": rate, "seed": first, "validation_score": one} for rate, one in rates.items()],
            "seeds": [
                {"seed": seed, "lr": lr, "validation_score": value, "test_score": value, "seconds": 9.0}
                for seed, value in accuracies.items()
            ],
        }  # fmt: skip
        self._manifest(folder, "downstream", row, hours, {"lr": lr}, manifest)
        self._json(folder / "results.json", results)

    def _tuned(self, row: str) -> Any:
        """The encoder as the job writes it."""
        piece = check(EncoderOf, {"encoder": self.encoders[row]}, row).encoder
        return tuned(piece, 0.0).model_dump(mode="json")

    def _manifest(
        self, folder: Path, stage: str, row: str, hours: float, metrics: Mapping[str, Any], changed: Mapping[str, Any]
    ) -> None:
        manifest = {
            "stage": stage, "row": row, "params": {}, "params_hash": "0" * 32, "parents": [],
            "data": {"name": "scenes", "md5": MD5},
            "git": {"commit": "a" * 40, "dirty": False}, "code": workspace.code_fingerprint(),
            "versions": {"python": "3.11"}, "compute": {"device": "cpu", "type": "cpu", "precision": "bf16"},
            "started": 0.0, "wall_seconds": 1800 * hours, "device_hours": hours, "images_seen": 180000,
            "metrics": metrics, "mlflow_run_id": f"{stage}{row}".encode().hex().ljust(32, "0")[:32],
            "prefect_flow_run_id": "11111111-2222-3333-4444-555555555555",
        }  # fmt: skip
        self._json(folder / "manifest.json", {**manifest, **changed})

    def _json(self, path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
