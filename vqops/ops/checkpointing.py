"""Activation checkpointing repeats a forward within backward, where a step that updates the codebook must not run."""

import torch
from torch import Tensor

from vqops.dispatch.library import define


def check_first_run(codebook: Tensor, owner: str) -> None:
    """Raise RuntimeError if this forward runs within a backward: the codes are no longer those of its first run.

    The caller, a module of class `owner`, searches `codebook` afterwards. In a compiled graph the check is an op that
    claims to change it, so that whatever repeats the search, also a graph that recomputes it for its backward, repeats
    the check before.
    """
    if torch.compiler.is_compiling():
        torch.ops.vqops.check_first_run_(codebook.detach(), owner)
    else:
        raise_within_backward(codebook, owner)


def raise_within_backward(codebook: Tensor, owner: str) -> None:
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{owner}: forward runs again inside backward (activation checkpointing), but the first run has updated "
            "the codebook already; leave the quantizer out of the checkpointed part, or freeze_codebook"
        )


def fake_check_first_run_(codebook, owner):
    return None


define(
    "check_first_run_",
    "(Tensor(a!) codebook, str owner) -> ()",
    fake_check_first_run_,
    everywhere=raise_within_backward,
)
