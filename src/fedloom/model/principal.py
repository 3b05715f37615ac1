"""LoRA that starts from a weight's principal part: FeDeRA (2404.18848, eqs. 3 and 4) and PiSSA (2404.02948).

    W0 = U S Vᵀ,   B0 = U_r (S_r / s)^(1/2)  (d_out, r),   A0 = (S_r / s)^(1/2) V_rᵀ  (r, d_in),   W_res = W0 − s·B0·A0

so W_res + s·B0·A0 is W0 again, to rounding. The decomposition is exact, in float64, and of the two signs that each direction can have
takes the one that makes the largest number of B0's column positive: whoever computes it comes to the same, to rounding, and no seed has
a part in it. Devices that started from different directions would be averaged to nonsense.
"""

from __future__ import annotations

import torch


def principal_factors(weight: torch.Tensor, rank: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A0 (r, d_in) and B0 (d_out, r), float32, of ``weight`` (d_out, d_in) in any precision.

    Raises:
        ValueError: the rank is higher than that of any such matrix.
    """
    highest = min(weight.shape)
    if rank > highest:
        raise ValueError(f"rank {rank} is more than a weight of {weight.shape[0]} × {weight.shape[1]} has; it can be at most {highest}")
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    root = (s / scaling).sqrt()
    return ((root * sign[0])[:, None] * vt).float(), (u * sign * root).float()
