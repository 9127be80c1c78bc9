"""Sources of datasets by name: each reads one form in which users have their images."""

from mim_core.data.ade20k import ade20k
from mim_core.data.cifar import cifar10, cifar100, stl10
from mim_core.data.coco import coco
from mim_core.data.csv_table import csv_table
from mim_core.data.folder import folder
from mim_core.data.inaturalist import inaturalist
from mim_core.data.scenes import scenes
from mim_core.data.voc import voc
from mim_core.spec import Table

SOURCES: Table = {
    "scenes": scenes,
    "folder": folder,
    "csv": csv_table,
    "coco": coco,
    "voc": voc,
    "ade20k": ade20k,
    "inaturalist": inaturalist,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "stl10": stl10,
}
