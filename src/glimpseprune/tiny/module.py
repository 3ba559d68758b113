"""The tiny base in training: its auxiliary losses, its two optimisers, its validation with and without the evidence."""

from __future__ import annotations

import os
from functools import partial

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from glimpseprune import processes
from glimpseprune.data.sources import tags
from glimpseprune.tiny.config import Lesson, PretrainConfig
from glimpseprune.tiny.model import CELL, PATCH, build, image_processor, patchify
from glimpseprune.tiny.packing import Curriculum, packed_masks
from glimpseprune.tiny.tokenizer import IMAGE, VISION_END, VISION_START, token_ids, tokenizer
from glimpseprune.windows import batch_windows


class PretrainModule(L.LightningModule):
    """The tiny LVLM, its discarded heads, and the two optimisers."""

    def __init__(self, config: PretrainConfig):
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.model = build(config.model, config.seed)
        batch_windows(self.model.model.visual)
        width, colours = config.model.hidden, len(tags.NAMES)
        most = max(lesson.size for lesson in config.lessons) // CELL
        self.vision_heads = nn.ModuleDict(
            {"colour": nn.Linear(width, colours + 1), "tens": nn.Linear(width, 11), "units": nn.Linear(width, 11)}
        )
        sizes = {"column": most, "row": most, "colour": colours, "tens": 10, "units": 10}
        sizes |= {"named_column": most, "named_row": most}
        self.bind_heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        tok = tokenizer()
        weight = torch.ones(self.model.config.text_config.vocab_size)
        weight[tok.eos_token_id] = 0.2
        weight[[token_ids(name)[0] for name in tags.NAMES]] = 2.0
        weight[[token_ids(name)[0] for name in ("yes", "no")]] = 3.0
        self.register_buffer("token_weight", weight, persistent=False)
        self.total = sum(lesson.steps for lesson in config.lessons)
        self.step = 0
        self.curve: list[dict[str, float]] = []

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["pretrain"] = {"step": self.step, "curve": self.curve}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.step, self.curve = checkpoint["pretrain"]["step"], checkpoint["pretrain"]["curve"]

    def configure_optimizers(self):
        matrices, rest = [], []
        for name, parameter in self.named_parameters():
            inside = any(part in name for part in (".layers.", ".blocks.", ".merger."))
            (matrices if inside and parameter.ndim == 2 else rest).append(parameter)
        c = self.config
        adamw = torch.optim.AdamW(rest, lr=c.lr, betas=(0.9, 0.95), weight_decay=c.weight_decay)
        muon = torch.optim.Muon(matrices, lr=c.muon_lr, weight_decay=c.weight_decay, adjust_lr_fn="original")
        self._matrices, self._rest = matrices, rest
        return [adamw, muon]

    def _sequence(self, batch: dict[str, Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B, S, D] and M-RoPE positions [3, 1, S] of image prefix + packed questions."""
        tok, count = tokenizer(), len(batch["images"])
        start, image, end = (tok.convert_tokens_to_ids(name) for name in (VISION_START, IMAGE, VISION_END))
        visual = features.shape[1]
        prefix = torch.tensor([[start, *[image] * visual, end]], device=features.device)
        side = batch["images"].shape[1] // PATCH
        positions, _ = self.model.model.get_rope_index(
            prefix, (prefix == image).int(), image_grid_thw=torch.tensor([[1, side, side]], device=features.device)
        )
        restart = torch.cat([torch.arange(int(n)) for n in batch["lengths"].sum(1)]).to(features.device)
        packed = (positions.max() + 1 + restart).expand(3, 1, -1)
        ids = torch.cat([prefix.expand(count, -1), batch["ids"]], 1)
        embeds = self.model.get_input_embeddings()(ids)
        embeds = torch.cat([embeds[:, :1], features.to(embeds.dtype), embeds[:, 1 + visual :]], 1)
        return embeds, torch.cat([positions, packed], -1)

    def _decode(self, hidden: Tensor, positions: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Final hidden states and the input of each decoder layer."""
        text = self.model.model.language_model
        rotary, seen = text.rotary_emb(hidden, positions), {}
        for index, layer in enumerate(text.layers):
            seen[index] = hidden
            mask = low if index <= self.config.prune_layer else high
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return text.norm(hidden), seen

    def _vision(self, batch: dict[str, Tensor]) -> Tensor:
        count, side = len(batch["images"]), batch["images"].shape[1] // PATCH
        grid = torch.tensor([[1, side, side]] * count, device=self.device)
        features = self.model.model.visual(patchify(batch["images"]), grid_thw=grid).pooler_output
        return features.view(count, -1, features.shape[-1])  # [B, V, D]

    def _vision_loss(self, batch: dict[str, Tensor], features: Tensor) -> Tensor:
        best, index = batch["cover"].max(1)
        on = best >= 0.12
        colour = torch.where(on, batch["colours"].gather(1, index), len(tags.NAMES))
        clear = (~((best > 0.02) & (best < 0.12))).float()
        loss = features.new_zeros((), dtype=torch.float32)
        labels = {"colour": colour, "tens": batch["digit_at"][:, 0], "units": batch["digit_at"][:, 1]}
        for name, label in labels.items():
            scores = self.vision_heads[name](features).float()
            each = F.cross_entropy(scores.flatten(0, 1), label.flatten(), reduction="none").view_as(clear)
            there = (label != scores.shape[-1] - 1).float() * clear
            absent = clear - there
            loss = loss + (each * there).sum() / there.sum().clamp(min=1)
            loss = loss + 0.5 * (each * absent).sum() / absent.sum().clamp(min=1)
        return loss

    def _bind_loss(self, batch: dict[str, Tensor], seen: dict[int, Tensor]) -> Tensor:
        visual, heads = batch["cover"].shape[-1], self.bind_heads
        grid = int(visual**0.5)
        tokens = seen[self.config.aux_layer][:, 1 : 1 + visual]
        place = torch.arange(visual, device=tokens.device).expand(len(tokens), -1)

        def error(name: str, hidden: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(heads[name](hidden).float().flatten(0, -2), label.flatten())

        loss = error("column", tokens, place % grid) + error("row", tokens, place // grid)
        best, index = batch["cover"].max(1)
        on = best >= 0.25
        loss = loss + error("colour", tokens[on], batch["colours"].gather(1, index)[on])
        for which, name in enumerate(("tens", "units")):
            loss = loss + error(name, tokens[on], batch["digits"][..., which].gather(1, index)[on])
        later = seen[min(self.config.aux_layer + 2, len(seen) - 1)][:, 2 + visual + batch["words"]]
        for which, name in enumerate(("named_column", "named_row")):
            loss = loss + 3 * error(name, later, batch["places"][..., which])
        return loss

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        config, step = self.config, self.step
        progress = step / self.total
        scale = min(1.0, (step + 1) / config.warmup, (1 - progress) / config.decay)
        optimizers = self.optimizers()
        for optimizer, rate in zip(optimizers, (config.lr, config.muon_lr)):
            optimizer.param_groups[0]["lr"] = rate * scale
        features = self._vision(batch)
        losses = {"vision": config.aux * self._vision_loss(batch, features)}
        if "ids" in batch:
            rings: list[int | None] = [None] * len(features)
            if progress >= config.key_dropout_from:
                rng = np.random.default_rng([config.seed, 7, step])
                rings = [
                    int(rng.integers(0, config.ring + 1)) if rng.random() < config.key_dropout else None for _ in rings
                ]
            embeds, positions = self._sequence(batch, features)
            hidden, seen = self._decode(embeds, positions, *packed_masks(batch, rings))
            logits = self.model.lm_head(hidden[:, 2 + features.shape[1] :]).float().flatten(0, 1)
            labels = batch["labels"].flatten()
            each = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
            weight = self.token_weight[labels.clamp(min=0)] * (labels >= 0)
            losses["answer"] = (each * weight).sum() / weight.sum()
            losses["bind"] = config.bind * self._bind_loss(batch, seen)
        self.manual_backward(sum(losses.values()))
        norm = nn.utils.clip_grad_norm_([*self._matrices, *self._rest], 1.0)
        optimizers[0].step()
        optimizers[1].optimizer.step()  # not through Lightning, which would count the step twice
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.log_dict({f"train/{k}": v.detach() for k, v in losses.items()}, prog_bar=True)
        self.log_dict({"train/grad_norm": norm, "train/lr": config.lr * scale})

    def on_validation_epoch_start(self) -> None:
        self._hits: dict[str, list[Tensor]] = {}

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        """Exact match per kind: unpruned, with the evidence only (oracle), and with no visual token (zero)."""
        features = self._vision(batch)
        embeds, positions = self._sequence(batch, features)
        lengths = batch["lengths"].sum(1)
        owner = torch.repeat_interleave(torch.arange(len(lengths), device=self.device), lengths)
        arms = {"none": (None, False), "oracle": (0, False), "zero": (0, True)}
        for arm, (ring, drop_all) in arms.items():
            masks = packed_masks(batch, [ring] * len(features), drop_all)
            hidden, _ = self._decode(embeds, positions, *masks)
            guess = self.model.lm_head(hidden[:, 2 + features.shape[1] :]).argmax(-1)
            wrong = ((guess != batch["labels"]) & (batch["labels"] >= 0)).long()
            hit = torch.zeros(len(guess), len(lengths), dtype=torch.long, device=self.device)
            hit = hit.index_add(1, owner, wrong) == 0  # [B, questions]
            for code, kind in enumerate(tags.KINDS):
                self._hits.setdefault(f"{arm}/{kind}", []).append(hit[:, batch["kinds"] == code].flatten())

    def on_validation_epoch_end(self) -> None:
        scores = {f"val/{name}": torch.cat(hits).float().mean() for name, hits in self._hits.items()}
        for arm in ("none", "oracle", "zero"):
            every = torch.cat([torch.cat(hits) for name, hits in self._hits.items() if name.startswith(arm + "/")])
            scores[f"val/{arm}"] = every.float().mean()
        self.log_dict(scores)
        if not self.trainer.sanity_checking:
            self.curve.append({"step": self.step} | {name: round(float(value), 4) for name, value in scores.items()})

    def train_dataloader(self) -> DataLoader:
        return self._loader(Curriculum(self.config.lessons, self.config.seed, "train", self.step))

    def val_dataloader(self) -> DataLoader:
        last = self.config.lessons[-1]
        lesson = Lesson(last.size, last.min_tags, last.max_tags, 8, max(1, self.config.val_images // 8))
        return self._loader(Curriculum([lesson], 1, "val"))

    def _loader(self, dataset: Curriculum) -> DataLoader:
        own = partial(processes.serve, os.getpid())
        return DataLoader(dataset, batch_size=None, num_workers=self.config.workers, worker_init_fn=own)

    def save(self, folder: str) -> None:
        """Write a normal Hugging Face folder: bfloat16 weights, configuration, tokenizer, image processor."""
        self.model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        image_processor().save_pretrained(folder)
