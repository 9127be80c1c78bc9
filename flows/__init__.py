"""Flows: what DVC's stages run, with Prefect, MLflow and the servers round the core.

The tools' environment is settled here, before any of them is imported: Prefect reads its settings at import.
"""

import contextlib
import gc

from flows import servers, workspace

# What Prefect and MLflow make when they are imported lives on; to look for garbage among it took a fifth of the time.
gc.set_threshold(100_000)

with contextlib.suppress(workspace.UserError):  # outside a workspace only `--help` works, which needs none of them
    servers.apply()
