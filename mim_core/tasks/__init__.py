"""Downstream tasks by name: what judges an encoder."""

from mim_core.spec import Table
from mim_core.tasks.classify import Classify

TASKS: Table = {"classify": Classify}
