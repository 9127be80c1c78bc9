"""Encoders by name."""

from mim_core.encoders.vit import ViT

ENCODERS = {"vit": ViT}
