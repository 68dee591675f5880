"""GroupedResidualVQ: a ResidualVQ for each part of a vector."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vqops.ops.checks import check_floating
from vqops.quantizers.codebook.steps import take_steps_
from vqops.quantizers.interface.failure import joined
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
        if indices is not None and len(indices) != self.groups:
            raise ValueError(f"{self.owner}: indices must be those of groups={self.groups}, got {len(indices)}")
        parts = x.chunk(self.groups, self.split_dim)
        targets = [None] * self.groups if indices is None else indices
        levels = None if indices is not None else self.rvqs[0]._levels(x, rand_quantize_dropout_fixed_seed)
        kept = [rvq._kept_on_failure(part, freeze_codebook) for rvq, part in zip(self.rvqs, parts, strict=True)]
        with joined(kept):
            how = return_all_codes, sample_codebook_temp, freeze_codebook, beam_size, levels, lens
            every = zip(self.rvqs, parts, targets, strict=True)
            found = [rvq._quantize(part, mask, target, *how) for rvq, part, target in every]
            quantized, *others = zip(*(one.results for one in found), strict=True)
            take_steps_([step for one in found for step in one.steps])
            for rvq in self.rvqs:
                rvq._optimize_shared()
        quantized = torch.cat(quantized, self.split_dim)
        if indices is not None:
            return quantized, torch.stack(others[0]).sum()
        return quantized, *map(torch.stack, others)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices [groups, b, ..., q]: [groups, Q, b, ..., D], as ResidualVQ gives them."""
        return torch.stack([rvq.get_codes_from_indices(one) for rvq, one in self._of_groups(indices)])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The quantized vectors of indices [groups, b, ..., q], as ResidualVQ gives them."""
        parts = [rvq.get_output_from_indices(one) for rvq, one in self._of_groups(indices)]
        return torch.cat(parts, self.split_dim)

    def _of_groups(self, indices: Tensor) -> list[tuple[ResidualVQ, Tensor]]:
        if len(indices) != self.groups:
            raise ValueError(f"{self.owner}: indices must be those of groups={self.groups}, got {len(indices)}")
        return list(zip(self.rvqs, indices, strict=True))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, groups={self.groups}"
