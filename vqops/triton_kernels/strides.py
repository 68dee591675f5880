"""The strides that kernels take.

Triton compiles anew for an integer that is 1, or a multiple of 16, where it wasn't before. That is meant for the
strides of rows and dimensions, by which loads are vectorised, and for D. Counts of rows and codes are not specialized
(`do_not_specialize`), nor are the strides from head to head of what holds one number a row, nor any other from head to
head where D is no multiple of 16 (launch.py): an epoch's last batch takes the kernels of the others. N' and K' are
multiples of 128 and may be seen to be. What is left: rows that do not lie one behind the other, some of whose strides
follow their number; and an integer from 2^31 on has 64 bits, so a kernel of its own.
"""

from torch import Tensor


def strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """Of a tensor [H, ...]; without one, zeros. A single head's is 0: what it has would follow the number of rows."""
    if tensor is None:
        return (0,) * dimensions
    return (0 if tensor.shape[0] == 1 else tensor.stride(0), *tensor.stride()[1:])
