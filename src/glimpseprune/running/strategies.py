"""How the processes of a training share it out: ``trainer.strategy``.

=============  =====================================================================================================
ddp            every process holds everything
zero1          optimiser states are split between the processes (DeepSpeed ZeRO, conf/deepspeed/zero1.json)
zero2          and gradients: the default on several GPUs while little trains
zero3          and all weights, frozen ones included: the default for full fine-tuning of large models
zero3_offload  and what a process holds of them waits in the memory of the CPU
auto           one of these, see :func:`choose`
=============  =====================================================================================================

Checkpoints do not depend on it. DeepSpeed's own hold a file per process, need a conversion for another number of them,
and unpickle what they find. Here what trains (adapters, glimpse, VIP; seldom more) is put together parameter by
parameter, and rank 0 writes the one file that a single process would have written: read with ``weights_only``, resumed
from on any number of processes under any strategy. Frozen weights are in none. The price is for full fine-tuning: rank
0 needs room for 12 bytes per parameter in the memory of its node.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from glimpseprune import files, resources
from glimpseprune.config import UserError
from glimpseprune.sharded import fill, gathered, is_split

ZERO = ("zero1", "zero2", "zero3", "zero3_offload")
NAMES = ("auto", "ddp", *ZERO)
LARGE = 6e9
"""Parameters of a model whose fine-tuning in full (16 bytes each) wants its weights split."""
MOMENTS = ("exp_avg", "exp_avg_sq")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""By DeepSpeed's words."""


def choose(name: str, processes: int, cuda: bool, deepspeed: bool, trained: int) -> str:
    """What ``auto`` stands for, else ``name``.

    One process needs no strategy; without GPUs or DeepSpeed there is DDP; else ZeRO-2, from ``LARGE`` parameters that
    train (``trained``) ZeRO-3.
    """
    if name != "auto" or processes == 1:
        return name
    if not cuda or not deepspeed:
        return "ddp"
    return "zero3" if trained >= LARGE else "zero2"


class Direct(TorchCheckpointIO):
    """Writes a checkpoint where it is to be: Lightning's makes it in memory, then in /tmp, which may be full or small,
    and leaves it there if the disk is full."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with files.whole(path) as partial:
            torch.save(checkpoint, partial)


def build(name: str, clip: float = 0.0) -> str | Strategy:
    """What Lightning's Trainer is given for ``name``; ``clip``: norm that gradients are clipped to, 0 for never.

    Raises:
        UserError: as :func:`read`.
    """
    config = read(name)
    return name if config is None else Zero(config | {"gradient_clipping": clip})


def precision(wanted: str, strategy: str | Strategy, weights: torch.dtype) -> str:
    """Of a training whose LVLM is loaded with ``weights``.

    ZeRO has all weights in one precision. Under 32-true, the default, that would be float32 for the frozen ones, too;
    so beside an LVLM in half precision, what trains is in half precision as well, with copies in float32 that are
    updated and saved.
    """
    half = {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}
    return half.get(weights, wanted) if isinstance(strategy, Zero) and wanted == "32-true" else wanted


def read(name: str) -> dict[str, Any] | None:
    """DeepSpeed's configuration for ``name``, one of ``NAMES`` or a JSON file; None where it is not asked.

    Raises:
        UserError: no such strategy or file, or DeepSpeed is not installed.
    """
    if name in ("auto", "ddp"):
        return None
    file = resources.find(name if name.endswith(".json") else f"conf/deepspeed/{name}.json")
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        known = ", ".join(NAMES)
        raise UserError(f"trainer.strategy={name}: give {known}, or a JSON file for DeepSpeed ({error})") from None
    if find_spec("deepspeed") is None:
        raise UserError(f"trainer.strategy={name} needs DeepSpeed (DS_BUILD_OPS=0 pip install deepspeed), or take ddp")
    return config


def devices(accelerator: str, wanted: int | str) -> list[str]:
    """The devices of this node that train, ``wanted`` as Lightning's Trainer reads it: auto, a number, a list.

    Raises:
        UserError: it is none of these, or there are no such devices; CPUs stand for no more than their cores.
    """
    cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if accelerator in ("gpu", "cuda") and not cuda:
        raise UserError(f"accelerator={accelerator}: there is no GPU that torch {torch.__version__} can use")
    numbers = [int(number) for number in re.findall(r"-?\d+", str(wanted))]
    listed = "," in str(wanted) or "[" in str(wanted)
    if wanted == "auto" or numbers == [-1]:
        numbers = list(range(torch.cuda.device_count() if cuda else 1))
    elif not numbers or min(numbers) < 0 or numbers == [0] and not listed:
        raise UserError(f"trainer.devices={wanted}: give auto, a number of devices, or a list such as [2,3]")
    elif not listed:
        numbers = list(range(numbers[0]))
    there = torch.cuda.device_count() if cuda else max(os.cpu_count() or 1, 8)
    if len(set(numbers)) < len(numbers) or (max(numbers) if cuda else len(numbers) - 1) >= there:
        what = f"GPUs, 0 to {there - 1}" if cuda else "processes at most on these CPUs"
        raise UserError(f"trainer.devices={wanted}: there are {there} {what}, each once")
    return [f"cuda:{number}" if cuda else "cpu" for number in numbers]


def mine(devices: list[str]) -> str:
    """The one of this process; a model that is loaded straight there is never in the memory of the CPU as a whole."""
    local = next((os.environ[name] for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in os.environ), "0")
    return devices[int(local) % len(devices)]


@contextmanager
def splitting(trainer: Trainer) -> Iterator[None]:
    """While it lasts, an LVLM that is loaded is split as it is read if ZeRO-3 will train it: rank 0 reads the files, a
    tensor at a time is whole. All processes must load it, and those that fit would start are started now."""
    strategy = trainer.strategy
    if not isinstance(strategy, Zero) or not strategy.zero_stage_3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    if strategy.launcher is not None:
        strategy.launcher.launch(lambda: None, trainer=trainer)
    strategy.setup_environment()
    told = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": strategy.config["zero_optimization"]}
    if strategy.half is not None:
        told[strategy.half] = {"enabled": True}
    config = HfDeepSpeedConfig(told)  # which transformers knows of for as long as someone holds it
    yield
    del config


def leave() -> None:
    """Part from the other processes, after the last word to them: gloo's threads, if Python shuts down over them, may
    abort a process that has all but ended well. Not after an error, when it would wait for those who stay."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


class Zero(DeepSpeedStrategy):
    """DeepSpeed ZeRO with checkpoints of one file, on GPUs, or on CPUs to try and test it.

    Lightning's own strategy refuses CPUs. Optimiser states are those of torch's AdamW; named as
    ``torch.optim.Optimizer.state_dict`` names them, in the order of ``configure_optimizers``.
    """

    def __init__(self, config: Mapping[str, Any]):
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported, which super() does
        super().__init__(config=deepcopy(dict(config)))
        self.groups: list[list[nn.Parameter]] = []

    # ------------------------------------------------------------------------------------------------------- CPUs

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        devices = self._parallel_devices
        if devices and devices[0].type == "cpu":
            return [torch.device("cpu", index) for index in range(len(devices))]  # DeepSpeed wants numbers
        return devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._parallel_devices = devices

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CPUAccelerator):
            import deepspeed.ops

            # Else it compiles an exchange for inference. That takes a compiler and a minute; and if this process is
            # killed meanwhile, all later ones wait for ever.
            deepspeed.ops.__compatible_ops__ = {}
            DDPStrategy.setup_environment(self)
        else:
            super().setup_environment()

    @property
    def half(self) -> str | None:
        """The half precision, of ``HALVES``, that DeepSpeed has all weights in; None: float32."""
        for kind in HALVES:
            plugin = self.precision_plugin.precision.startswith(kind.removeprefix("fp"))
            if plugin or self.config.get(kind, {}).get("enabled"):
                return kind
        return None

    def expect_step(self, is_next: bool) -> None:
        """Whether the coming backward pass is the last before a step; where there are several, DeepSpeed must know."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(is_next)
        self.deepspeed_engine.optimizer.clear_backward_seen_flag()  # else ZeRO-3 forgets the pass before this one

    def gradient_norm(self) -> Tensor:
        """Of the gradients of all ranks; DeepSpeed itself tells it only after the update. To be called before every
        update, for under offload it also completes the gradients."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        inner = self.deepspeed_engine.optimizer
        if getattr(inner, "offload_optimizer", False):
            # Only what had a gradient in the last of several backward passes is in the memory of the CPU by now.
            inner.finalize_gradient_accumulation_boundary()
        if hasattr(inner, "scaled_global_norm"):
            norm = inner.scaled_global_norm()
        else:
            norm = combine_grad_norm_groups(inner._get_norm_groups())
        return torch.as_tensor(norm, dtype=torch.float32, device=self.root_device)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Optimizer | None, *rest: Any) -> Any:
        # The engine puts flat parts of many parameters in the place of these.
        self.groups = [list(group["params"]) for group in optimizer.param_groups] if optimizer is not None else []
        if self.zero_stage_3 and self.half is not None:
            for parameter in model.parameters():  # DeepSpeed itself casts nothing once a weight is split
                if not is_split(parameter):
                    parameter.data = parameter.data.to(HALVES[self.half])
        return super()._setup_model_and_optimizer(model, optimizer, *rest)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return gathered(self.lightning_module.saved(), wanted=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self.deepspeed_engine.optimizer
        _link(inner)
        steps = [state["step"] for state in inner.optimizer.state.values() if "step" in state]
        states, groups = {}, []
        numbers = count()
        for group, parameters in zip(inner.param_groups, self.groups):
            own = {number: parameter for parameter, number in zip(parameters, numbers)}
            groups.append({key: value for key, value in group.items() if key != "params"} | {"params": list(own)})
            for number, parameter in own.items() if steps else ():
                states[number] = {"step": torch.tensor(float(steps[0]))}
                for key in MOMENTS:
                    moment = safe_get_full_optimizer_state(parameter, key)
                    if self.is_global_zero:  # the others hold one at a time
                        states[number][key] = moment.cpu()
        return {"state": states, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.is_global_zero:
            Direct().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self.lightning_module.saved()
        for name, tensor in checkpoint["state_dict"].items():
            fill(own[name], tensor)
            _set_part(own[name], tensor)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        (saved,) = checkpoint["optimizer_states"]
        inner = self.deepspeed_engine.optimizer
        for group, there in zip(inner.param_groups, saved["param_groups"]):
            group.update({key: value for key, value in there.items() if key != "params"})
        if not saved["state"]:
            return
        # torch's AdamW makes its states in its first step, DeepSpeed looks for them after that: both come early here.
        for flat in _flat(inner):
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            inner.optimizer.state[flat] = {"step": saved["state"][0]["step"].clone()} | moments
        _link(inner)
        for number, parameter in enumerate(chain.from_iterable(self.groups)):
            for key in MOMENTS:
                _set_part(parameter, saved["state"][number][key], key)


def _flat(inner: Any) -> list[Tensor]:
    """What DeepSpeed's optimiser gives to torch's: full-precision parts of many parameters, laid end to end."""
    return getattr(inner, "fp32_partitioned_groups_flat", None) or inner.single_partition_of_fp32_groups


def _link(inner: Any) -> None:
    """Let ZeRO-1 and 2 find the states of all parameters; by itself DeepSpeed (0.19) finds those of the first group."""
    if hasattr(inner, "_hp_optimizer_states_linked") and all(flat in inner.optimizer.state for flat in _flat(inner)):
        inner._hp_optimizer_states_linked = False
        inner._lazy_init_hp_params_optimizer_state()


def _set_part(parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
    """Set what this process holds of a parameter's optimiser state, or (without ``key``) of its full-precision copy."""
    from deepspeed import utils

    if not parameter.requires_grad:
        return
    kind, more = ("optimizer_state", [key]) if key else ("fp32_param", [])
    value = value.to(parameter.device, torch.float32)
    if is_split(parameter):  # its safe_set_full_* cannot pad what does not divide by the ranks
        size, rank = parameter.ds_tensor.numel(), dist.get_rank()
        padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        getattr(utils, f"safe_set_local_{kind}")(parameter, padded[rank * size : (rank + 1) * size], *more)
    else:
        getattr(utils, f"safe_set_full_{kind}")(parameter, value, *more)
