"""The visual importance predictor: from the glimpse's attention logits to one keep logit per visual token.

docs/method.md §1.4: a small transformer over the visual tokens of each image, whose queries and keys also see the
vision tower's states. Checked against HVision-NKU/GlimpsePrune@091a3d5 (AttnFuserV1); parameters have the names of its
published weights, which therefore load as they are. Imports only torch. Images of equal size become a batch for the
attention alone: nothing of size V x V is ever made, and none is padded to another's size. How tokens lie is worked out
on the host: nothing here waits for a GPU, unless tokens have been dropped before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]


class VIP(nn.Module):
    """Keep logits of visual tokens.

    Args:
        probes: attention logits per token (probe layers x heads).
        vision_width: C, width of the vision tower.
        blocks: number of blocks; each is conditioned on one layer of the tower.
        width: F, width of the residual stream.
        cond_width: width of the condition, which queries and keys have in addition.
        num_heads: heads; F and F + cond_width must be divisible, (F + cond_width) / heads by 4.
        deep_supervision: every block, not only the last, has an output.
        init_bias: initial bias of the outputs; sigmoid of it is the fraction kept by an untrained predictor.
    """

    def __init__(
        self,
        probes: int,
        vision_width: int,
        blocks: int = 4,
        *,
        width: int = 256,
        cond_width: int = 512,
        num_heads: int = 4,
        deep_supervision: bool = False,
        init_bias: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_width = (width + cond_width) // num_heads
        if width % num_heads or (width + cond_width) % num_heads or self.head_width % 4:
            raise ValueError(f"{num_heads} heads must divide {width} and {width + cond_width}, heads by 4 (2-D RoPE)")
        self.attn_in_proj = nn.Linear(probes, width)
        self.cond_in_projs = nn.ModuleList(nn.Linear(vision_width, cond_width) for _ in range(blocks))
        self.layers = nn.ModuleList(Block(width, cond_width, num_heads) for _ in range(blocks))
        outputs = range(blocks) if deep_supervision else (blocks - 1,)
        self.attn_out_projs = nn.ModuleDict({str(block): nn.Linear(width, 1) for block in outputs})
        for output in self.attn_out_projs.values():
            nn.init.constant_(output.bias, init_bias)

    def forward(
        self,
        probes: Tensor,
        states: Sequence[Tensor],
        grids: Sequence[Grid],
        window: int | None = None,
        tokens: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Keep logits, one row per output, the last one counts.

        Args:
            probes: [N, probes], images one after the other, raster order.
            states: per block [N, C], in the same order.
            grids: rows and columns of each image.
            window: attend within windows of this side (the vision tower's), not within whole images.
            tokens: [N] places of the tokens in ``grids``, where some of them have been dropped before.
            rows: [N] then what each of them belongs to, since a prompt may go on in several rows.

        Returns:
            [1, N], or [blocks, N] under deep supervision.
        """
        dtype = self.attn_in_proj.weight.dtype
        places, ids = grid_positions(grids), window_ids(grids, window)
        if tokens is not None:
            tokens, rows = tokens.cpu(), rows.cpu()
            own = ids[tokens] + rows * len(ids)  # there are no more segments than tokens
            places, ids = places[tokens], own.unique(return_inverse=True)[1]
        segments = Segments(ids, probes.device)
        rope = rope_2d(places.to(probes.device, non_blocking=True), self.head_width)  # [N, 1, e] each
        x = self.attn_in_proj(probes.to(dtype)).to(dtype)  # [N, F]; the residual stream keeps its precision
        logits = []
        for index, (block, project, state) in enumerate(zip(self.layers, self.cond_in_projs, states, strict=True)):
            x = block(x, project(state.to(dtype)), rope, segments)
            if str(index) in self.attn_out_projs:
                with torch.autocast(x.device.type, enabled=False):  # logits are not rounded
                    logits.append(self.attn_out_projs[str(index)](x).squeeze(-1))
        return torch.stack(logits)  # [outputs, N]


class Block(nn.Module):
    """Pre-norm transformer block: attention whose q and k see [x; condition], then SwiGLU."""

    def __init__(self, width: int, cond_width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.attn = Attention(width, cond_width, num_heads)
        self.mlp = MLP(width, 2 * width)

    def forward(self, x: Tensor, condition: Tensor, rope: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        x = x + self.attn(self.norm1(x), condition, rope, segments)
        return x + self.mlp(self.norm2(x))  # [N, F]


class Attention(nn.Module):
    def __init__(self, width: int, cond_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width + cond_width, width + cond_width, bias=False)
        self.k_proj = nn.Linear(width + cond_width, width + cond_width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, condition: Tensor, rope: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        both = torch.cat([x, condition], -1)  # [N, F + cond]
        q, k = (rotate(p(both).unflatten(-1, (self.num_heads, -1)), rope) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (self.num_heads, -1))  # [N, H, F / H]
        width = v.shape[-1]
        # Fused kernels want values as wide as keys.
        v = F.pad(v, (0, q.shape[-1] - width))
        return self.o_proj(segments.attend(q, k, v)[..., :width].flatten(1))  # [N, F]


class MLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Segments:
    """Attention that stays within segments of tokens; those of one size are the batch of one call, without a mask.

    ``ids`` [N], on the host: the segment each token belongs to, 0 .. M - 1, each at least once, in any order;
    ``device``: of what attends.
    """

    def __init__(self, ids: Tensor, device: torch.device | None = None) -> None:
        lengths = ids.bincount()  # [M]
        self.sizes = sorted(Counter(lengths.tolist()).items())
        order = (lengths[ids] * len(lengths) + ids).argsort(stable=True)  # [N] by size, segment by segment
        # None where tokens lie in that order already: whole images of one size.
        self.order = self.places = None
        if not torch.equal(order, torch.arange(len(ids))):
            self.order, self.places = (x.to(device, non_blocking=True) for x in (order, order.argsort()))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All of them [N, H, e], and so is what comes out."""
        if self.order is not None:
            q, k, v = (x[self.order] for x in (q, k, v))
        groups = (x.split([size * count for size, count in self.sizes]) for x in (q, k, v))
        parts = []
        for (size, _), *group in zip(self.sizes, *groups):
            batch = (x.unflatten(0, (-1, size)).transpose(1, 2) for x in group)  # [M', H, n, e] each
            parts.append(F.scaled_dot_product_attention(*batch).transpose(1, 2).flatten(0, 1))
        out = torch.cat(parts)
        return out if self.places is None else out[self.places]


def grid_positions(grids: Sequence[Grid]) -> Tensor:
    """Row and column of each visual token [N, 2], image by image in raster order."""
    return torch.cat([torch.cartesian_prod(torch.arange(rows), torch.arange(cols)) for rows, cols in grids])


def window_ids(grids: Sequence[Grid], side: int | None) -> Tensor:
    """Segment of each visual token [N]: its image, or (``side``) its window of side x side tokens in its image.

    Windows are counted in raster order, those at the lower and right edge are smaller.
    """
    ids, seen = [], 0
    for rows, cols in grids:
        high, wide = (rows, cols) if side is None else (side, side)
        across = -(-cols // wide)
        place = grid_positions([(rows, cols)])
        ids.append(seen + place[:, 0] // high * across + place[:, 1] // wide)
        seen += -(-rows // high) * across
    return torch.cat(ids)


def rope_2d(positions: Tensor, width: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, 1, width] for positions [N, 2]: the first half of the frequencies turns with the row, the
    second with the column, each over width / 2 channels. Computed in float32."""
    half = width // 2
    frequencies = theta ** (-torch.arange(0, half, 2, device=positions.device, dtype=torch.float32) / half)
    angles = (positions.float()[:, :, None] * frequencies).flatten(1).repeat(1, 2)[:, None]  # [N, 1, width]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Apply RoPE to x [N, H, e] in float32; channel i pairs with i + e / 2."""
    cos, sin = rope
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
