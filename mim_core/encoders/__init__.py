"""Encoders by name."""

from mim_core.encoders.alexnet import AlexNet
from mim_core.encoders.conv import Conv
from mim_core.encoders.swin import Swin
from mim_core.encoders.vit import ViT

ENCODERS = {"vit": ViT, "swin": Swin, "alexnet": AlexNet, "conv": Conv}
