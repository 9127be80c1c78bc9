"""Sources of datasets by name: each reads one form in which users have their images."""

from mim_core.data.folder import folder
from mim_core.data.scenes import scenes
from mim_core.spec import Table

SOURCES: Table = {"scenes": scenes, "folder": folder}
