"""RandomProjectionQuantizer: fixed codes of fixed random projections, as targets for a model to predict."""

import torch
from torch import Tensor, nn

from vqops.ops.checks import check_device
from vqops.quantizers.interface.layout import Layout
from vqops.quantizers.options.checks import check_counts
from vqops.quantizers.vector_quantize import VectorQuantize


class RandomProjectionQuantizer(nn.Module):
    """The nearest code, by direction, of a random projection of each vector, in each of several codebooks: BEST-RQ.

        e_h = argmax_k cos(P_h norm(x), c_hk),  norm(x) = (x - mean of x) / standard deviation of x, over the features.

    Nothing is learnt: projections and codes stay as they are drawn. The module is always in eval. Projections are
    computed in float64, also under autocast, and codes and projections stay float32 through casts, so that a vector's
    targets do not depend on the precision that the model is trained in, nor on its batch.

    Arguments:
        dim: features of the input.
        codebook_size: number of codes of each codebook, K.
        codebook_dim: features of a projection and of a code.
        num_codebooks: each has a projection of its own.
        norm: False: x is projected as it is.
        further ones: those of VectorQuantize, but for what is decided here.

    Raises TypeError or ValueError for arguments that don't fit.

    Arguments, results and, for one codebook, `state_dict` are those of vector-quantize-pytorch; docs/differences.md
    lists where the behaviour differs on purpose. Source: Chiu et al. 2022 (arXiv 2202.01855).
    """

    rand_projs: Tensor  # [num_codebooks, dim, codebook_dim]

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        codebook_dim: int,
        num_codebooks: int = 1,
        norm: bool = True,
        **kwargs,
    ):
        owner = type(self).__name__
        check_counts(owner, dim=dim, codebook_dim=codebook_dim, num_codebooks=num_codebooks)
        super().__init__()
        self.owner = owner  # for messages
        self.dim = dim
        self.num_codebooks = num_codebooks
        projections = torch.empty(num_codebooks, dim, codebook_dim, dtype=torch.float32)
        self.register_buffer("rand_projs", nn.init.xavier_normal_(projections))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False) if norm else nn.Identity()
        self.vq = VectorQuantize(
            dim=codebook_dim * num_codebooks,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            heads=num_codebooks,
            separate_codebook_per_head=True,
            use_cosine_sim=True,
            freeze_codebook=True,
            **kwargs,
        )
        self.vq.owner = self.vq._codebook.owner = owner
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """The codes of x, or the cross entropy of given ones.

        Arguments:
            x: [b, ..., dim], float32, float64, float16 or bfloat16.
            indices: integers, shaped as returned, -1 is left out. The result is then their mean cross entropy () under
                the softmax of the cosines, whose gradient reaches x.

        Returns:
            indices: int64 [b, ...], with num_codebooks > 1 [b, ..., num_codebooks]; -1 for vectors with a NaN or Inf.

        Raises TypeError or ValueError for inputs that don't fit, IndexError for indices that are no codes.
        """
        Layout(self.owner, self.dim, 1, False, False, None).check_input(x)
        check_device(self.owner, x, projections=self.rand_projs)
        projections = self.rand_projs.transpose(0, 1).flatten(1)  # [dim, num_codebooks * codebook_dim]
        with torch.autocast(x.device.type, enabled=False):
            projected = self.norm(x.double()) @ projections.double()
        projected = projected.to(torch.promote_types(x.dtype, torch.float32))
        return self.vq(projected, indices)[1]

    def train(self, mode: bool = True) -> "RandomProjectionQuantizer":
        return super().train(False)

    def _apply(self, fn, recurse=True):
        projections = self.rand_projs
        super()._apply(fn, recurse)
        if self.rand_projs.dtype != projections.dtype:
            self.rand_projs = projections.to(self.rand_projs.device)
        return self

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_codebooks={self.num_codebooks}"
