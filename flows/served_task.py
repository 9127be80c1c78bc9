"""A downstream row's model as MLflow serves it: image files in, what they show out.

    export MLFLOW_TRACKING_URI=http://127.0.0.1:5000
    mlflow models serve -m models:/scenes.classify@champion --env-manager local -h 127.0.0.1 -p 5001

    (printf '{"dataframe_records": [{"image": "'; base64 < photo.jpg | tr -d '\\n'; printf '"}]}') |
      curl -s http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' --data-binary @-

Several images are several records. MLflow takes JSON, CSV and Parquet, and answers raw bytes of an image with HTTP 415;
in Parquet (`application/vnd.apache.parquet`) the column `image` holds bytes, without base64.

MLflow runs this file to make the model, so that nothing is pickled: weights come from a safetensors file whose header
says how to build the model and read its images. A stage that logs the model runs it too: hence torch is imported where
weights are loaded.
"""

from __future__ import annotations

import base64
import binascii
import warnings
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image


class Answers(PythonModel):  # type: ignore[misc]
    """Answer of the image files in the column `image`: their bytes, or those in base64 as JSON has them.

    Gives a dict of plain values an image, in px of the file's image as its EXIF turns it. Where a file is no image that
    the model takes, all are refused (HTTP 400) and the message says which and why.
    """

    def load_context(self, context: PythonModelContext) -> None:
        from mim_core import inference

        self.plain = inference.plain
        self.model = inference.load_model(Path(context.artifacts["weights"]))
        # Requests are answered in threads, and Python changes the handling of warnings for all of them at once.
        warnings.simplefilter("error", Image.DecompressionBombWarning)

    # Of a bare table MLflow reads no signature; one is given where the model is logged. Without a hint it warns.
    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        from mim_core.data.images import RefusedError

        reads, faults = [], []
        for index, image in enumerate(model_input["image"]):
            try:
                reads.append(self.model.reader(_content(image)))
            except RefusedError as error:
                faults.append(f"image {index}: {error}")
        if faults:
            raise MlflowException("; ".join(faults), INVALID_PARAMETER_VALUE)
        return [self.plain(answer) for answer in self.model.answer(reads)]


def _content(image: Any) -> bytes:
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    from mim_core.data.images import RefusedError

    try:
        return base64.b64decode(str(image), validate=True)
    except binascii.Error as error:
        raise RefusedError(f"neither bytes nor base64 ({error})") from None


mlflow.models.set_model(Answers())
