"""Low-rank adapters on the decoder of a backbone (peft), and the policy without them.

Adapters on layers >= K only leave the prompt's shared prefix as it is, so nothing below K is ever run again while they
train. Left out: adapters on the vision tower and on embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from glimpseprune.backbones import LVLM
from glimpseprune.config import UserError

if TYPE_CHECKING:
    from glimpseprune.options import LoraOptions


def inject(backbone: LVLM, options: LoraOptions, prune_depth: int) -> None:
    """Put fresh adapters into the decoder, which computes what it did before until they are trained.

    ``prune_depth``: decoder layers that see every token, K.

    Raises:
        UserError: no such layer or module.
    """
    first = prune_depth if options.first_layer is None else options.first_layer
    if not 0 <= first < backbone.num_layers:
        raise UserError(f"lora.first_layer={first}: this backbone has decoder layers 0 to {backbone.num_layers - 1}")
    if unknown := set(options.modules) - {name.rpartition(".")[2] for name, _ in backbone.text_model.named_modules()}:
        raise UserError(f"lora.modules: no '{sorted(unknown)[0]}' in this decoder, such as q_proj or up_proj")
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.modules),
        layers_to_transform=list(range(first, backbone.num_layers)),
        layers_pattern="layers",
    )
    inject_adapter_in_model(config, backbone.text_model)
    for name, parameter in backbone.model.named_parameters():
        if is_adapter(name):  # float32 beside weights in half precision, in which small steps would be lost
            parameter.data = parameter.data.float()
    set_trainable(backbone.model, False)


def set_trainable(model: nn.Module, trainable: bool) -> None:
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.requires_grad_(trainable)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, while the context lasts."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trainable = [p for name, p in model.named_parameters() if is_adapter(name) and p.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        set_trainable(model, False)  # enabling makes them all trainable
        for parameter in trainable:
            parameter.requires_grad_(True)


def merge(model: nn.Module) -> None:
    """Add the adapters into the weights and remove them: an ordinary Hugging Face model again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, module.get_base_layer())
