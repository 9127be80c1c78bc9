"""Pretrain a row: train, publish, record. `python -m flows.pretrain ROW`."""

from __future__ import annotations

from prefect import flow

from flows import rows
from flows.stage import Stage, begun, command, tokenizer_of
from flows.training import Training, run

PRETRAINING = Training(
    kind="pretrain",
    weights=("encoder.safetensors", "model.safetensors"),
    pictures={
        "gallery.png": "Reconstructions under the row's masks",
        "recovery.png": "Recovered images under random masks and, where pixels are labelled, masks on objects",
    },
    metrics=(
        "loss", "critic_loss", "validation_loss", "hole_psnr", "hidden_share", "avg_distance_px", "steps",
        "images_seen", "images_per_s", "seconds", "parameters", "encoder_parameters",
    ),
    registered="encoder.safetensors",
)  # fmt: skip


def checked(row: str) -> Stage:
    """Check all that can be checked before work starts, the tokenizer's file too; raises UserError."""
    return Stage("pretrain", row, rows.PRETRAIN, tokenizer_of)


@flow(name="pretrain", flow_run_name="pretrain {row}")
def pretrain(row: str) -> None:
    """Pretrain one row of params/pretrain.yaml."""
    stage = begun(checked, row)
    run(stage, PRETRAINING, fitted=str(stage.start.file) if stage.start else None)


if __name__ == "__main__":
    command("pretrain", checked, pretrain)
