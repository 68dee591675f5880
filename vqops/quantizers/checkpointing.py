"""Activation checkpointing repeats a forward within backward, where a step that updates the codebook must not run."""

import torch
from torch import Tensor


def check_first_run(codebook: Tensor) -> None:
    """Raise RuntimeError if this forward runs within a backward: the codes are no longer those of its first run.

    The caller searches `codebook` afterwards. In a compiled graph the check is an op that claims to change it, so that
    whatever repeats the search, also a graph that recomputes it for its backward, repeats the check before.
    """
    if torch.compiler.is_compiling():
        torch.ops.vqops.check_first_run_(codebook)
    else:
        raise_within_backward()


def raise_within_backward() -> None:
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "VectorQuantize: forward runs again inside backward (activation checkpointing), but the first run has "
            "updated the codebook already; leave the quantizer out of the checkpointed part, or freeze_codebook"
        )


@torch.library.custom_op("vqops::check_first_run_", mutates_args=("codebook",))
def check_first_run_(codebook: Tensor) -> None:
    raise_within_backward()


@check_first_run_.register_fake
def fake(codebook):
    return None
