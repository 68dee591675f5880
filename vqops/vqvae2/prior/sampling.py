"""Drawing codes from priors, one after the other, with everything computed so far kept."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vqops.vqvae2.errors import Field, InputError
from vqops.vqvae2.prior.options import DrawingOptions
from vqops.vqvae2.prior.transformer import Prior


@torch.no_grad()
def draw_levels(
    priors: list[Prior],  # bottom to top
    labels: Tensor,  # [B], a prior's `no_class` for "not said"
    options: DrawingOptions,
    generator: torch.Generator,
    given: tuple[Tensor, ...] | None = None,  # per level [B, rows, w]: the first rows of the codes
) -> tuple[Tensor, ...]:  # per level [B, h, w] int64
    """Draw each level from the top down, the ones below given those above."""
    drawn: tuple[Tensor, ...] = ()
    for level in reversed(range(len(priors))):
        known = None if given is None else given[level]
        drawn = (draw(priors[level], drawn, labels, options, generator, known), *drawn)
    return drawn


@torch.no_grad()
def draw(
    prior: Prior,
    above: tuple[Tensor, ...],  # [B, h, w] of the levels above, nearest first
    labels: Tensor,  # [B]
    options: DrawingOptions,
    generator: torch.Generator,
    known: Tensor | None = None,  # [B, rows, w]
) -> Tensor:  # [B, h, w] int64
    """Codes of one level, row by row. With guidance s the logits are l(no class) + s (l(class) - l(no class))."""
    B, (height, width) = len(labels), prior.config.size
    guided = options.guidance != 1 and bool((labels != prior.no_class).any())
    if guided:  # both halves in one batch
        labels = torch.cat([labels, torch.full_like(labels, prior.no_class)])
        above = tuple(torch.cat([codes, codes]) for codes in above)
    before, addend = prior.context(above, labels)
    known = before.new_zeros((B, 0), dtype=torch.int64) if known is None else known.flatten(1)
    caches, codes = prior.caches(before), []
    for position in range(prior.config.length):
        logits = prior.step(before, addend, caches).float()
        if guided:
            with_class, without = logits.chunk(2)
            logits = without + options.guidance * (with_class - without)
        if not logits.isfinite().all():
            found = f"the prior of level {prior.config.level} gives logits that are not finite"
            raise InputError(f"{found}: its file is damaged, or ", Field("guidance"), f" {options.guidance} too high")
        if position < known.shape[1]:
            code = known[:, position]
        else:
            code = choose(logits, options.temperature, options.top_k, options.top_p, generator)
        codes.append(code)
        before = prior.codes(torch.cat([code, code]) if guided else code)[:, None]
    return torch.stack(codes, dim=1).view(B, height, width)


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """One code a row of logits [B, K]: softmax(logits / temperature), cut to the likeliest; [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    if not top_k and top_p == 1:  # no need to sort
        return torch.multinomial(F.softmax(logits / temperature, -1), 1, generator=generator).squeeze(-1)
    ordered, codes = (logits / temperature).sort(-1, descending=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    probabilities = F.softmax(ordered, -1)
    if top_p < 1:  # a code stays if those before it have less than top_p: always the first
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    place = torch.multinomial(probabilities, 1, generator=generator)
    return codes.gather(-1, place).squeeze(-1)
