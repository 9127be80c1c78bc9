"""The registered encoder as MLflow serves it: uint8 images in, one feature vector an image out.

MLflow runs this file to make the model, so that nothing is pickled: weights come from a safetensors file whose header
says how to build the encoder and normalise its images. A stage that logs the model runs it too: hence torch is imported
where weights are loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel, PythonModelContext


class Encoder(PythonModel):  # type: ignore[misc]
    """Embed images [n, H, W, c] of the pretraining size, in 0 to 255; gives the mean patch feature [n, d]."""

    def load_context(self, context: PythonModelContext) -> None:
        from mim_core import inference

        self.encoder = inference.load_encoder(Path(context.artifacts["weights"]))

    # Of a bare array MLflow reads no signature; one is given where the model is logged. Without a hint it warns.
    def predict(
        self, context: PythonModelContext, model_input: np.ndarray, params: dict[str, Any] | None = None
    ) -> np.ndarray:
        import torch

        return self.encoder.features(torch.from_numpy(np.asarray(model_input)).permute(0, 3, 1, 2))


mlflow.models.set_model(Encoder())
