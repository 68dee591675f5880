"""Definition of ops, registration of their kernels, choice of an implementation."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Literal, NamedTuple, get_args

import torch

from vqops import triton_kernels
from vqops.dispatch import choice

try:
    kernels = import_module("vqops._C")  # which registers the compiled ones
except ImportError as error:
    raise ImportError(
        "vqops._C is not built: run `pip install .` in the source folder and import vqops from elsewhere, "
        f"or `pip install -e .` to work on the source ({error})"
    ) from error

Implementation = Literal["compiled", "reference", "triton"]
IMPLEMENTATIONS = get_args(Implementation)
OPS: list[str] = []

library = torch.library.Library("vqops", "DEF")


# The names of the compiled kernels of each device: what `_C` registered, read before anything is registered here.
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


class Autograd(NamedTuple):
    """An op's gradient, in the words of `torch.library.register_autograd`."""

    setup_context: Callable
    backward: Callable
    op: str | None = None  # backward gets, as `op`, this one in the implementation of the forward


def without_gradient() -> Autograd:
    def refuse(ctx, *gradients):
        raise AssertionError("no output of this op carries a gradient")

    def mark(ctx, inputs, output):
        ctx.mark_non_differentiable(*(output if isinstance(output, tuple) else (output,)))

    return Autograd(mark, refuse)


def without_second_derivative(name: str) -> Autograd:
    """Of ops that are themselves gradients: otherwise second derivatives would be silently zero."""

    def refuse(ctx, *gradients):
        raise NotImplementedError(f"{name}: the gradient of a gradient is not defined for a quantizer")

    return Autograd(lambda ctx, inputs, output: None, refuse)


def define(
    name: str,
    schema: str,
    reference: Callable,
    fake: Callable | Mapping[str | None, Callable],
    *,
    autograd: Autograd | None = None,
    fallback: Callable | None = None,
) -> None:
    """Define `vqops::name`, which selects, and one op per implementation: `name_reference`, `name_compiled`, ...

    A compiled kernel registers itself for `name` and `name_compiled` under its device's key when `_C` is imported;
    on CUDA for `name_compiled` alone, or for `name_compiled_atomic` and `name_compiled_sorted` if it sums by code.
    `name` falls back on `fallback` (default: the reference) on every device without one, and on CUDA picks by
    choice.py. `fake` is one per implementation (None: of `name`) where their results differ in size.
    The backward of `name` itself picks by its own regimes, since what a forward saves is the same in all of them.
    """
    OPS.append(name)
    there = {
        None: True,
        "reference": True,
        "compiled": any(is_compiled(name, device) for device in COMPILED),
        "triton": triton_kernels.has(name),
    }
    for implementation in (each for each, exists in there.items() if exists):
        op = op_name(name, implementation)
        library.define(op + schema, tags=torch.Tag.pt2_compliant_tag)
        meta = fake[implementation] if isinstance(fake, Mapping) else fake
        torch.library.register_fake(f"vqops::{op}", meta, lib=library)
        if autograd is not None:
            backward = autograd.backward
            if autograd.op is not None:
                backward = partial(backward, op=getattr(torch.ops.vqops, op_name(autograd.op, implementation)))
            torch.library.register_autograd(f"vqops::{op}", backward, setup_context=autograd.setup_context, lib=library)
    fallback = fallback or reference
    library.impl(f"{name}_reference", reference, "CompositeExplicitAutograd")
    library.impl(name, fallback, "CompositeExplicitAutograd")
    library.impl(name, by_regime(name, fallback), "CUDA")
    if sums_by_code(name):
        kernels = [f"{name}_compiled_{order}" for order in BY_ORDER]
        for kernel in kernels:
            library.define(kernel + schema, tags=torch.Tag.pt2_compliant_tag)
        library.impl(f"{name}_compiled", by_order(*(getattr(torch.ops.vqops, kernel) for kernel in kernels)), "CUDA")
    if there["triton"]:
        library.impl(f"{name}_triton", triton_kernels.implementation(name), "CompositeExplicitAutograd")


def op_name(name: str, implementation: str | None) -> str:
    return name if implementation is None else f"{name}_{implementation}"


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
    call = choice.call_of(arguments)
    return choice.choose(choice.ON_CUDA, name, call, lambda each: each in available(name, "cuda"))


def select(name: str, implementation: Implementation | None) -> Callable:
    """The op that `implementation=` names; None lets the device decide."""
    if implementation is None:
        return getattr(torch.ops.vqops, name)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{name}: implementation must be None or one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation == "compiled" and not any(is_compiled(name, device) for device in COMPILED):
        raise ValueError(f"{name}: there is no compiled implementation; it runs as 'reference'")
    if implementation == "triton" and not triton_kernels.has(name):
        raise ValueError(f"{name}: there is no triton implementation, or no Triton (`pip install triton`)")
    return getattr(torch.ops.vqops, op_name(name, implementation))


def implementations() -> dict[str, dict[str, list[str]]]:
    """The implementations of each op on each device, the default first; on CUDA those that some calls take (see
    `vqops info`) before the reference, which takes the others.

    Returns e.g. `{"nearest": {"cpu": ["compiled", "reference"], "cuda": ["reference", "triton"]}, ...}`. "triton" is
    there for the CPU in Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
    """
    return {name: {device: available(name, device) for device in COMPILED} for name in OPS}


def available(name: str, device: str) -> list[str]:
    compiled, triton = is_compiled(name, device), triton_kernels.runs_on(name, device)
    every = ["compiled"] * compiled + ["reference"] + ["triton"] * triton
    if device == "cuda":
        first = [*dict.fromkeys(row.implementation for row in choice.ON_CUDA if row.op == name), "reference"]
        every.sort(key=lambda each: first.index(each) if each in first else len(first))
    return every
