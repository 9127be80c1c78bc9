"""Pretrained models of timm by name: from its cache on this machine or, with a network, from where timm has them."""

from __future__ import annotations

import timm

from mim_core.published.imported import Imported
from mim_core.published.recognise import convert
from mim_core.spec import nearest

PREFIX = "timm:"


def from_timm(name: str) -> Imported:
    """Give the encoder of timm's pretrained model `name`, such as `deit_small_patch16_224`.

    Raises ValueError where timm has no such model or no weights of it, they can be had neither from its cache nor from
    the network, or the architecture is none of ours.
    """
    where = f"init: '{PREFIX}{name}'"
    architecture = name.partition(".")[0]
    if not timm.is_model(name):
        raise ValueError(
            f"{where}: timm {timm.__version__} has no such model{nearest(architecture, timm.list_models())}"
        )
    if not timm.is_model_pretrained(name):
        own = timm.list_models(f"{architecture}.*", pretrained=True)
        raise ValueError(
            f"{where}: timm {timm.__version__} has no pretrained weights of it; "
            f"{f'choose one of {own[:6]}' if own else 'name another model'}"
        )
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # of the hub's client, the network or the disk: each library has its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{where}: its weights are not in timm's cache, and fetching them failed ({reason[:200]}); where there is "
            f"a network, run `python -c \"import timm; timm.create_model('{name}', pretrained=True)\"` and copy "
            "~/.cache/huggingface here, or fetch the model's file of weights and give its path as init, in the section "
            "'supervised'"
        ) from None
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    heads = next((int(one.num_heads) for one in model.modules() if hasattr(one, "num_heads")), None)
    try:
        found = convert(model.state_dict(), size=size and (int(size[0]), int(size[1])), heads=heads)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return found
