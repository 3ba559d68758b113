"""Equal budgets: a method's own knob, set to a cost that is read from what it does to real samples.

A method says which options leave a fraction ``keep`` of the visual tokens for decoding (its ``to_budget``); what that
costs is nowhere assumed, but read from the traces of prefills on the first samples of the data, and ``keep`` is
searched until the cost is the wanted one. Left out: other knobs (where a method stops), which are the user's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from glimpseprune.config import UserError
from glimpseprune.evaluation import Method, build, read

if TYPE_CHECKING:
    from glimpseprune.backbones import LVLM
    from glimpseprune.types import Encoded, Inputs

BUDGETS = ("kept", "mean_tokens", "kv", "decoder_flops", "prefill_flops")
LEAST = 1 / 4096
"""The fraction that stands for "as little as possible": not every method takes 0."""
TRIES = 12


@dataclass(frozen=True)
class Cost:
    """What a budget may be about, mean over samples."""

    kept: float
    """Share of the visual tokens that is left for decoding."""
    mean_tokens: float
    """Visual tokens that a decoder layer sees, mean over layers."""
    mean_share: float
    """The same, as a share of the visual tokens."""
    kv: float
    """Visual tokens in the cache at the first answer token, mean over layers, as a share of them."""
    decoder_flops: float
    prefill_flops: float
    token: float
    """One visual token of a sample, as a share of them."""


@dataclass(frozen=True)
class Budget:
    """``wanted`` of ``what``: of :data:`BUDGETS`, where ``mean_tokens`` up to 1 is a share of the visual tokens."""

    what: str
    wanted: float
    tolerance: float

    def of(self, cost: Cost) -> float:
        share = self.what == "mean_tokens" and self.wanted <= 1
        return getattr(cost, "mean_share" if share else self.what)

    def grain(self, cost: Cost) -> float:
        """By how much a budget may be missed because tokens are whole; FLOPs have none."""
        if self.what == "mean_tokens" and self.wanted > 1:
            return 1.0
        return 0.0 if self.what.endswith("flops") else cost.token

    def met(self, cost: Cost) -> bool:
        return abs(self.of(cost) - self.wanted) <= max(self.tolerance * self.wanted, self.grain(cost))


class Calibration:
    """What a pruner costs on a few batches, read from its decisions there; layers above the last one are not run."""

    def __init__(self, batches: Sequence[Inputs]) -> None:
        self.batches = batches

    def encoded(self, backbone: LVLM, pruner: Any) -> list[Encoded]:
        from glimpseprune.decoder import see

        return [see(backbone, pruner, inputs.prompt, inputs.targets) for inputs in self.batches]

    def cost(self, backbone: LVLM, pruner: Any, encoded: Sequence[Encoded] | None = None) -> Cost:
        """``encoded``: the batches, if they are there already and do not depend on the pruner's options."""
        from glimpseprune.decoder import advance, start

        found = []
        for inputs, batch in zip(self.batches, encoded or self.encoded(backbone, pruner)):
            state = advance(backbone, batch, start(batch), pruner, until=len(pruner.stops))
            for row, layouts in enumerate(backbone.layouts(inputs.prompt)):
                visual = sum(layout.count for layout in layouts)
                account = read(backbone, batch, row, state, row, layouts)
                tokens = account.kept / visual, account.mean_tokens, account.mean_tokens / visual, account.kv_ratio
                found.append((*tokens, account.decoder_ratio, account.ratio, 1 / visual))
        return Cost(*map(fmean, zip(*found)))


@dataclass(frozen=True)
class Setting:
    """What a method was set to for a budget, and what that costs on the samples it was found with."""

    keep: float
    knob: dict[str, Any]
    """What ``to_budget`` says of ``keep``."""
    options: dict[str, Any]
    cost: Cost

    def said(self) -> str:
        """What it is set to, and what that comes to."""
        reached = {name: round(getattr(self.cost, name), 3) for name in BUDGETS}
        found = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in reached.items())
        knob = ", ".join(f"{name}={shown(value)}" for name, value in self.knob.items() if value is not None)
        return f"with {knob} has {found}"

    def plain(self) -> dict[str, Any]:
        """For YAML."""
        return {"keep": self.keep, "options": dict(self.options), "reached": asdict(self.cost)}


def shown(value: Any) -> str:
    """A number, or a list of them, short."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def afford(method: Method, budget: Budget, calibration: Calibration) -> Setting | None:
    """The options with which ``method`` meets ``budget``; None where its file has no ``to_budget``.

    Raises:
        UserError: it cannot be met, or not by its ``to_budget`` alone.
    """
    import torch

    from glimpseprune.lookup import find

    to_budget = getattr(find("glimpseprune.pruners", method.module), "to_budget", None)
    if to_budget is None:
        return None
    encoded = None
    if not hasattr(method.pruner, "look"):
        with torch.inference_mode():
            encoded = calibration.encoded(method.backbone, method.pruner)
    tried: dict[float, Setting] = {}

    def cost(keep: float) -> float:
        try:
            knob = to_budget(keep, method.backbone)
        except UserError as error:
            raise UserError(f"budget.{budget.what}: {method.name}: {error}") from None
        options = {**method.options, **knob}
        with torch.inference_mode(), method.context():
            pruner = rebuilt(method, options)
            reached = calibration.cost(method.backbone, pruner, encoded)
        tried[keep] = Setting(keep, knob, options, reached)
        return budget.of(reached)

    best = tried[fit(cost, budget.wanted, budget.tolerance * budget.wanted / 4)]
    if not budget.met(best.cost):
        raise UserError(beyond(method, budget, tried))
    return best


def beyond(method: Method, budget: Budget, tried: Mapping[float, Setting]) -> str:
    """What to tell where a budget cannot be met."""
    least, most = (budget.of(tried[keep].cost) for keep in (LEAST, 1.0))
    said = f"budget.{budget.what}={budget.wanted:g}: {method.name} reaches "
    said += f"{least:.4g} (keep -> 0) to {most:.4g} (keep -> 1)"
    if least <= budget.wanted <= most:
        near = min((budget.of(setting.cost) for setting in tried.values()), key=lambda x: abs(x - budget.wanted))
        return f"{said}, nearest is {near:.4g}: give that, or a larger budget.tolerance"
    return f"{said}: give a budget in between, or other options.{method.module} (those that say where it prunes)"


def fit(cost: Callable[[float], float], wanted: float, close: float) -> float:
    """The fraction from :data:`LEAST` to 1 whose ``cost``, which grows with it, is nearest to ``wanted``; ``close`` is
    near enough. By false position and bisection in turn."""
    low, high = LEAST, 1.0
    tried = {keep: cost(keep) for keep in (low, high)}
    for attempt in range(TRIES):
        if not tried[low] < wanted < tried[high]:
            break
        share = (wanted - tried[low]) / (tried[high] - tried[low]) if attempt % 2 == 0 else 0.5
        keep = round(low + share * (high - low), 6)
        tried[keep] = cost(keep)
        if abs(tried[keep] - wanted) <= close:
            break
        low, high = (keep, high) if tried[keep] < wanted else (low, keep)
    return min(tried, key=lambda keep: (abs(tried[keep] - wanted), keep))


def rebuilt(method: Method, options: Mapping[str, Any]) -> Any:
    """The method's pruner with other options and the same weights."""
    pruner = build(method.module, options, method.backbone)
    pruner.load_state_dict(method.pruner.state_dict())
    if hasattr(pruner, "mimic"):  # which decides where another method does
        pruner.mimic(method.pruner.stops)
    return pruner
