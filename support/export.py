"""Export of a network to a file that needs torch alone."""

import copy
import io
from pathlib import Path

import torch

import utils


def write_export(model, path, size=32):
    """Write `model`, with its bounds and normalization, to `path` by torch.export, whole or not at all.

    The exported program maps float images (N, 3, size, size) in [0, 1], any N, to logits (N, classes), in fp32 on a
    CPU: `torch.export.load(path).module()(images)`. Nothing is written where `path` is None. Raises InputError where
    `path` cannot be written, and what torch.export raises for a network that it cannot trace.
    """
    if path is None:
        return
    model = copy.deepcopy(model).cpu().float().eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.contiguous()
    images, file = torch.rand(2, 3, size, size), io.BytesIO()
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("n")},), strict=False)
    torch.export.save(program, file)
    utils.write_whole(path, lambda p: Path(p).write_bytes(file.getvalue()))
    print(f"wrote {path}: torch.export.load({str(path)!r}).module() takes images in [0, 1] to logits")
