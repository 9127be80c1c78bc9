"""Published weights: read, recognised, brought under our names; and our encoders under timm's.

`import_file` and `export_row` work on files; `read_state`, `convert`, `model` and `tokenizer` are the steps of the
first, `to_timm` and `create_call` of the second. `from_timm` takes timm's pretrained models by name.
"""

from mim_core.published.cached import PREFIX, from_timm
from mim_core.published.export import create_call, to_timm
from mim_core.published.files import Report, export_row, import_file
from mim_core.published.imported import Imported, model, tokenizer
from mim_core.published.read import read_state
from mim_core.published.recognise import convert

__all__ = [
    "PREFIX",
    "Imported",
    "Report",
    "convert",
    "create_call",
    "export_row",
    "from_timm",
    "import_file",
    "model",
    "read_state",
    "to_timm",
    "tokenizer",
]
