"""The options of residual quantizers: which values are allowed."""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from vqops.ops.search import LARGEST_K
from vqops.quantizers.options.checks import as_number, check_counts


def check_cutoff(owner: str, cutoff_index: int, num_quantizers: float) -> None:
    if not isinstance(cutoff_index, Integral) or not 0 <= cutoff_index < num_quantizers:
        raise ValueError(
            f"{owner}: quantize_dropout_cutoff_index must be an integer in [0, num_quantizers={num_quantizers}), "
            f"got {cutoff_index!r}"
        )


def beam_of(owner: str, name: str, beam_size: int | None) -> int | None:
    if beam_size is None:
        return None
    check_counts(owner, **{name: beam_size})
    if beam_size > LARGEST_K:
        raise ValueError(f"{owner}: {name} must be at most {LARGEST_K}, got {beam_size}")
    return beam_size


def score_weights(owner: str, given: Sequence[float] | None, num_quantizers: int) -> tuple[float, ...]:
    if given is None:
        return (1.0,) * num_quantizers
    name = "beam_score_quantizer_weights"
    if len(given) != num_quantizers:
        raise ValueError(f"{owner}: {name} must be num_quantizers={num_quantizers} numbers, got {len(given)}")
    weights = tuple(as_number(owner, name, weight) for weight in given)
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"{owner}: {name} must be finite and at least 0, got {list(given)}")
    return weights


def check_gradient_once(owner: str, diveq: bool, quant_grad_frac: float, vq_kwargs: dict[str, Any]) -> None:
    """The options that say themselves where the gradient of the output goes."""
    for name, given, neutral in (
        ("diveq", diveq, False),
        ("quant_grad_frac", quant_grad_frac, 0),
        ("route_gradients_to_input", vq_kwargs.get("route_gradients_to_input", True), True),
        ("directional_reparam", vq_kwargs.get("directional_reparam", False), False),
        ("sync_update_v", vq_kwargs.get("sync_update_v", 0), 0),
    ):
        if given != neutral:
            raise ValueError(f"{owner}: gradient_per_level=False needs {name}={neutral}, got {given}")
