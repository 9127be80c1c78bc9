"""Flows: what DVC's stages run, with Prefect, MLflow and the servers round the core.

The tools' environment is settled here, before any of them is imported: Prefect reads its settings at import.
"""

import contextlib

from flows import servers, workspace

with contextlib.suppress(workspace.UserError):  # outside a workspace only `--help` works, which needs none of them
    servers.apply()
