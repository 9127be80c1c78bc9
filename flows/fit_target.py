"""Fit a tokenizer, whose tokens a method can then predict: train, publish, record. `python -m flows.fit_target ROW`."""

from __future__ import annotations

from prefect import flow

from flows.stage import Stage, begun, command
from flows.training import Training, run

FITTING = Training(
    kind="targets",
    weights=("tokenizer.safetensors",),
    pictures={"gallery.png": "Images over what their tokens keep of them"},
    metrics=(
        "loss", "psnr", "codes_used", "perplexity", "kl", "distance", "steps", "images_seen", "seconds", "parameters",
    ),
    # Rows of targets.yaml may have the names of pretrain rows.
    artifacts="tokenizer-",
)  # fmt: skip


def checked(row: str) -> Stage:
    """Check all that can be checked before work starts; raises UserError."""
    return Stage("fit_target", row, ("targets",))


@flow(name="fit_target", flow_run_name="fit_target {row}")
def fit_target(row: str) -> None:
    """Fit one row of params/targets.yaml."""
    run(begun(checked, row), FITTING)


if __name__ == "__main__":
    command("fit_target", checked, fit_target)
