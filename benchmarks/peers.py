"""What users would train with instead, as they ship: `transformers`, `lightly`, and a loop of one's own round timm.

Each function gives a module with `loss(batch)` for one of `step.py`'s cases. They are spared what ours does in its
step: `Batch` holds normalised floats, and masks in the form that each peer takes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Batch:
    """Normalised images [b, c, H, W]; hidden patches as bool [b, n], and as indices, of equally many an image.

    `labels` [b, n] are classes where the case predicts such.
    """

    images: Tensor
    hidden: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        order = self.hidden.int().argsort(dim=1, stable=True)
        count = int(self.hidden[0].sum())
        self.visible, self.masked = order[:, : order.shape[1] - count], order[:, order.shape[1] - count :]
        self.noise = self.hidden.float()


class Peer(nn.Module):
    """A model with its loss."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Batch], Tensor]) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def loss(self, batch: Batch) -> Tensor:
        return self._loss(self.model, batch)


def transformers_simmim_vit(case: Any) -> Peer:
    from transformers import ViTConfig, ViTForMaskedImageModeling

    config = ViTConfig(**_vit(case), encoder_stride=case.patch_px)
    return Peer(ViTForMaskedImageModeling(config), lambda model, b: model(b.images, bool_masked_pos=b.hidden).loss)


def transformers_simmim_swin(case: Any) -> Peer:
    from transformers import SwinConfig, SwinForMaskedImageModeling

    config = SwinConfig(
        image_size=case.size,
        patch_size=case.patch_px,
        embed_dim=case.width,
        depths=list(case.depths),
        num_heads=list(case.heads),
        window_size=case.window,
        drop_path_rate=0.0,
        encoder_stride=case.patch_px * 2 ** (len(case.depths) - 1),
    )
    return Peer(SwinForMaskedImageModeling(config), lambda model, b: model(b.images, bool_masked_pos=b.hidden).loss)


def transformers_mae(case: Any) -> Peer:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(**_vit(case), mask_ratio=case.ratio, norm_pix_loss=True)  # its decoder is 512 x 8 as ours
    return Peer(ViTMAEForPreTraining(config), lambda model, b: model(b.images, noise=b.noise).loss)


def transformers_beit(case: Any) -> Peer:
    from transformers import BeitConfig, BeitForMaskedImageModeling

    config = BeitConfig(
        **_vit(case),
        vocab_size=case.codes,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=0.1,
        drop_path_rate=0.0,
    )

    def loss(model: Any, b: Batch) -> Tensor:
        found: Tensor = model(b.images, bool_masked_pos=b.hidden, labels=b.labels[b.hidden]).loss
        return found

    return Peer(BeitForMaskedImageModeling(config), loss)


def lightly_simmim(case: Any) -> Peer:
    """Lightly's own example of SimMIM."""
    from lightly.models import utils
    from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM

    backbone = MaskedVisionTransformerTIMM(vit=_timm_vit(case))
    decoder = nn.Linear(case.width, case.patch_px**2 * 3)

    def loss(model: Any, b: Batch) -> Tensor:
        at = b.masked + 1
        features = utils.get_at_index(model[0].encode(images=b.images, idx_mask=at), at)
        target = utils.get_at_index(utils.patchify(b.images, case.patch_px), b.masked)
        return F.l1_loss(model[1](features), target)

    return Peer(nn.ModuleList([backbone, decoder]), loss)


def lightly_mae(case: Any) -> Peer:
    """Lightly's own example of MAE."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM
    from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM

    backbone = MaskedVisionTransformerTIMM(vit=_timm_vit(case))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated from 1.6 on, and what its example uses
        decoder = MAEDecoderTIMM(backbone.sequence_length - 1, case.patch_px, embed_dim=case.width)

    def loss(model: Any, b: Batch) -> Tensor:
        encoder, decoder = model
        first = b.visible.new_zeros(len(b.visible), 1)
        kept, at = torch.cat([first, b.visible + 1], 1), b.masked + 1
        encoded = decoder.embed(encoder.encode(images=b.images, idx_keep=kept))
        tokens = utils.repeat_token(decoder.mask_token, (len(b.images), encoder.sequence_length))
        tokens = utils.set_at_index(tokens, kept, encoded.type_as(tokens))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(tokens), at))
        target = utils.get_at_index(utils.patchify(b.images, case.patch_px), b.masked)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return F.mse_loss(predicted, target)

    return Peer(nn.ModuleList([backbone, decoder]), loss)


class PlainSimMIM(nn.Module):
    """SimMIM as its published code does it, with timm's encoder: every position predicted, the error masked."""

    def __init__(self, case: Any, encoder: nn.Module, width: int, stride: int) -> None:
        super().__init__()
        self.encoder, self.patch_px, self.stride = encoder, case.patch_px, stride
        self.token = nn.Parameter(torch.zeros(1, 1, case.width))
        self.decoder = nn.Sequential(nn.Conv2d(width, stride**2 * 3, 1), nn.PixelShuffle(stride))

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        side = images.shape[-1] // self.stride
        features = self.encoded(images, hidden[..., None].float()).transpose(1, 2).unflatten(2, (side, side))
        cells = hidden.unflatten(1, (images.shape[-1] // self.patch_px, -1))
        pixels = cells.repeat_interleave(self.patch_px, 1).repeat_interleave(self.patch_px, 2)[:, None]
        error = F.l1_loss(self.decoder(features), images, reduction="none")
        return (error * pixels).sum() / (pixels.sum() + 1e-5) / 3

    def encoded(self, images: Tensor, weight: Tensor) -> Tensor:
        vit: Any = self.encoder
        tokens = vit.patch_embed(images)
        tokens = tokens * (1 - weight) + self.token * weight
        tokens = torch.cat([vit.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + vit.pos_embed
        out: Tensor = vit.norm(vit.blocks(tokens))[:, 1:]
        return out


class PlainSwin(PlainSimMIM):
    def encoded(self, images: Tensor, weight: Tensor) -> Tensor:
        swin: Any = self.encoder
        maps = swin.patch_embed(images)
        weight = weight.reshape(*maps.shape[:3], 1)
        out: Tensor = swin.norm(swin.layers(maps * (1 - weight) + self.token * weight))
        return out.flatten(1, 2)


def timm_simmim_vit(case: Any) -> Peer:
    model = PlainSimMIM(case, _timm_vit(case), case.width, case.patch_px)
    return Peer(model, lambda model, b: model(b.images, b.hidden))


def timm_simmim_swin(case: Any) -> Peer:
    from timm.models.swin_transformer import SwinTransformer

    swin = SwinTransformer(
        img_size=case.size,
        patch_size=case.patch_px,
        embed_dim=case.width,
        depths=case.depths,
        num_heads=case.heads,
        window_size=case.window,
        drop_path_rate=0.0,
        num_classes=0,
    )
    stages = 2 ** (len(case.depths) - 1)
    model = PlainSwin(case, swin, case.width * stages, case.patch_px * stages)
    return Peer(model, lambda model, b: model(b.images, b.hidden))


def _vit(case: Any) -> dict[str, Any]:
    return {
        "image_size": case.size,
        "patch_size": case.patch_px,
        "hidden_size": case.width,
        "num_hidden_layers": case.depths[0],
        "num_attention_heads": case.heads[0],
        "intermediate_size": 4 * case.width,
    }


def _timm_vit(case: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=case.size,
        patch_size=case.patch_px,
        embed_dim=case.width,
        depth=case.depths[0],
        num_heads=case.heads[0],
        num_classes=0,
    )


PEERS: dict[str, dict[str, Callable[[Any], Peer]]] = {
    "simmim_vit": {"transformers": transformers_simmim_vit, "lightly": lightly_simmim, "timm": timm_simmim_vit},
    "simmim_swin": {"transformers": transformers_simmim_swin, "timm": timm_simmim_swin},
    "mae": {"transformers": transformers_mae, "lightly": lightly_mae},
    "beit": {"transformers": transformers_beit},
}
