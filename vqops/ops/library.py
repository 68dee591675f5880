"""Where ops are defined, their kernels registered, and an implementation is picked."""

from collections.abc import Callable
from functools import partial

import torch

from vqops import triton_kernels
from vqops.ops import regimes

try:
    from vqops import _C  # noqa: F401  importing it registers the compiled kernels
except ImportError as error:
    raise ImportError(
        "vqops._C is not built: run `pip install .` in the source folder and import vqops from elsewhere, "
        f"or `pip install -e .` to work on the source ({error})"
    ) from error

IMPLEMENTATIONS = ("compiled", "reference", "triton")
OPS: list[str] = []

library = torch.library.Library("vqops", "DEF")


# What `_C` registered, read before anything here is: the names of the compiled kernels of each device.
COMPILED = {
    device: {name for name in torch._C._dispatch_get_registrations_for_dispatch_key(key) if name.startswith("vqops::")}
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
}


# An op that sums by code has two kernels on CUDA: by atomic additions, and in a fixed order.
BY_ORDER = ("atomic", "sorted")


def is_compiled(name: str, device: str) -> bool:
    return f"vqops::{name}_compiled" in COMPILED[device] or (device == "cuda" and sums_by_code(name))


def sums_by_code(name: str) -> bool:
    return all(f"vqops::{name}_compiled_{order}" in COMPILED["cuda"] for order in BY_ORDER)


def by_order(atomic: Callable, in_order: Callable) -> Callable:
    """Follows torch.use_deterministic_algorithms as it is when the op runs; C++ cannot ask by the stable ABI."""

    def run(*arguments):
        return (in_order if torch.are_deterministic_algorithms_enabled() else atomic)(*arguments)

    return run


def define(
    name: str,
    schema: str,
    reference: Callable,
    fake: Callable,
    reference_fake: Callable | None = None,
    compiled_fake: Callable | None = None,
    triton_fake: Callable | None = None,
    *,
    fallback: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    backward_op: str | None = None,
) -> None:
    """Define `vqops::name`, which selects, and one op per implementation: `name_reference`, `name_compiled`, ...

    A compiled kernel registers itself for `name` and `name_compiled` under its device's key when `_C` is imported;
    on CUDA for `name_compiled` alone, or for `name_compiled_atomic` and `name_compiled_sorted` if it sums by code.
    `name` falls back on `fallback` (default: the reference) on every device without one, and on CUDA picks by
    regimes.py. `reference_fake`, `compiled_fake` and `triton_fake` are for an op whose result has another size there.
    `backward` gets as `op` the op `backward_op` in the implementation of the forward; that of `name` itself picks by
    its own regimes, since what a forward saves is the same in every implementation.
    """
    OPS.append(name)
    metas = {name: fake, f"{name}_reference": reference_fake or fake}
    if any(is_compiled(name, device) for device in COMPILED):
        metas[f"{name}_compiled"] = compiled_fake or fake
    if triton_kernels.has(name):
        metas[f"{name}_triton"] = triton_fake or fake
    for op, meta in metas.items():
        library.define(op + schema)
        torch.library.register_fake(f"vqops::{op}", meta, lib=library)
        if backward is not None:
            own = backward
            if backward_op is not None:
                own = partial(backward, op=getattr(torch.ops.vqops, backward_op + op.removeprefix(name)))
            torch.library.register_autograd(f"vqops::{op}", own, setup_context=setup_context, lib=library)
    library.impl(f"{name}_reference", reference, "CompositeExplicitAutograd")
    library.impl(name, fallback or reference, "CompositeExplicitAutograd")
    if sums_by_code(name):
        kernels = [f"{name}_compiled_{order}" for order in BY_ORDER]
        for kernel in kernels:
            library.define(kernel + schema)
        library.impl(f"{name}_compiled", by_order(*(getattr(torch.ops.vqops, kernel) for kernel in kernels)), "CUDA")
    if triton_kernels.has(name):
        library.impl(f"{name}_triton", triton_kernels.implementation(name), "CompositeExplicitAutograd")
    if any(row.op == name for row in regimes.ON_CUDA):
        library.impl(name, by_regime(name, fallback or reference), "CUDA")


def by_regime(name: str, fallback: Callable) -> Callable:
    """`vqops::name` on CUDA: the implementation of the call's regime, or `fallback`."""
    names = [argument.name for argument in getattr(torch.ops.vqops, name).default._schema.arguments]

    def run(*arguments):
        given = dict(zip(names, arguments, strict=False))  # without those at the end that have their default
        chosen = default_on_cuda(name, given)
        if chosen == "reference":
            return fallback(*arguments)
        # A preparation has the layout of who made it; to others it is as if there were none.
        if given.get("prepared") is not None and chosen != default_on_cuda("prepare", {"codebook": given["codebook"]}):
            given["prepared"] = None
        return getattr(torch.ops.vqops, f"{name}_{chosen}")(*given.values())

    return run


def default_on_cuda(name: str, arguments: dict) -> str:
    call = regimes.call_of(arguments)
    return regimes.choose(regimes.ON_CUDA, name, call, lambda each: each in available(name, "cuda"))


def select(name: str, implementation: str | None):
    """The op that `implementation=` names; None lets the device decide."""
    if implementation is None:
        return getattr(torch.ops.vqops, name)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{name}: implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "compiled" and not any(is_compiled(name, device) for device in COMPILED):
        raise ValueError(f"{name}: there is no compiled implementation; it runs as 'reference'")
    if implementation == "triton" and not triton_kernels.has(name):
        raise ValueError(f"{name}: there is no triton implementation, or no Triton (`pip install triton`)")
    return getattr(torch.ops.vqops, f"{name}_{implementation}")


def implementations() -> dict[str, dict[str, list[str]]]:
    """What each op can run as on each device, the default first; on CUDA what some calls take (`vqops info` says which)
    before the reference, which is there for all others.

    Returns e.g. `{"nearest": {"cpu": ["compiled", "reference"], "cuda": ["reference", "triton"]}, ...}`. "triton" is
    there for the CPU in Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
    """
    return {name: {device: available(name, device) for device in COMPILED} for name in OPS}


def available(name: str, device: str) -> list[str]:
    compiled, triton = is_compiled(name, device), triton_kernels.runs_on(name, device)
    every = ["compiled"] * compiled + ["reference"] + ["triton"] * triton
    if device == "cuda":
        first = [*dict.fromkeys(row.implementation for row in regimes.ON_CUDA if row.op == name), "reference"]
        every.sort(key=lambda each: first.index(each) if each in first else len(first))
    return every


def no_second_derivative(name: str) -> Callable:
    """A backward for ops that are themselves gradients: without it, second derivatives would be silently zero."""

    def backward(ctx, *gradients):
        raise NotImplementedError(f"{name}: the gradient of a gradient is not defined for a quantizer")

    return backward
