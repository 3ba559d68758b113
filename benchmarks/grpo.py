"""An RL step of ours against one of TRL's GRPOTrainer: same model, prompts, rollouts, lengths, adapters and optimiser.

python benchmarks/grpo.py [tiny|mid|7b] [steps, default 8] [new tokens per rollout, 0: as usual] [raw.json to write]

Both trainers run as their users run them, from PIL images to updated adapters: Lightning's ``fit`` and HF's ``train``,
in processes of their own that take turns step by step (forward and backward through the list, ABBA), one thread each,
no logging, no saving, fp32. Every rollout has the same number of tokens (no token ends it) and the same cheap reward,
under which nearly every rollout has an advantage; ours could skip those without one, and would in practice.

Sides: ``ours``: masks sampled from a predictor whose bias is set so that KEEP of the visual tokens are kept, as after
stage 1; glimpse and predictor train too. ``keep all``: the same, everything kept: what sharing the prompt's layers < K
gives alone. ``no pruning``: pruner ``none``, nothing shared but the vision tower: the machinery alone. TRL has the
same micro-batch, without gradient checkpointing (its default, and slower); ``per group``: it generates for one prompt
at a time, its most frugal setting. The table of memory has them all; tensors there are counted by torch's profiler.

``7b`` is for a GPU: 8B random weights in bf16 on each side, one prompt of 1,600 visual tokens, 8 rollouts of 128; times
are those of the wall, with all work of the GPU, memory is CUDA's. ``python -m benchmarks --cases rl-trl`` is its
comparison of speed alone.

Needs ``pip install trl==1.16.0``, better in an environment of its own (it is not a dependency), and without
torchvision. Left out: vLLM, which TRL users have on a GPU for the rollouts, and every number of GPUs.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
os.environ |= {"KINETO_LOG_LEVEL": "5", "TORCH_CPP_LOG_LEVEL": "ERROR"}
FAST_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647", "MALLOC_TOP_PAD_": "268435456"}
KEEP = 0.06
RATE = 1e-5


@dataclass
class Setting:
    """What all sides have in common, and the settings of one."""

    model: str = "tiny"
    prompts: int = 8
    generations: int = 8
    length: int = 8
    micro: int = 16
    steps: int = 8  # that are measured
    warm_up: int = 2
    side: str = "ours"
    per_group: bool = False  # TRL: generate for one group at a time
    checkpointing: bool = False  # TRL: gradient checkpointing
    profile: bool = False  # record the peak of tensor memory in the last step

    @property
    def all_steps(self) -> int:
        return self.steps + self.warm_up

    @property
    def rollouts(self) -> int:
        return self.prompts * self.generations

    @property
    def depth(self) -> int:
        """K, layers below the adapters and the pruning."""
        return {"tiny": 3, "mid": 8, "7b": 19}[self.model]

    @property
    def size(self) -> int:
        return {"tiny": 336, "mid": 448, "7b": 1120}[self.model]

    @property
    def cuda(self) -> bool:
        return self.model == "7b"

    @classmethod
    def of(cls, model: str, **more: Any) -> Setting:
        """That of a size, with its usual lengths and micro-batches."""
        usual = {"tiny": (8, 8, 16), "mid": (2, 16, 8), "7b": (1, 128, 8)}[model]
        return cls(model, **{**dict(zip(("prompts", "length", "micro"), usual)), **more})


# --------------------------------------------------------------------------------------------------------- the clock


class Clock:
    """Exclusive wall and CPU seconds by phase: what a phase spends inside another one counts for that one only."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.stack = ["rest"]
        self.last = self.now()

    @staticmethod
    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def turn(self) -> None:
        """Book the time since the last turn."""
        now = self.now()
        for i, (new, old) in enumerate(zip(now, self.last)):
            self.spent[self.stack[-1]][i] += new - old
        self.last = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.turn()
        self.stack.append(name)
        try:
            yield
        finally:
            self.turn()
            self.stack.pop()

    def wrap(self, owner: Any, attribute: str, name: str | Callable[..., str]) -> None:
        """Time every call of ``owner.attribute`` as the phase ``name`` (a function of the call's arguments may say)."""
        function = getattr(owner, attribute)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name if isinstance(name, str) else name(*args, **kwargs)):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)

    def collect(self) -> dict[str, list[float]]:
        self.turn()
        spent, self.spent = dict(self.spent), defaultdict(lambda: [0.0, 0.0])
        return spent


# ------------------------------------------------------------------------------------------------ what both sides do


def build(setting: Setting) -> tuple[Any, Any]:
    """The Hugging Face model in fp32 and its processor."""
    import torch

    from glimpseprune.backbones.qwen2_5_vl import Backbone, ImageProcessor
    from glimpseprune.tiny import model as tiny
    from glimpseprune.tiny.config import TinyConfig
    from glimpseprune.tiny.tokenizer import SPECIAL, tokenizer

    if setting.model == "tiny":
        from transformers import Qwen2_5_VLForConditionalGeneration

        path = ROOT / "data" / "tiny-qwen2_5_vl"
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        return model.requires_grad_(False), Backbone.load_processor(path)
    words = tokenizer()
    processor = ImageProcessor(_pil(tiny.image_processor()), words, None, chat_template=words.chat_template)
    if setting.model == "7b":
        from benchmarks.world import SIZES, build

        ids = dict(
            zip(
                ("pad", "end", "vision_start", "image", "vision_end", "video"),
                map(words.convert_tokens_to_ids, SPECIAL),
            )
        )
        return build(SIZES["7b"], torch.device("cuda"), torch.bfloat16, ids), processor
    shape = TinyConfig(layers=12, hidden=384, intermediate=1024, heads=6, kv_heads=2)
    shape.vision_layers, shape.vision_hidden, shape.vision_intermediate = 8, 112, 304  # 0.4 of the decoder's FLOPs
    shape.vision_heads, shape.vision_full = 4, [3, 7]
    return tiny.build(shape, 0).requires_grad_(False), processor


def _pil(processor: Any) -> Any:
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**{k: v for k, v in processor.to_dict().items() if not k.endswith("_type")})


def prompts(setting: Setting) -> list[Any]:
    from glimpseprune.data.sources import tags

    count = setting.prompts * (setting.all_steps + 2)
    return list(tags.samples(tags.Options(size=setting.size, kinds=["number"]), "train", 0, count))


def spread(completions: Any, **fields: Any) -> list[float]:
    """A reward of constant cost that differs within nearly every group."""
    if fields.get("by_place"):  # where the words of a model say nothing
        return [place * 7 % 11 / 10 for place in range(len(completions))]
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(map(ord, text)) % 11 / 10 for text in texts]


def reward(setting: Setting) -> Callable[..., list[float]]:
    found = partial(spread, by_place=setting.cuda)
    found.__name__ = "spread"
    return found


# -------------------------------------------------------------------------------------------------------- the sides


def ours(setting: Setting, clock: Clock, boundary: Callable[[dict], None]) -> None:
    import lightning as L
    import torch

    from glimpseprune import lora, rewards, steps
    from glimpseprune.backbones.qwen2_5_vl import Backbone
    from glimpseprune.data.collate import Collator
    from glimpseprune.options import LoraOptions, TrainConfig
    from glimpseprune.pruners import glimpse, none
    from glimpseprune.training import grpo

    model, processor = build(setting)
    backbone = Backbone(model.eval(), processor)
    gated = setting.side != "no pruning"
    torch.manual_seed(0)
    pruner = glimpse.Pruner(backbone, glimpse.Options(**_glimpse(setting))) if gated else none.Pruner(backbone, None)
    pruner = pruner.to(model.device)
    config = TrainConfig(stage="grpo", train=["lora", "glimpse", "vip"] if gated else ["lora"])
    config.lora = LoraOptions(rank=8, alpha=16.0, first_layer=setting.depth)
    config.grpo.num_generations, config.grpo.max_completion_length = setting.generations, setting.length
    config.grpo.micro_batch = setting.micro
    config.rewards.pruning_when = "always"
    config.optim.warmup, config.optim.weight_decay = 0, 0.0
    config.optim.lora_lr = config.optim.glimpse_lr = config.optim.vip_lr = RATE
    config.trainer.max_steps = setting.all_steps
    with model.device:
        lora.inject(backbone, config.lora, setting.depth)
    module = grpo.GRPOModule(config, backbone, pruner)
    module.rewards, module.ends = rewards.Rewards({"spread": reward(setting)}, {"spread": 1.0}), [-1]
    collate = Collator(backbone)
    if gated:
        set_bias(module, collate(prompts(setting)[:32]), 30.0 if setting.side == "keep all" else None)
    learnt = defaultdict(float)

    def through(*args: Any, **kwargs: Any) -> str:
        learnt["rollouts"] += len(args[1])
        return "log-probs: forward"

    def where(*args: Any, **kwargs: Any) -> str:
        return "glimpse + VIP, for metrics" if clock.stack[-1] == "metrics" else "glimpse + VIP"

    def above(*args: Any, **kwargs: Any) -> str:
        scoring = "log-probs: forward" in clock.stack
        return "log-probs: forward, prompt from K on" if scoring else "rollout: prompt, from K on"

    clock.wrap(backbone, "see", "vision tower")
    clock.wrap(module, "prompt", "prompt below K")
    if gated:
        clock.wrap(pruner, "logits", where)
    clock.wrap(grpo, "sample_keep", "mask sampling")
    clock.wrap(grpo, "answer", "rollout: sampling")
    clock.wrap(grpo, "prefilled", above)
    clock.wrap(steps.Steps, "__call__", "rollout: decode")
    clock.wrap(rewards.Rewards, "__call__", "rewards")
    clock.wrap(module, "score", through)
    clock.wrap(module, "masks_loss", "mask loss: forward")
    clock.wrap(module, "manual_backward", "backward")
    clock.wrap(module, "report", "metrics")
    clock.wrap(module, "log_dict", "metrics")
    clock.wrap(module, "on_before_optimizer_step", "metrics")

    def timed_collate(samples: list) -> Any:
        with clock.phase("image processor, tokenizer"):
            return collate(samples)

    class Turns(L.Callback):
        def on_train_start(self, *args: Any) -> None:
            boundary({})

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            logged = trainer.callback_metrics
            facts = {"keep": float(logged["train/keep_ratio/sampled"]), "learnt": learnt.pop("rollouts", 0)}
            facts["length"] = float(logged["train/completions/mean_length"])
            boundary(facts)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = L.Trainer(
        accelerator="gpu" if setting.cuda else "cpu",
        devices=1,
        max_steps=setting.all_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Turns()],
    )
    trainer.fit(module, torch.utils.data.DataLoader(prompts(setting), setting.prompts, collate_fn=timed_collate))


def _glimpse(setting: Setting) -> dict[str, Any]:
    if setting.model == "7b":
        return {"prune_layer": 18, "probe_layers": [18], "vision_layers": [31, 23, 15, 7]}
    if setting.model == "tiny":  # conf/backbones/tiny.yaml
        layers = {"prune_layer": 2, "probe_layers": [0, 1, 2], "vision_layers": [3, 2, 1, 0]}
        return layers | {"width": 64, "cond_width": 64, "probe": "log_softmax", "init_token": "?"}
    return {"prune_layer": 7, "probe_layers": [7], "vision_layers": [7, 5, 3, 1], "width": 128, "cond_width": 128}


def set_bias(module: Any, inputs: Any, bias: float | None) -> None:
    """Move the predictor's output bias by ``bias``, or so that it keeps KEEP of the visual tokens of a batch."""
    import torch

    with torch.no_grad():
        encoded, state = module.prompt(inputs)
        logits = module.pruner.logits(module.view(encoded, state))
        low, high = -50.0, 50.0
        while bias is None and high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (middle, high) if (logits + middle).sigmoid().mean() < KEEP else (low, middle)
        output = list(module.pruner.vip.attn_out_projs.values())[-1]
        output.bias += low if bias is None else bias


def trl_trainer(setting: Setting, folder: str, callbacks: list[Any]) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from glimpseprune.options import LoraOptions

    model, processor = build(setting)
    rows = prompts(setting)
    data = Dataset.from_dict({"row": list(range(len(rows)))}).with_transform(
        lambda batch: {  # images stay in memory: nothing to decode
            "prompt": [[{"role": "user", "content": rows[i].question}] for i in batch["row"]],
            "image": [rows[i].images[0] for i in batch["row"]],
        }
    )
    per_generation = setting.generations if setting.per_group else setting.rollouts
    micro = min(setting.micro, per_generation)
    arguments = GRPOConfig(
        output_dir=folder,
        num_generations=setting.generations,
        per_device_train_batch_size=micro,
        steps_per_generation=per_generation // micro,
        gradient_accumulation_steps=setting.rollouts // micro,
        max_completion_length=setting.length,
        beta=0.0,
        loss_type="dapo",
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        adam_beta2=0.98,
        weight_decay=0.0,
        max_steps=setting.all_steps,
        gradient_checkpointing=setting.checkpointing,
        use_cpu=not setting.cuda,
        bf16=setting.cuda,
        shuffle_dataset=False,
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        generation_kwargs={"eos_token_id": [-1]},
    )
    adapters = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=LoraOptions().modules,
        layers_to_transform=list(range(setting.depth, model.config.text_config.num_hidden_layers)),
        layers_pattern="layers",
    )
    trainer = GRPOTrainer(
        model,
        reward(setting),
        args=arguments,
        train_dataset=data,
        processing_class=processor,
        peft_config=adapters,
        callbacks=callbacks,
    )
    trainer.eos_token_ids = [-1]
    return trainer


def turns(boundary: Callable[[Any], None]) -> Any:
    """A callback of transformers that calls ``boundary`` between steps."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            boundary(kwargs)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            boundary(kwargs)

    return Turns()


def trl(setting: Setting, clock: Clock, boundary: Callable[[dict], None]) -> None:
    def between(_: Any) -> None:
        lengths = trainer._metrics["train"].pop("completions/mean_length", None)
        boundary({"length": lengths[-1]} if lengths else {})

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(setting, folder, [turns(between)])
        visual = trainer.model.get_base_model().model.visual

        def passes(ids: Any = None, **kwargs: Any) -> str:
            return "rollout: decode" if kwargs["inputs_embeds"].shape[1] == 1 else clock.stack[-1]

        clock.wrap(type(trainer.processing_class), "__call__", "image processor, tokenizer")
        clock.wrap(type(trainer.processing_class), "apply_chat_template", "image processor, tokenizer")
        clock.wrap(visual, "forward", "vision tower")
        clock.wrap(trainer, "_generate_single_turn", "rollout: prompt and sampling")
        clock.wrap(trainer.model.get_base_model().model.language_model, "forward", passes)
        clock.wrap(trainer, "_get_per_token_logps_and_entropies", "log-probs: forward")
        clock.wrap(trainer, "_calculate_rewards", "rewards")
        clock.wrap(trainer.accelerator, "backward", "backward")
        trainer.train()


def check(setting: Setting, clock: Clock, boundary: Callable[[dict], None]) -> None:
    """That TRL trains the same thing: the same log-probabilities as ours, images that are seen, adapters that move."""
    import torch

    from glimpseprune import decoder, lora, pruners, rollout
    from glimpseprune.backbones.qwen2_5_vl import Backbone
    from glimpseprune.data.collate import Collator

    calls: list[int] = []
    found: dict[str, Any] = {}

    def after(_: Any) -> None:
        if trainer.state.global_step != 2:
            return
        found["forward passes with log-probs per step"] = len(calls) // 2
        base = trainer.model.get_base_model()
        moved = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        found["adapter tensors"] = len(moved)
        found["adapters that moved away from 0"] = sum(bool(p.any()) for n, p in moved.items() if "lora_B" in n)
        batch = dict(trainer._buffered_inputs[0])
        found["completion lengths"] = sorted(set(batch["completion_mask"].sum(1).tolist()))
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        extra = {k: batch[k] for k in ("image_grid_thw", "num_images", "mm_token_type_ids")}

        def theirs(pixels: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return trainer._get_per_token_logps_and_entropies(
                    trainer.model, ids, mask, setting.length, pixel_values=pixels, **extra
                )[0]

        seen = theirs(batch["pixel_values"])
        grey = theirs(torch.zeros_like(batch["pixel_values"]))
        found["change of a log-prob by a grey image, mean"] = round((seen - grey).abs().mean().item(), 4)
        backbone = Backbone(base, trainer.processing_class)
        prompt = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}
        prompt |= {k: batch[k] for k in ("pixel_values", "image_grid_thw")}
        with torch.no_grad():
            encoded, none = backbone.encode(prompt), pruners.build("none", {}, backbone)
            index = torch.arange(len(encoded.mask))
            state = rollout.prefilled(backbone, encoded, none, decoder.start(encoded), index, None)
            mine, _ = rollout.score(backbone, state, batch["completion_ids"], batch["completion_mask"].bool())
        found["log-probs, ours - TRL's, max"] = f"{(mine - seen).abs().max().item():.1e}"
        names = {n.replace("base_model.model.", "") for n in moved}
        lora_names = {n for n, _ in base.named_parameters() if lora.is_adapter(n)}
        found["adapters have our names"] = names == lora_names
        mine = Collator(backbone)(prompts(setting)[: 2 * setting.prompts]).prompt["input_ids"]
        unpadded = [[t for t in row if t != pad] for row in mine.tolist()]
        theirs_ids = [[t for t in row if t != pad] for row in batch["prompt_ids"].tolist()]
        found["prompts have our tokens"] = all(row in unpadded for row in theirs_ids)
        boundary(found)

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(setting, folder, [turns(after)])
        score = trainer._get_per_token_logps_and_entropies

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return score(*args, **kwargs)

        trainer._get_per_token_logps_and_entropies = counted
        pad = trainer.processing_class.tokenizer.pad_token_id
        trainer.train()


# ------------------------------------------------------------------------------------------------- taking their turns


def worker(setting: Setting, line: Connection) -> None:
    """Run a side; stop between its steps until the other end of ``line`` says go on. Sends what each step took."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    clock, state = Clock(), {"steps": 0, "profiler": None}
    clock.wrap(torch.optim.AdamW, "step", "optimiser")
    clock.wrap(torch.nn.utils, "clip_grad_norm_", "optimiser")

    def boundary(facts: dict) -> None:
        if setting.cuda:
            torch.cuda.synchronize()
        spent = clock.collect()
        if not state["steps"]:
            gc.collect()
            state["held"] = begin_peak(setting.cuda)
        elif state["profiler"]:
            state["profiler"].stop()
            facts["tensors"] = _peak(state["profiler"])
            state["profiler"] = None
        facts |= {"rss": peak_since(setting.cuda) - state["held"]}
        line.send((spent, facts))
        try:
            line.recv()
        except EOFError:  # the parent is gone
            os._exit(1)
        state["steps"] += 1
        if setting.profile and not setting.cuda and state["steps"] == setting.all_steps:
            state["profiler"] = torch.profiler.profile(
                profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
            )
            state["profiler"].start()
        clock.last = clock.now()

    {"TRL": trl, "check": check}.get(setting.side, ours)(setting, clock, boundary)


def begin_peak(cuda: bool) -> float:
    """MiB that this process holds, where the peak of its memory starts: on the GPU, or RSS."""
    if cuda:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def peak_since(cuda: bool) -> float:
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return _status("VmHWM")


def _status(name: str) -> float:
    """A size of this process in MiB."""
    with open("/proc/self/status") as file:
        return next(int(row.split()[1]) / 1024 for row in file if row.startswith(name))


def _peak(profiler: Any) -> float:
    """The most bytes that tensors held beyond the start, in MiB."""
    level = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak / 2**20


def ratios(title: str, seconds: dict[str, list[float]]) -> None:
    """Print the quartiles of each side's ratio to the first side, step by step."""
    first = seconds[next(iter(seconds))]
    table = Table("side", "ms (median)", "ratio: quartile", "median", "quartile", title=title)
    for name, times in seconds.items():
        spread = quantiles([a / b for a, b in zip(times, first)], n=4)
        table.add_row(name, f"{median(times) * 1e3:.1f}", *(f"{r:.3f}" for r in spread))
    Console().print(table)


class Stopped(Exception):
    """A side's process has ended."""


class Side:
    def __init__(self, setting: Setting) -> None:
        self.line, end = get_context("spawn").Pipe()
        self.process = get_context("spawn").Process(target=worker, args=(setting, end), daemon=True)
        self.process.start()
        end.close()
        self.first = self.receive()

    def receive(self) -> tuple[dict, dict]:
        try:
            return self.line.recv()
        except EOFError:
            raise Stopped("a side stopped: its traceback is above") from None

    def step(self) -> tuple[dict, dict]:
        self.line.send(None)
        return self.receive()

    def close(self) -> None:
        self.process.kill()
        self.process.join()


def measure(setting: Setting, only: tuple[str, ...] = ()) -> dict[str, list]:
    """For each side and step the (wall, CPU) seconds of each phase, and the facts of that step."""
    settings = {
        "ours": setting,
        "ours (A/A)": setting,
        "keep all": replace(setting, side="keep all"),
        "no pruning": replace(setting, side="no pruning"),
        "TRL": replace(setting, side="TRL"),
        "TRL, per group": replace(setting, side="TRL", per_group=True),
    }
    sides = {name: Side(of) for name, of in settings.items() if name in (only or settings)}
    log: dict[str, list] = {name: [] for name in sides}
    for round_ in range(setting.all_steps):
        for name in list(sides)[:: 1 if round_ % 2 else -1]:
            step = sides[name].step()
            if round_ >= setting.warm_up:
                log[name].append(step)
    for side in sides.values():
        side.close()
    return log


def compare_speed(setting: Setting) -> dict[str, list]:
    """Prints what :func:`measure` found, and returns it."""
    log = measure(setting)
    what = f"{setting.prompts} prompts x {setting.generations} rollouts x {setting.length} tokens, {setting.model}"

    def seconds(clock: int, without: tuple[str, ...] = ()) -> dict[str, list[float]]:
        return {
            name: [sum(t[clock] for phase, t in spent.items() if phase not in without) for spent, _ in steps]
            for name, steps in log.items()
        }

    for clock, kind in enumerate(("wall", "CPU")):
        ratios(f"{kind} time of a step in units of ours = how many times the rollouts/s, {what}", seconds(clock))
    images = "image processor, tokenizer", "vision tower"
    ratios("CPU time, image processor and tokenizer left out on every side", seconds(1, images[:1]))
    ratios("CPU time, image processor and vision tower left out on every side", seconds(1, images))
    rates = {name: quantiles([setting.rollouts / s for s in times], n=4) for name, times in seconds(0).items()}
    Console().print("rollouts/s (wall): " + ", ".join(f"{n} {r[1]:.1f}" for n, r in rates.items()))
    for name, steps in log.items():
        facts = {k: mean(f[k] for _, f in steps if k in f) for k in steps[0][1] if k != "rss"}
        Console().print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in facts.items()))
    breakdown({name: [spent for spent, _ in log[name]] for name in ("ours", "no pruning", "TRL") if name in log})
    return log


def breakdown(spent: dict[str, list[dict]]) -> None:
    """Where the CPU time of a step goes, median over steps."""
    phases = list(dict.fromkeys(p for steps in spent.values() for step in steps for p in step))
    columns = [c for name in spent for c in (f"{name}: ms", "%")]
    table = Table("phase (exclusive)", *columns, title="where the CPU time of a step goes")
    cells = {n: {p: median(s.get(p, [0, 0])[1] for s in steps) for p in phases} for n, steps in spent.items()}
    for phase in sorted(phases, key=lambda p: (p == "rest", -cells["ours"][p])):
        row = []
        for of in cells.values():
            row += [f"{of[phase] * 1e3:.1f}", f"{100 * of[phase] / sum(of.values()):.1f}"] if of[phase] else ["", ""]
        table.add_row(phase, *row)
    table.add_row("sum", *(c for of in cells.values() for c in (f"{sum(of.values()) * 1e3:.0f}", "100")))
    Console().print(table)


def compare_memory(setting: Setting, groups: tuple[int, ...] = (8, 16)) -> list[dict[str, Any]]:
    rows = []
    table = Table(
        "side", "G", "peak RSS", "peak of tensors", "CPU s", title=f"MiB above the loaded model, {setting.model}"
    )
    for group in groups:
        one = replace(setting, generations=group, steps=2, warm_up=0, profile=True)
        variants = {
            f"ours, micro-batch {one.micro}": one,
            f"no pruning, micro-batch {one.micro}": replace(one, side="no pruning"),
            "TRL, whole batch": replace(one, side="TRL", micro=one.rollouts),
            f"TRL, micro-batch {one.micro}": replace(one, side="TRL"),
            f"TRL, micro-batch {one.micro}, per group": replace(one, side="TRL", per_group=True),
            "  the same, gradient checkpointing": replace(one, side="TRL", per_group=True, checkpointing=True),
        }
        for name, variant in variants.items():
            side = Side(variant)
            steps = [side.step() for _ in range(one.all_steps)]
            side.close()
            (spent, before), (_, profiled) = steps
            cpu = sum(times[1] for times in spent.values())
            tensors = profiled.get("tensors", profiled["rss"])  # CUDA knows but these
            table.add_row(name, str(group), f"{before['rss']:.0f}", f"{tensors:.0f}", f"{cpu:.2f}")
            rows.append({"side": name.strip(), "G": group, "rss": before["rss"], "tensors": tensors})
    Console().print(table)
    return rows


def main(model: str = "tiny", steps: int = 8, length: int = 0, raw: str | None = None) -> None:
    if find_spec("trl") is None:
        raise SystemExit("TRL is not installed: pip install trl==1.16.0 -c constraints.txt (no torchvision)")
    setting = Setting.of(model, steps=steps, **({"length": length} if length else {}))
    checked = Side(replace(setting, side="check", prompts=2))
    for what, value in checked.first[1].items():
        Console().print(f"TRL: {what}: {value}")
    checked.close()
    os.environ.update(FAST_MALLOC)
    speed = compare_speed(setting)
    for name in FAST_MALLOC:
        del os.environ[name]
    memory = compare_memory(setting)
    if raw is not None:
        packages = {name: version(name) for name in ("trl", "transformers", "torch")}
        machine = f"{os.cpu_count()} CPU cores, {platform.machine()}, one thread a side"
        about = {"machine": machine, "versions": packages, "setting": asdict(setting), "check": checked.first[1]}
        content = about | {"seconds (wall, CPU) by phase, facts": speed, "MiB above the loaded model": memory}
        Path(raw).write_text(json.dumps(_rounded(content), separators=(",", ":")) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return round(value, 5) if isinstance(value, float) else value


if __name__ == "__main__":
    try:
        main(*(int(value) if value.isdigit() else value for value in sys.argv[1:]))
    except Stopped as error:
        sys.exit(str(error))
