"""New LoRA adapters out of weighted old ones: PEFT's `add_weighted_adapter`, its kinds and their arithmetic.

Each kind is one of four ways to thin and add tensors, applied to the factors A and B one by one or, with "_svd", to the
updates s B A themselves, which a singular value decomposition then splits again:

- linear: the weighted sum (task arithmetic, Ilharco et al. 2022).
- ties: keep the largest values, elect a sign for each place, average what agrees (Yadav et al. 2023, section 3).
- dare: drop values at random and scale up the rest (Yu et al. 2023, equation 4), then as linear or ties.
- magnitude_prune: keep the largest values, then as linear.

"cat" lays the factors one after the other, which is the sum of the updates exactly, at the sum of the ranks.

Trained rows of embeddings are combined by their differences from the base's, in the way that the kind adds; a module
that one of the adapters trains whole is taken as it is. (PEFT starts both anew from the base, in silence.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minipeft.adapter import AdaptedModel
from minipeft.attach import adapter_modules, add_adapter, config_of, set_trainable
from minipeft.biases import TrainedBias
from minipeft.copies import TrainedModule
from minipeft.lora.config import LoraConfig, is_pissa
from minipeft.lora.layer import LoraLayer
from minipeft.shorter import shortest_names
from minipeft.tokens.layer import TrainedRows

ELEMENTWISE = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
KINDS = ("cat", "svd", *ELEMENTWISE, "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


@dataclasses.dataclass(frozen=True)
class Combination:
    """The way in which adapters are combined (the arguments of PEFT's `add_weighted_adapter`).

    Args:
        kind: One of `KINDS`.
        svd_rank: Rank after a decomposition; by default the largest of the adapters'.
        svd_clamp: Clip the factors at this quantile of their values.
        svd_driver: torch.linalg.svd's, on CUDA.
        density: The share of the values that is kept, in (0, 1]; for every kind that thins.
        majority_sign_method: The sign of a place is that of the "total" of the values, or by "frequency" the commoner.
        generator: The random numbers of dare; torch's default generator without.

    Raises ValueError for values that are unknown, out of range or missing.
    """

    kind: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"combination_type must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.thinning in ("ties", "dare_linear", "dare_ties", "magnitude_prune") and self.density is None:
            raise ValueError(f"combination_type {self.kind!r} needs density, the share of the values to keep")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if self.majority_sign_method not in ("total", "frequency"):
            raise ValueError(f"majority_sign_method must be 'total' or 'frequency', got {self.majority_sign_method!r}")
        if self.svd_clamp is not None and not 0 <= self.svd_clamp <= 1:
            raise ValueError(f"svd_clamp is a quantile, in [0, 1], got {self.svd_clamp}")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ValueError(f"svd_rank must be positive, got {self.svd_rank}")

    @property
    def thinning(self) -> str:
        """The kind without the suffix "_svd"; "svd" alone is a linear one."""
        return "linear" if self.kind == "svd" else self.kind.removesuffix("_svd")

    def sum(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The combination of tensors of one shape, in float32 at least."""
        thinned = torch.stack([self._thin(tensor.to(torch.promote_types(tensor.dtype, torch.float32)))
                               for tensor in tensors])  # fmt: skip
        column = torch.tensor(weights, dtype=thinned.dtype, device=thinned.device)
        weighted = thinned * column.view(-1, *[1] * (thinned.dim() - 1))
        if not self.thinning.endswith("ties"):
            return weighted.sum(dim=0)
        votes = thinned if self.majority_sign_method == "total" else thinned.sign()
        elected = torch.where(votes.sum(dim=0) >= 0, 1, -1)
        agrees = thinned.sign() == elected
        return (weighted * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1.0)

    def _thin(self, x: Tensor) -> Tensor:
        if self.thinning == "linear" or self.density is None or self.density == 1:
            return x
        if self.thinning.startswith("dare"):
            device = x.device if self.generator is None else self.generator.device
            kept = torch.bernoulli(torch.full(x.shape, self.density, device=device), generator=self.generator)
            return x * kept.to(x) / self.density
        kept = torch.zeros_like(x).flatten()
        kept[x.abs().flatten().topk(int(self.density * x.numel())).indices] = 1
        return x * kept.view_as(x)


def add_weighted_adapter(
    model: AdaptedModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    generator: torch.Generator | None = None,
) -> None:
    """Add a LoRA adapter that is the weighted combination of others (PEFT's method); it is frozen and not active.

    Args:
        weights: One for each of `adapters`; may be negative.
        adapter_name: Of the new adapter; not taken yet.
        combination_type: One of `KINDS`; a single adapter is scaled, whichever is given.
        svd_full_matrices: Accepted for compatibility: the columns that it adds would be cut off again.
        generator: The random numbers of "dare" (not PEFT's).
        svd_rank, svd_clamp, svd_driver, density, majority_sign_method: See `Combination`.

    Raises ValueError for unknown adapters, adapters of other methods, LoftQ's, those that also train biases or lengths
        (DoRA), several that train one module whole (modules_to_save), and for arguments that do not go together.
    """
    if not adapters or len(set(adapters)) != len(adapters) or len(adapters) != len(weights):
        raise ValueError(f"adapters must be different names with a weight each, got {adapters} and {weights}")
    kind = combination_type if len(adapters) > 1 else "linear"
    how = Combination(kind, svd_rank, svd_clamp, svd_driver, density, majority_sign_method, generator)
    configs: dict[str, Any] = {adapter: config_of(model, adapter) for adapter in adapters}
    layers = _layers_to_combine(model, configs, how)
    copies, rows = _owners_of_copies(model, configs), _modules_with_rows(model, configs)
    paths = shortest_names(model, [path for path, layer in layers.items() if not layer.is_part])
    config = combined_config(layers, configs, how, paths)
    config.modules_to_save = list({name: None for c in configs.values() for name in c.modules_to_save or ()}) or None
    config.ensure_weight_tying = any(c.ensure_weight_tying for c in configs.values())
    config.trainable_token_indices = {path: _numbers(module, adapters) for path, module in rows.items()} or None
    add_adapter(model, adapter_name, config, init=False)
    weight_of = dict(zip(adapters, weights, strict=True))
    for layer in layers.values():
        new = combine_layer(layer, weight_of, layer.r[adapter_name], how)
        for factor, value in zip(layer.factors(adapter_name), new, strict=True):
            factor.data.copy_(value.view_as(factor))
    for whole, owner in copies:
        whole.modules_to_save[adapter_name].load_state_dict(whole.modules_to_save[owner].state_dict())
    for module in rows.values():
        module.trainable_tokens_delta[adapter_name].data.copy_(_combined_rows(module, weight_of, adapter_name, how))
    set_trainable(model, adapter_name, False)


def _layers_to_combine(model: AdaptedModel, configs: Mapping[str, Any], how: Combination) -> dict[str, LoraLayer]:
    """The layers, by dotted name, that at least one of the adapters has an update in."""
    for name, config in configs.items():
        if not isinstance(config, LoraConfig):
            raise ValueError(f"adapter {name!r} is no LoRA adapter ({type(config).__name__}): only those combine")
        if is_pissa(config.init_lora_weights) and not how.kind.endswith("svd"):
            raise ValueError(
                f"adapter {name!r} is PiSSA: combination_type {how.kind!r} adds up factors and would leave out "
                "what it started from; take 'svd'"
            )
        if config.target_parameters:
            raise ValueError(
                f"adapter {name!r} cannot be combined: it has target_parameters (add_weighted_adapter does not support "
                "targeting nn.Parameter)"
            )
        if config.lora_bias:
            raise ValueError(f"adapter {name!r} cannot be combined: its B has a bias, which no sum of factors has")
        if config.use_dora:
            raise ValueError(f"adapter {name!r} cannot be combined: DoRA's update is not linear in its tensors")
    layers = {}
    for path, module in adapter_modules(model):
        for name in configs:
            if isinstance(module, TrainedBias) and name in module.trained_bias:
                raise ValueError(f"adapter {name!r} cannot be combined: it trains {path}.bias, which no update adds to")
            if isinstance(module, LoraLayer) and name in module.lora_base:
                raise ValueError(
                    f"adapter {name!r} cannot be combined: it is LoftQ, with a weight of its own in {path}"
                )
        if isinstance(module, LoraLayer) and any(module.adapts(name) for name in configs):
            if getattr(module, "groups", 1) > 1 and how.kind not in ELEMENTWISE:
                raise ValueError(
                    f"combination_type {how.kind!r} needs updates of the weight's shape, and {path} has none: it is a "
                    "convolution in groups; take 'linear'"
                )
            layers[path] = module
    return layers


def _owners_of_copies(model: AdaptedModel, configs: Mapping[str, Any]) -> list[tuple[TrainedModule, str]]:
    """The modules that one of the adapters trains whole, with its name. Raises ValueError if several train one."""
    found = []
    for path, module in adapter_modules(model):
        owners = [name for name in configs if isinstance(module, TrainedModule) and name in module.modules_to_save]
        if len(owners) > 1:
            raise ValueError(
                "Cannot add weighted adapters if they target the same module with modules_to_save: "
                f"{', '.join(map(repr, owners))} train {path} whole"
            )
        found += [(module, owner) for owner in owners if isinstance(module, TrainedModule)]
    return found


def _modules_with_rows(model: AdaptedModel, configs: Mapping[str, Any]) -> dict[str, TrainedRows]:
    """The modules, by dotted name, in which adapters have trained rows of their own: not those that follow others."""
    return {
        path: module
        for path, module in adapter_modules(model)
        if isinstance(module, TrainedRows) and _numbers(module, list(configs))
    }


def _numbers(module: TrainedRows, adapters: Sequence[str]) -> list[int]:
    """The numbers of the rows that one of the adapters trains in `module`, sorted."""
    own = [name for name in adapters if name in module.row_keys and name not in module.row_leaders]
    return sorted({number for name in own for number in module.token_indices[name]})


@torch.no_grad()
def _combined_rows(module: TrainedRows, weights: Mapping[str, float], new: str, how: Combination) -> Tensor:
    """(tokens, features): the base's rows and the combination of the differences of the adapters' from them."""
    kind = dataclasses.replace(how, kind="linear") if how.kind == "cat" else how
    base = module.trainable_tokens_original[new]
    base = base.to(torch.promote_types(base.dtype, torch.float32))
    here = [name for name in weights if name in module.row_keys and name not in module.row_leaders]
    changes = []
    for name in here:
        place = [module.token_indices[new].index(number) for number in module.token_indices[name]]
        change = torch.zeros_like(base)
        change[place] = module.trainable_tokens_delta[name].to(base) - base[place]
        changes.append(change)
    return base + kind.sum(changes, [weights[name] for name in here])


@torch.no_grad()
def combine_layer(layer: LoraLayer, weights: Mapping[str, float], rank: int, how: Combination) -> tuple[Tensor, Tensor]:
    """(A (rank, in_features), B (out_features, rank)), to be used with scaling 1, of the adapters that `layer` has."""
    here = {adapter: weight for adapter, weight in weights.items() if layer.adapts(adapter)}
    if how.kind == "cat":
        return _pad(*_cat(layer, here), rank)
    if how.kind in ELEMENTWISE:
        return _pad(*_sum_of_factors(layer, here, how), rank)
    delta = how.sum([layer.delta_weight(adapter) for adapter in here], list(here.values()))
    left, values, right = torch.linalg.svd(delta, full_matrices=False, driver=how.svd_driver)
    lora_B, lora_A = left[:, :rank] * values[:rank], right[:rank]
    if how.svd_clamp is not None:
        # Sorted by hand: torch.quantile refuses more than 16 million values.
        ordered = torch.cat([lora_B.flatten(), lora_A.flatten()]).sort().values
        place = how.svd_clamp * (len(ordered) - 1)
        limit = torch.lerp(ordered[math.floor(place)], ordered[math.ceil(place)], place - math.floor(place))
        lora_A, lora_B = lora_A.clamp(-limit, limit), lora_B.clamp(-limit, limit)
    return _pad(lora_A, lora_B, rank)


def _cat(layer: LoraLayer, weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    factors = {adapter: layer.matrices(adapter) for adapter in weights}
    scaled = [factors[a][0] * w * layer.scaling[a] for a, w in weights.items()]
    return torch.cat(scaled, dim=0), torch.cat([lora_B for _, lora_B in factors.values()], dim=1)


def _sum_of_factors(layer: LoraLayer, weights: Mapping[str, float], how: Combination) -> tuple[Tensor, Tensor]:
    # The root of the weight goes to each factor, and its sign to one of them.
    scaled = [weight * layer.scaling[adapter] for adapter, weight in weights.items()]
    factors = [layer.matrices(adapter) for adapter in weights]
    lora_A = how.sum([lora_A for lora_A, _ in factors], [math.copysign(math.sqrt(abs(w)), w) for w in scaled])
    return lora_A, how.sum([lora_B for _, lora_B in factors], [math.sqrt(abs(w)) for w in scaled])


def _pad(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """With zeros up to `rank`."""
    missing = rank - len(lora_A)
    return torch.nn.functional.pad(lora_A, (0, 0, 0, missing)), torch.nn.functional.pad(lora_B, (0, missing))


def combined_config(
    layers: Mapping[str, LoraLayer], configs: Mapping[str, Any], how: Combination, target_modules: list[str]
) -> LoraConfig:
    """The config of the combination of the adapters in `configs`, whose layers (by dotted name) are `layers`.

    Its scaling is 1 everywhere.

    Raises ValueError for adapters of unlike ranks in a kind that adds their factors.
    """
    ranks = {a: max(layer.r[a] for layer in layers.values() if layer.adapts(a)) for a in configs}
    rank_pattern: dict[str, int] = {}
    if how.kind == "cat":
        r = sum(ranks.values())
    elif how.kind in ELEMENTWISE:
        r = max(ranks.values())
        for path, layer in layers.items():
            own = {layer.r[adapter] for adapter in configs if layer.adapts(adapter)}
            if len(own) > 1:
                raise ValueError(
                    f"combination_type {how.kind!r} adds up factors, so the adapters must have the same r; at {path} "
                    f"they have {sorted(own)}: 'cat' and 'svd' take any"
                )
            if own != {r}:
                rank_pattern[path] = own.pop()
    else:
        r = how.svd_rank or max(ranks.values())
    first = next(iter(configs.values()))
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=rank_pattern,
        alpha_pattern={path: float(rank) for path, rank in rank_pattern.items()},
        target_modules=target_modules,
        fan_in_fan_out=first.fan_in_fan_out,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
    )
