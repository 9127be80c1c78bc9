"""Flows: what DVC's stages run, with Prefect, MLflow and the servers round the core.

The tools' environment is settled here, before any of them is imported: Prefect reads its settings at import.
"""

from flows import servers, workspace

try:
    servers.apply()
except workspace.UserError:
    pass  # outside a workspace only `--help` works, and it needs none of the tools
