"""The numbers that may change between steps."""

from torch import nn

from vqops.quantizers.codebook.codebook import Codebook
from vqops.quantizers.options.checks import as_number, check_fraction, check_not_negative
from vqops.quantizers.options.numbers import Number, Numbers


class Settings(nn.Module):
    """Those of a quantizer, as attributes that read as floats."""

    _codebook: Codebook
    numbers: Numbers
    owner: str
    learnable_codebook: bool
    has_codebook_loss: bool

    commitment_weight = Number(check_not_negative)
    orthogonal_reg_weight = Number(
        check_not_negative,
        "codes that are a Parameter: it above 0 at construction, or learnable_codebook=True",
        lambda vq: isinstance(vq._codebook.embed, nn.Parameter),
    )
    codebook_diversity_loss_weight = Number(check_not_negative)
    codebook_diversity_temperature = Number(check_not_negative)
    sample_codebook_temp = Number(check_not_negative)
    directional_reparam_variance = Number(check_not_negative)
    sync_update_v = Number(check_fraction, "learnable_codebook=True", lambda vq: vq.learnable_codebook)

    @property
    def codebook_loss_weight(self) -> float | None:
        return self.numbers.values["codebook_loss_weight"] if self.has_codebook_loss else None

    @codebook_loss_weight.setter
    def codebook_loss_weight(self, value: float) -> None:
        if not self.has_codebook_loss:
            raise ValueError(f"{self.owner}: codebook_loss_weight is None: the codes share commitment_weight")
        value = as_number(self.owner, "codebook_loss_weight", value)
        check_not_negative(self.owner, codebook_loss_weight=value)
        self.numbers.set("codebook_loss_weight", value)

    @property
    def decay(self) -> float:
        """Of the moving averages; may be set between steps, for a warm-up."""
        return self._codebook.decay

    @decay.setter
    def decay(self, value: float) -> None:
        self._codebook.decay = value
