"""GroupedResidualVQ: a ResidualVQ for each part of a vector."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vqops.ops.checks import check_floating
from vqops.quantizers.codebook.failure import joined
from vqops.quantizers.codebook.steps import take_steps_
from vqops.quantizers.options.checks import check_counts
from vqops.quantizers.residual_vq import ResidualVQ


class GroupedResidualVQ(nn.Module):
    """Cut each vector in groups of equal size, and quantize each by a ResidualVQ of its own (`rvqs`): HiFi-Codec.

    Arguments:
        dim: features of the input, a multiple of groups.
        groups: how many parts.
        kwargs: of each ResidualVQ, whose dim is dim / groups. Under quantize_dropout all groups use the same levels.

    In a `torch.distributed` job a step is one collective for all levels of all groups. Arguments, results and
    `state_dict` are those of vector-quantize-pytorch. Source: Yang et al. 2023 (arXiv 2305.02765).
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **kwargs):
        super().__init__()
        self.owner = type(self).__name__  # for messages
        check_counts(self.owner, dim=dim, groups=groups)
        if dim % groups:
            raise ValueError(f"{self.owner}: dim must be a multiple of groups={groups}, got {dim}")
        self.dim = dim
        self.groups = groups
        self.accept_image_fmap = accept_image_fmap
        kwargs |= {"dim": dim // groups, "accept_image_fmap": accept_image_fmap}
        self.rvqs = nn.ModuleList(ResidualVQ(**kwargs) for _ in range(groups))
        for number, rvq in enumerate(self.rvqs):
            rvq.owner = f"{self.owner}, group {number}"

    @property
    def codebooks(self) -> Tensor | tuple[tuple[Tensor, ...], ...]:  # [groups, Q, K, D], or tuples if the sizes differ
        codebooks = tuple(rvq.codebooks for rvq in self.rvqs)
        return torch.stack(codebooks) if self.rvqs[0].uniform_codebook_size else codebooks

    @property
    def split_dim(self) -> int:
        return 1 if self.rvqs[0]._layout.features_second else -1

    def forward(
        self,
        x: Tensor,  # [b, ..., dim], or [b, dim, ...]
        indices: Tensor | Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: Tensor | float | None = None,
        freeze_codebook: bool | None = None,
        mask: Tensor | None = None,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
        lens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantize x: (quantized, indices, losses). In training then update the codes.

        Arguments and results are those of ResidualVQ; indices [groups, b, ..., Q], losses [groups, Q] and the codes of
        return_all_codes [groups, Q, b, ..., D] have the groups in front.
        """
        check_floating(self.owner, x=x)
        if x.dim() < 2 or x.shape[self.split_dim] != self.dim:
            raise ValueError(f"{self.owner}: x must have dim={self.dim} in axis {self.split_dim}, got {list(x.shape)}")
        targets = [None] * self.groups if indices is None else self._of_each(indices)
        asked = return_all_codes, sample_codebook_temp, freeze_codebook, beam_size, lens
        first, parts = self.rvqs[0], x.chunk(self.groups, self.split_dim)
        every = list(zip(self.rvqs, parts, targets, strict=True))
        requests = [rvq._request(part, mask, target, *asked) for rvq, part, target in every]
        kept = [rvq._kept_on_failure(request) for rvq, request in zip(self.rvqs, requests, strict=True)]
        with joined([context for contexts in kept for context in contexts]):
            levels = first._levels(parts[0], requests[0], rand_quantize_dropout_fixed_seed)
            each = zip(self.rvqs, parts, requests, strict=True)
            found = [rvq._quantize(part, request, levels) for rvq, part, request in each]
            quantized, *others = zip(*(one.results for one in found), strict=True)
            take_steps_([step for one in found for step in one.steps])
            for rvq, request in zip(self.rvqs, requests, strict=True):
                rvq._optimize_shared(request)
        quantized = torch.cat(quantized, self.split_dim)
        if indices is not None:
            return quantized, torch.stack(others[0]).sum()
        return quantized, *map(torch.stack, others)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices [groups, b, ..., q]: [groups, Q, b, ..., D], as ResidualVQ gives them."""
        parts = zip(self.rvqs, self._of_each(indices), strict=True)
        return torch.stack([rvq.get_codes_from_indices(one) for rvq, one in parts])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The quantized vectors of indices [groups, b, ..., q], as ResidualVQ gives them."""
        parts = zip(self.rvqs, self._of_each(indices), strict=True)
        return torch.cat([rvq.get_output_from_indices(one) for rvq, one in parts], self.split_dim)

    def _of_each(self, indices: Tensor | Sequence[Tensor]) -> list:
        if not isinstance(indices, Tensor | Sequence):
            raise TypeError(f"{self.owner}: indices must be a tensor or a sequence, got {type(indices).__name__}")
        if len(indices) != self.groups:
            raise ValueError(f"{self.owner}: indices must be those of groups={self.groups}, got {len(indices)}")
        return list(indices)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, groups={self.groups}"
