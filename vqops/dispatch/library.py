"""Definition of ops, registration of their kernels, choice of an implementation."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from vqops import pytorch, reference, triton_kernels
from vqops.dispatch import choice
from vqops.dispatch.calls import OP_GRADIENTS, OpGradient
from vqops.dispatch.choice import Implementation

try:
    kernels = import_module("vqops._C")  # which registers the compiled ones
except ImportError as error:
    raise ImportError(
        "vqops._C is not built: run `pip install .` in the source folder and import vqops from elsewhere, "
        f"or `pip install -e .` to work on the source ({error})"
    ) from error

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
    fake: Callable | Mapping[str | None, Callable],
    *,
    autograd: Autograd | None = None,
    fallback: Callable | None = None,
    everywhere: Callable | None = None,
    decomposition: Callable | None = None,
) -> None:
    """Define `vqops::name`, which selects, and one op per implementation: `name_reference`, `name_compiled`, ...

    Those in PyTorch are the functions of this name in `vqops.reference` and `vqops.pytorch`, or `everywhere` is both.
    A compiled kernel registers itself for `name` and `name_compiled` under its device's key when `_C` is imported;
    on CUDA for `name_compiled` alone, or for `name_compiled_atomic` and `name_compiled_sorted` if it sums by code.
    `name` falls back on `fallback` (default: "pytorch") on every device without one, and on CUDA picks by choice.py.
    `decomposition`, in PyTorch's operators, is what exporters to ONNX put in the place of any of them.
    `fake` is one per implementation (None: of `name`) where their results differ in size.
    The backward of `name` itself picks by its own regimes, since what a forward saves is the same in all of them.
    """
    OPS.append(name)
    there = {
        None: True,
        "pytorch": True,
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
                of_gradient = getattr(torch.ops.vqops, op_name(autograd.op, implementation))
                gradient = OpGradient(autograd.setup_context, backward, of_gradient)
                OP_GRADIENTS[getattr(torch.ops.vqops, op)] = gradient
                backward = partial(backward, op=of_gradient)
            torch.library.register_autograd(f"vqops::{op}", backward, setup_context=autograd.setup_context, lib=library)
        if decomposition is not None:
            rule = decomposed_for_onnx(decomposition)
            torch.library.register_torch_dispatch(f"vqops::{op}", ProxyTorchDispatchMode, rule, lib=library)
    plain = {
        implementation: everywhere or getattr(module, name)
        for implementation, module in (("pytorch", pytorch), ("reference", reference))
    }
    for implementation, function in plain.items():
        library.impl(op_name(name, implementation), function, "CompositeExplicitAutograd")
    if there["compiled"]:
        library.impl(f"{name}_compiled", no_kernel(name), "CompositeExplicitAutograd")
    fallback = fallback or plain["pytorch"]
    library.impl(name, fallback, "CompositeExplicitAutograd")
    library.impl(name, by_regime(name, fallback, composed=fallback is not plain["pytorch"]), "CUDA")
    if sums_by_code(name):
        kernels = [f"{name}_compiled_{order}" for order in BY_ORDER]
        for kernel in kernels:
            library.define(kernel + schema, tags=torch.Tag.pt2_compliant_tag)
        library.impl(f"{name}_compiled", by_order(*(getattr(torch.ops.vqops, kernel) for kernel in kernels)), "CUDA")
    if there["triton"]:
        library.impl(f"{name}_triton", triton_kernels.implementation(name), "CompositeExplicitAutograd")


def decomposed_for_onnx(decomposition: Callable) -> Callable:
    """What tracing makes of an op. PyTorch's table of decompositions serves every tracer; `torch.compile` refuses ops
    that stand in it where the variable CI is set."""

    def trace(mode, op, types, args=(), kwargs=None):
        if not torch.onnx.is_in_onnx_export():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return decomposition(*args, **(kwargs or {}))

    return trace


def no_kernel(name: str) -> Callable:
    def refuse(*arguments):
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor)).type
        why = f": CUDA is {kernels.cuda}" if device == "cuda" else ""
        raise RuntimeError(f"{name}: implementation 'compiled' has no kernel for {device}{why}")

    return refuse


def op_name(name: str, implementation: str | None) -> str:
    return name if implementation is None else f"{name}_{implementation}"


def by_regime(name: str, fallback: Callable, composed: bool = False) -> Callable:
    """`vqops::name` on CUDA: the implementation of the call's regime, or `fallback`, which may be composed of ops."""
    names = [argument.name for argument in getattr(torch.ops.vqops, name).default._schema.arguments]

    def run(*arguments):
        given = dict(zip(names, arguments, strict=False))  # without those at the end that have their default
        chosen = default_on_cuda(name, given)
        if chosen == "pytorch" and composed:
            return fallback(*arguments)
        # A preparation has the layout of who made it; to others it is as if there were none.
        if given.get("prepared") is not None:
            codebook = choice.codes_of(given)
            if chosen != default_on_cuda("prepare", {"codebook": codebook}):
                given["prepared"] = None
        return (fallback if chosen == "pytorch" else getattr(torch.ops.vqops, f"{name}_{chosen}"))(*given.values())

    return run


def default_on_cuda(name: str, arguments: dict) -> str:
    device = choice.tensors_of(arguments)[0].device
    return chosen(choice.table(device), device, name, choice.call_of(arguments))


@lru_cache(4096)  # else a small search would wait longer for this than for its launches
def chosen(table: choice.Table, device: torch.device, name: str, call: choice.Call) -> str:
    def built(implementation):
        runs = implementation != "triton" or triton_kernels.why_not(device) is None
        return runs and implementation in available(name, "cuda")

    return choice.choose(table.rows, name, call, built)


def resolve(implementation: Implementation | None) -> Implementation | None:
    """Of a call: its own, or the one that `use_implementation` names; None lets the device decide."""
    return choice.named if implementation is None else implementation


def select(name: str, implementation: Implementation | None) -> Callable:
    """The op that `implementation=` names, or else `use_implementation`, or that lets the device decide."""
    if implementation is None:
        if choice.named == "triton" and not triton_kernels.installed():
            raise ValueError(f"{name}: implementation 'triton' is named, but there is no Triton (`pip install triton`)")
        chosen = choice.named if choice.named is None or has(name, choice.named) else None
        return getattr(torch.ops.vqops, op_name(name, chosen))
    choice.check_name(implementation, f"{name}: implementation")
    if not has(name, implementation):
        why = "; it runs as 'pytorch'" if implementation == "compiled" else ", or no Triton (`pip install triton`)"
        raise ValueError(f"{name}: there is no {implementation} implementation{why}")
    return getattr(torch.ops.vqops, op_name(name, implementation))


def takes_cpu_kernel(t: Tensor, implementation: Implementation | None = None) -> bool:
    """Whether a call with this tensor runs as compiled on a CPU, if the op has that."""
    return t.device.type == "cpu" and resolve(implementation) in (None, "compiled")


def has(name: str, implementation: Implementation) -> bool:
    """Whether the op has the implementation, on any device."""
    if implementation == "compiled":
        return any(is_compiled(name, device) for device in COMPILED)
    return implementation != "triton" or triton_kernels.has(name)


def implementations() -> dict[str, dict[str, list[str]]]:
    """The implementations of each op on each device, the default first; on CUDA those that some calls take (see
    `vqops info`) before "pytorch", which takes the others.

    Returns e.g. `{"nearest": {"cpu": ["compiled", "pytorch", "reference"], "cuda": ["pytorch", ...]}, ...}`. "triton"
    is there for the CPU in Triton's interpreter (TRITON_INTERPRET=1), which is for tests. What `use_implementation`
    names comes first.
    """
    return {name: {device: by_default(name, device) for device in COMPILED} for name in OPS}


def available(name: str, device: str) -> list[str]:
    compiled, triton = is_compiled(name, device), triton_kernels.runs_on(name, device)
    return ["compiled"] * compiled + ["pytorch", "reference"] + ["triton"] * triton


def by_default(name: str, device: str) -> list[str]:
    every = available(name, device)
    first = [choice.named] if choice.named is not None else []
    if device == "cuda":
        rows = choice.table(torch.device("cuda", torch.cuda.current_device())).rows if torch.cuda.is_available() else ()
        first += [*(row.implementation for row in rows if row.op == name), "pytorch"]
    return sorted(every, key=lambda each: first.index(each) if each in first else len(first))
