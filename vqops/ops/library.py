"""Where ops are defined, their kernels registered, and an implementation is picked."""

from collections.abc import Callable

import torch

try:
    from vqops import _C  # noqa: F401  importing it registers the compiled kernels
except ImportError as error:
    raise ImportError(
        "vqops._C is not built: run `pip install .` in the source folder and import vqops from elsewhere, "
        f"or `pip install -e .` to work on the source ({error})"
    ) from error

IMPLEMENTATIONS = ("compiled", "reference")
OPS: list[str] = []

library = torch.library.Library("vqops", "DEF")


# What `_C` registered, read before anything here is: the names of the compiled kernels of each device.
COMPILED = {
    device: {name for name in torch._C._dispatch_get_registrations_for_dispatch_key(key) if name.startswith("vqops::")}
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
}


def is_compiled(name: str, device: str) -> bool:
    return f"vqops::{name}_compiled" in COMPILED[device]


def define(
    name: str,
    schema: str,
    reference: Callable,
    fake: Callable,
    reference_fake: Callable | None = None,
    compiled_fake: Callable | None = None,
    *,
    fallback: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> None:
    """Define `vqops::name`, which selects, and one op per implementation: `name_reference`, `name_compiled`.

    A compiled kernel registers itself for `name` and `name_compiled` under its device's key when `_C` is imported.
    `name` falls back on `fallback` (default: the reference) on every device without one. `reference_fake` and
    `compiled_fake` are for an op whose result has another size there.
    """
    OPS.append(name)
    for op in (name, f"{name}_compiled", f"{name}_reference"):
        if op.endswith("_compiled") and not any(is_compiled(name, device) for device in COMPILED):
            continue
        library.define(op + schema)
        meta = {"reference": reference_fake, "compiled": compiled_fake}.get(op.rpartition("_")[2]) or fake
        torch.library.register_fake(f"vqops::{op}", meta, lib=library)
        if backward is not None:
            torch.library.register_autograd(f"vqops::{op}", backward, setup_context=setup_context, lib=library)
    library.impl(f"{name}_reference", reference, "CompositeExplicitAutograd")
    library.impl(name, fallback or reference, "CompositeExplicitAutograd")


def select(name: str, implementation: str | None):
    """The op that `implementation=` names; None lets the device decide."""
    if implementation is None:
        return getattr(torch.ops.vqops, name)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{name}: implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "compiled" and not any(is_compiled(name, device) for device in COMPILED):
        raise ValueError(f"{name}: there is no compiled implementation; it runs as 'reference'")
    return getattr(torch.ops.vqops, f"{name}_{implementation}")


def implementations() -> dict[str, dict[str, list[str]]]:
    """What each op can run as on each device, the default first.

    Returns e.g. `{"nearest": {"cpu": ["compiled", "reference"], "cuda": ["reference"]}, ...}`.
    """
    return {
        name: {device: ["compiled"] * is_compiled(name, device) + ["reference"] for device in COMPILED} for name in OPS
    }


def no_second_derivative(name: str) -> Callable:
    """A backward for ops that are themselves gradients: without it, second derivatives would be silently zero."""

    def backward(ctx, *gradients):
        raise NotImplementedError(f"{name}: the gradient of a gradient is not defined for a quantizer")

    return backward
