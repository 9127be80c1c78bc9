"""The registered encoder as MLflow serves it: uint8 images in, one feature vector an image out.

MLflow runs this file to make the model, so that nothing is pickled: weights come from a safetensors file whose header
says how to build the encoder and normalise its images.
"""

from __future__ import annotations

from pathlib import Path

import mlflow
import numpy as np
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext

from mim_core.checkpoint import read_weights
from mim_core.encoders import ENCODERS
from mim_core.params import EncoderOf
from mim_core.spec import build, check
from mim_core.transforms import normalise


class Encoder(PythonModel):  # type: ignore[misc]
    """Embed images [n, H, W, c] of the pretraining size, in 0 to 255; gives the mean patch feature [n, d]."""

    def load_context(self, context: PythonModelContext) -> None:
        weights, about = read_weights(Path(context.artifacts["weights"]))
        piece = check(EncoderOf, {"encoder": about["encoder"]}, "weights").encoder
        self.about = about
        self.encoder = build(ENCODERS, piece, tuple(about["size"]), about["channels"]).eval()
        self.encoder.load_state_dict(weights)

    # No types here: MLflow reads hints of `predict` as the signature, which is given where the model is logged.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        images = torch.from_numpy(np.asarray(model_input)).permute(0, 3, 1, 2)
        with torch.inference_mode():
            inputs = normalise(images, tuple(self.about["mean"]), tuple(self.about["std"]))
            features = self.encoder(self.encoder.embed(inputs)).mean(1)
        return features.numpy()  # type: ignore[no-any-return]


mlflow.models.set_model(Encoder())
