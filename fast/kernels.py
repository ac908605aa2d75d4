"""Triton kernels of the clip and its gradients, each in one pass over GPU memory.

torch's own operations need two passes forward and six backward, and broadcast a bound over the images at half the
memory bandwidth.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA
    triton = None

ROWS, COLUMNS = 4, 1024  # tile of a Triton program: images, neurons
PROGRAMS = 2048  # smallest number of programs that keeps the GPU busy


def available(device):
    """Return whether these kernels work for tensors on `device`."""
    return device.type == "cuda" and triton is not None


def clip(rows, level):
    """Return min(max(rows, 0), level) in the type of `rows` (N, F), computed in fp32; level: fp32 (F,), >= 0."""
    rows, out = rows.contiguous(), torch.empty_like(rows, memory_format=torch.contiguous_format)
    n, f = rows.shape
    grid = triton.cdiv(f, COLUMNS), triton.cdiv(n, ROWS)
    _clip[grid](rows, level, out, n, f, ROWS, COLUMNS)
    return out


def clip_gradients(grad, rows, level, to_rows=True):
    """Return the gradients of clip() for rows, (N, F) or None unless to_rows, and for level, fp32 (F,).

    That for level is summed over the images in fp32 in a fixed order. At a tie, rows = level, each gets half.
    """
    grad, rows = grad.contiguous(), rows.contiguous()
    n, f = rows.shape
    blocks = triton.cdiv(f, COLUMNS)
    tiles = triton.cdiv(triton.cdiv(n, ROWS), max(1, PROGRAMS // blocks))  # per program
    parts = triton.cdiv(n, ROWS * tiles)
    grad_rows = torch.empty_like(grad) if to_rows else None
    sums = torch.empty(parts, f, dtype=torch.float32, device=grad.device)
    to = grad_rows if to_rows else grad
    _clip_gradients[blocks, parts](grad, rows, level, to, sums, n, f, tiles, ROWS, COLUMNS, to_rows)
    return grad_rows, sums.sum(0)


if triton is not None:

    @triton.jit
    def _clip(rows, level, out, n, f, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        where, inside = row[:, None] * f + column[None], (row < n)[:, None] & (column < f)[None]
        x = tl.load(rows + where, mask=inside).to(tl.float32)
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        most = tl.load(level + column, mask=column < f)[None]
        tl.store(out + where, tl.minimum(x, most, propagate_nan=tl.PropagateNan.ALL), mask=inside)

    @triton.jit
    def _clip_gradients(
        grad, rows, level, grad_rows, sums, n, f,
        tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TO_ROWS: tl.constexpr,
    ):  # fmt: skip
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        row = tl.program_id(1).to(tl.int64) * ROWS * tiles + tl.arange(0, ROWS)
        most = tl.load(level + column, mask=column < f)[None]
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for _ in range(tiles):
            where, inside = row[:, None] * f + column[None], (row < n)[:, None] & (column < f)[None]
            x = tl.load(rows + where, mask=inside).to(tl.float32)
            g = tl.load(grad + where, mask=inside, other=0.0).to(tl.float32)
            g = tl.where(x > 0, g, 0.0)
            to_level = tl.where(x > most, g, tl.where(x == most, 0.5 * g, 0.0))
            total += to_level
            if TO_ROWS:
                tl.store(grad_rows + where, g - to_level, mask=inside)
            row += ROWS
        tl.store(sums + tl.program_id(1) * f + column, tl.sum(total, 0), mask=column < f)
