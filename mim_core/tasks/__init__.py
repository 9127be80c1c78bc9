"""Downstream tasks by name: what judges an encoder."""

from mim_core.spec import Table
from mim_core.tasks.classify import Classify
from mim_core.tasks.detect.detect import Detect
from mim_core.tasks.knn import Knn
from mim_core.tasks.probe import Probe
from mim_core.tasks.segment.segment import Segment

TASKS: Table = {"classify": Classify, "probe": Probe, "knn": Knn, "segment": Segment, "detect": Detect}
