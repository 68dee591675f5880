"""The options of quantizers: which values are allowed, and which of vector-quantize-pytorch's are yet to come."""

from numbers import Integral

NOT_YET = frozenset(
    (
        "affine_param",
        "affine_param_batch_decay",
        "affine_param_codebook_decay",
        "codebook_diversity_loss_weight",
        "codebook_diversity_temperature",
        "codebook_transform_fn",
        "commitment_use_cross_entropy_loss",
        "directional_reparam",
        "directional_reparam_variance",
        "in_place_codebook_optimizer",
        "manual_in_place_optimizer_update",
        "orthogonal_reg_active_codes_only",
        "orthogonal_reg_max_codes",
        "orthogonal_reg_weight",
        "sample_codebook_temp",
        "stochastic_sample_codes",
        "straight_through",
        "sync_affine_param",
        "sync_update_v",
        "vq_bridge",
    )
)


def refuse(call: str, options: dict) -> None:
    """Raise for arguments that are not in the signature of `call`."""
    for name in options:
        if name in NOT_YET:
            raise TypeError(f"{call}: {name} is not supported yet")
        raise TypeError(f"{call}: unexpected argument {name!r}")


def check_counts(owner: str, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{owner}: {name} must be an integer of at least 1, got {value!r}")


def check_not_negative(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{owner}: {name} must be finite and at least 0, got {value}")


def check_decay(owner: str, decay: float) -> None:
    if not 0 <= decay <= 1:
        raise ValueError(f"{owner}: decay must be in [0, 1], got {decay}")


def check_not_both(owner: str, **values: bool) -> None:
    if all(values.values()):
        raise ValueError(f"{owner}: {' and '.join(values)} can't both be True")
