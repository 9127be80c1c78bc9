"""Detectors: what is made of a neck's maps, out of torchvision's parts; a detector is its proposals and its heads.

Images are neither resized nor normalised here: they come as the pack has them, normalised once. So torchvision's
`GeneralizedRCNN`, whose transform does both, is not used, only what it would call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, PositiveInt
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, roi_pool
from torchvision.ops.poolers import initLevelMapper

from mim_core.spec import OneOf, Piece, Table, build
from mim_core.tasks.detect.necks import Maps
from mim_core.tasks.detect.proposals import PROPOSALS, AnyPiece, LearnedPiece, Share, fitting

BoxHead = Literal["mlp", "convs"]
Targets = list[dict[str, Tensor]]
Parts = tuple[nn.Module, RoIHeads]
CELLS = 14
"""Cells across a region from which a coarser map is pooled: 224 px at stride 16 (Lin et al., CVPR 2017, equation 1)."""
PASTED = 32
"""Masks that are laid into the image at once."""


class Detector(nn.Module):
    """An encoder, a neck on its maps, proposals and heads.

    In training `forward` gives losses by name; else for each image boxes [m, 4] in px, scores [m] in falling order,
    labels [m] (class + 1, as 0 is torchvision's background) and, where there is a mask head, masks [m, H, W].
    """

    def __init__(self, encoder: Any, neck: nn.Module, proposals: nn.Module, heads: RoIHeads) -> None:
        super().__init__()
        self.encoder, self.neck, self.proposals, self.heads = encoder, neck, proposals, heads
        # Under autocast these come in bf16, whose 8 bits cannot say where in an image a box is.
        for part in (getattr(proposals, "head", None), heads.box_predictor, heads.mask_predictor):
            if part is not None:
                part.register_forward_hook(_in_fp32)

    def forward(self, images: Float[Tensor, "b c H W"], targets: Targets | None = None) -> Any:
        size = (images.shape[-2], images.shape[-1])
        listed = ImageList(images, [size] * len(images))
        maps = self.neck(self.encoder.pyramid(images))
        boxes, losses = self.proposals(listed, maps, targets)
        found, more = self.heads(maps, boxes, listed.image_sizes, targets)
        if self.training:
            return {**losses, **more}
        for one in found:
            if "masks" in one:
                one["masks"] = paste(one["masks"][:, 0], one["boxes"], size)
        return found


def faster_rcnn(
    neck: Any,
    size: tuple[int, int],
    classes: int,
    *,
    proposals: LearnedPiece = "rpn",  # type: ignore[assignment]
    head: BoxHead = "mlp",
    width: PositiveInt = 1024,
    cells: PositiveInt = 7,
    sampled: PositiveInt | None = None,
    positive: Share = 0.25,
    least_score: Annotated[float, Field(ge=0, lt=1)] = 0.05,
    overlap: Share = 0.5,
    most: PositiveInt = 100,
) -> Parts:
    """Faster R-CNN (Ren et al., NIPS 2015), in the form of Lin et al., CVPR 2017, on any number of maps.

    A region is pooled to `cells` x `cells` by RoIAlign from the map that its size goes with, and judged by `head`:
    "mlp", two layers of `width`, or "convs", four 3 x 3 convolutions with LayerNorm and one layer of `width` (ViTDet).
    `sampled` proposals an image are learned from (left out: the published 512 at 800 px, in proportion on smaller
    images), a share `positive` of them on objects. Detections below `least_score` are dropped, and those of a class
    that `overlap` a better one; the `most` best of an image are kept.
    """
    pool = _align(neck, cells)
    judge = _box_head(head, neck.width, cells, width)
    count = sampled or fitting(512, 32, size)
    heads = _heads(pool, judge, FastRCNNPredictor(width, classes + 1), count, positive, least_score, overlap, most)
    return build(PROPOSALS, proposals, neck, size), heads


def mask_rcnn(
    neck: Any,
    size: tuple[int, int],
    classes: int,
    *,
    proposals: LearnedPiece = "rpn",  # type: ignore[assignment]
    head: BoxHead = "mlp",
    width: PositiveInt = 1024,
    cells: PositiveInt = 7,
    sampled: PositiveInt | None = None,
    positive: Share = 0.25,
    least_score: Annotated[float, Field(ge=0, lt=1)] = 0.05,
    overlap: Share = 0.5,
    most: PositiveInt = 100,
    mask_width: PositiveInt = 256,
    mask_convs: PositiveInt = 4,
    mask_cells: PositiveInt = 14,
) -> Parts:
    """Mask R-CNN (He et al., ICCV 2017): Faster R-CNN with a mask for each region.

    The mask head pools `mask_cells` x `mask_cells`, has `mask_convs` convolutions of `mask_width`, and doubles the
    sides by a deconvolution; masks are laid into the image without rounding the boxes. See `faster_rcnn` for the rest.
    """
    parts = faster_rcnn(
        neck,
        size,
        classes,
        proposals=proposals,
        head=head,
        width=width,
        cells=cells,
        sampled=sampled,
        positive=positive,
        least_score=least_score,
        overlap=overlap,
        most=most,
    )
    norm = LayerNorm2d if head == "convs" else None
    parts[1].mask_roi_pool = _align(neck, mask_cells)
    parts[1].mask_head = MaskRCNNHeads(neck.width, (mask_width,) * mask_convs, 1, norm_layer=norm)
    parts[1].mask_predictor = MaskRCNNPredictor(mask_width, mask_width, classes + 1)
    return parts


def fast_rcnn(
    neck: Any,
    size: tuple[int, int],
    classes: int,
    *,
    proposals: AnyPiece = "rpn",  # type: ignore[assignment]
    width: PositiveInt = 4096,
    cells: PositiveInt = 6,
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    sampled: PositiveInt = 64,
    positive: Share = 0.25,
    least_score: Annotated[float, Field(ge=0, lt=1)] = 0.05,
    overlap: Share = 0.3,
    most: PositiveInt = 100,
) -> Parts:
    """Fast R-CNN (Girshick, ICCV 2015) on one map: regions are max-pooled to `cells` x `cells` (AlexNet: 6), and judged
    by two layers of `width` with `dropout`, as AlexNet's fc6 and fc7, which here begin afresh.

    `proposals` are the published ones' stand-ins: "rpn", Faster R-CNN's, is trained jointly (so that the detector is a
    Faster R-CNN with Fast R-CNN's head); "grid" is fixed. Unlike the paper's, all regions that overlap an object by
    less than half are background, not only those above 0.1, and the smooth L1 loss bends at 1/9, as torchvision's.
    Raises ValueError where the neck has more than one map.
    """
    if neck.pooled != 1:
        raise ValueError(f"neck: found {neck.pooled} maps; fast_rcnn pools from one; choose single")
    judge = nn.Sequential(
        nn.Flatten(),
        nn.Linear(neck.width * cells**2, width),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
    )
    predictor = FastRCNNPredictor(width, classes + 1)
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):  # section 2.3
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    pool = MaxPool(cells, neck.strides[0])
    heads = _heads(pool, judge, predictor, sampled, positive, least_score, overlap, most)
    return build(PROPOSALS, proposals, neck, size), heads


class MaxPool(nn.Module):
    """Pool regions of one map by the maximum in each of `cells` x `cells` parts (Fast R-CNN, section 2.1)."""

    def __init__(self, cells: int, stride: int) -> None:
        super().__init__()
        self.cells, self.stride = cells, stride

    def forward(self, maps: Maps, boxes: list[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
        pooled: Tensor = roi_pool(maps["0"].float(), boxes, self.cells, 1 / self.stride)
        return pooled


def paste(masks: Float[Tensor, "m h w"], boxes: Float[Tensor, "m 4"], size: tuple[int, int]) -> Bool[Tensor, "m H W"]:
    """Lay masks in [0, 1] into an image of `size` (height, width) px, each stretched to its box; True from a half on.

    torchvision's own rounds boxes to whole px, which small objects do not bear.
    """
    y, x = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    parts = []
    for start in range(0, len(boxes), PASTED):
        some, where = masks[start : start + PASTED], boxes[start : start + PASTED]
        left, top, right, bottom = where[:, :, None].unbind(1)
        across, down = 2 * (x - left) / (right - left) - 1, 2 * (y - top) / (bottom - top) - 1
        shape = (len(some), *size)
        grid = torch.stack([across[:, None].expand(shape), down[:, :, None].expand(shape)], -1)
        parts.append(F.grid_sample(some[:, None].float(), grid, align_corners=False)[:, 0] >= 0.5)
    return torch.cat(parts) if parts else torch.zeros((0, *size), dtype=torch.bool, device=boxes.device)


def _align(neck: Any, cells: int) -> MultiScaleRoIAlign:
    """Pool regions from the neck's maps by RoIAlign; torchvision would guess strides, and that they are powers of 2."""
    pool = MultiScaleRoIAlign([str(at) for at in range(neck.pooled)], cells, 2)
    strides = list(neck.strides[: neck.pooled])
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(0, neck.pooled - 1, CELLS * strides[0], 0)
    return pool


def _box_head(kind: BoxHead, channels: int, cells: int, width: int) -> nn.Module:
    if kind == "mlp":
        return TwoMLPHead(channels * cells**2, width)  # type: ignore[no-any-return]
    return FastRCNNConvFCHead(  # type: ignore[no-any-return]
        (channels, cells, cells), [channels] * 4, [width], norm_layer=LayerNorm2d
    )


def _heads(
    pool: nn.Module,
    head: nn.Module,
    predictor: nn.Module,
    sampled: int,
    positive: float,
    least_score: float,
    overlap: float,
    most: int,
) -> RoIHeads:
    """Assemble torchvision's heads; a proposal is an object's from an overlap of half on."""
    return RoIHeads(pool, head, predictor, 0.5, 0.5, sampled, positive, None, least_score, overlap, most)


def _in_fp32(module: nn.Module, given: Any, out: Any) -> Any:
    return _cast(out)


def _cast(out: Any) -> Any:
    """Turn tensors in lists and tuples to fp32."""
    return out.float() if isinstance(out, Tensor) else type(out)(map(_cast, out))


DETECTORS: Table = {"faster_rcnn": faster_rcnn, "mask_rcnn": mask_rcnn, "fast_rcnn": fast_rcnn}
DetectorPiece = Annotated[Piece, OneOf(DETECTORS), Field(validate_default=True)]
