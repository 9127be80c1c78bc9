"""Parts of timm's transformers in quicker forms that give the same, and how parts of convolutional models begin."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mim_core.grid import chosen, patchify


def embed_patches(patch_embed: Any, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n d"]:
    """Give what timm's patch embedding gives, by one product of matrices: no image has to be turned round for it."""
    project = patch_embed.proj
    patches = patchify(images, project.kernel_size[0])
    out: Tensor = patch_embed.norm(F.linear(patches, project.weight.flatten(1), project.bias))
    return out


def block_at(
    block: Any, tokens: Float[Tensor, "b t d"], rows: Int[Tensor, "b m"], bias: Float[Tensor, "h t t"] | None = None
) -> Float[Tensor, "b m d"]:
    """Give what a block of timm's (of a ViT or a Beit) gives at `rows` of its tokens alone.

    Exact: keys and values are of all tokens, while queries, the projection and the MLP are of those rows, as none reads
    another's. `bias` is added to the scores of attention. It is compiled where the block is.
    """
    return (_at if getattr(block, "_compiled_call_impl", None) is None else _compiled())(block, tokens, rows, bias)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_at, dynamic=False)


def _at(block: Any, tokens: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    attn = block.attn
    normed, own = block.norm1(tokens), chosen(tokens, rows).reshape(*rows.shape, -1)
    width = attn.qkv.weight.shape[0] // 3
    apart = getattr(attn, "q_bias", None) is not None
    offset = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]) if apart else attn.qkv.bias
    parts: tuple[Tensor | None, Tensor | None] = (None, None) if offset is None else (offset[:width], offset[width:])
    q = F.linear(block.norm1(own), attn.qkv.weight[:width], parts[0])
    kv = F.linear(normed, attn.qkv.weight[width:], parts[1])
    q = q.reshape(*q.shape[:2], attn.num_heads, -1).transpose(1, 2)
    k, v = kv.reshape(*kv.shape[:2], 2, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    here = None if bias is None else bias[:, rows].transpose(0, 1)
    if attn.fused_attn:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=here)
    else:
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        mixed = (scores if here is None else scores + here).softmax(-1) @ v
    mixed = attn.proj(mixed.transpose(1, 2).flatten(2))
    first, second = (_scaled(block, index) for index in (1, 2))
    own = own + block.drop_path1(first(mixed))
    out: Tensor = own + block.drop_path2(second(block.mlp(block.norm2(own))))
    return out


def _scaled(block: Any, index: int) -> Any:
    """LayerScale of a branch: a module in a ViT's block, a parameter or nothing in a Beit's."""
    if hasattr(block, "gamma_1"):
        gamma = getattr(block, f"gamma_{index}")
        return (lambda branch: branch) if gamma is None else (lambda branch: gamma * branch)
    return getattr(block, f"ls{index}")


def begin_as_dcgan(part: nn.Module) -> None:
    """Draw initial weights: N(0, 0.02) of convolutions, with biases 0, and N(1, 0.02) of batch norms; no other part's.

    DCGAN's (Radford et al., ICLR 2016, section 3), as Context Encoder's code has them.
    """
    if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(part.weight, std=0.02)
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    elif isinstance(part, nn.BatchNorm2d):
        nn.init.normal_(part.weight, mean=1.0, std=0.02)
