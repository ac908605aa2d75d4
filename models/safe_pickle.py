"""Checkpoints from elsewhere: the tensors and plain values out of a file, without running code that the file names.

Whole pickled networks (the authors' `models.resnet.ResNet`, torchvision's, timm's), numpy's numbers and arrays, PIL's
images and argparse's settings are read through stand-ins: each name that such an object may ask for is mapped to an
inert record before the file is read, so that neither what is named nor anything else is ever called. Any other name is
refused.
"""

import math
import pickle
import re
import warnings
import zipfile

import numpy as np
import torch

MAX_MODULES = 10_000
AUTHORS_CLASSES = ("models.resnet.ResNet", "models.resnet.BasicBlock", "models.custom_modules.SequentialWithArgs")
# the modules whose layers a whole pickled network may name
LAYERS = ("torch.nn.modules.", "torchvision.models.", "torchvision.ops.", "timm.models.", "timm.layers.")
# keys under which files often hold their state dict
AROUND = ("state_dict", "model_state_dict", "net", "netC", "clsmodel", "model")
PREFIXES = ("module.", "model.", "_orig_mod.", "1.")  # 1.: of a Sequential whose first part has no weights


class _Held:
    """What stands in for something foreign: what it was called with and its state, and nothing that could run."""

    args, state = (), None

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class _Module(_Held):
    """Stands in for a pickled module, with its attributes."""

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Number(_Held):
    """Stands in for numpy's scalar(dtype, bytes)."""


class _Array(_Held):
    """Stands in for numpy's _reconstruct(ndarray, shape, code), whose state has the content."""


class _DType(_Held):
    """Stands in for numpy's dtype(code, align, copy), whose state has the order of the bytes."""


class _Picture(_Held):
    """Stands in for PIL's Image."""


STAND_INS = {
    **{f"numpy.{core}.multiarray.scalar": _Number for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    "numpy.ndarray": _Held,
    "numpy.dtype": _DType,
    "PIL.Image.Image": _Picture,
    "argparse.Namespace": _Held,  # the settings that timm and others save beside the weights
    "functools.partial": _Held,  # of a layer's class, within torchvision's networks
    **dict.fromkeys(AUTHORS_CLASSES, _Module),
}


def _stand_in(name):
    return STAND_INS.get(name) or (_Module if name.startswith(LAYERS) else None)


def read_file(path):
    """Return what a file holds, written by torch.save (see read_pickle) or by safetensors: a dictionary.

    Raises ValueError, in one line, for any other content, and for safetensors where that library is not there.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    # safetensors: the length of a header, and the header, which is JSON
    if start[8:9] != b"{" or not 2 <= int.from_bytes(start[:8], "little") < 10**8:
        return read_pickle(path)
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError("it is in the format of safetensors; pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as error:  # whatever a damaged file makes the library raise
        raise ValueError(f"it is damaged ({' '.join(str(error).split())[:160]})") from None


def read_pickle(path):
    """Return the dictionary of plain values and tensors, on the CPU, in a file written by torch.save.

    A whole pickled network becomes its state dict, whether it is the content or a value in it. Numbers of numpy become
    Python's, its arrays tensors; a PIL image becomes {"mode", "size", "palette", "data"}; anything else of numpy stays
    an inert record. Files are loaded with weights_only=True alone. Whole objects in the format of torch before 1.6
    cannot be read that way and are refused.
    Raises ValueError, in one line, for any other content (code that wants to run, a damaged or foreign file).
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():  # torch does not look at the sums
                    raise ValueError(f"{bad} is not what was written")
            asked = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if strange := sorted(name for name in asked if _stand_in(name) is None):
                raise pickle.UnpicklingError(f"it asks for {', '.join(strange[:3])}")
        else:
            asked = STAND_INS
        names = [(_stand_in(name), name) for name in asked]
        with torch.serialization.safe_globals(names), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign formats, which are refused right after
            content = torch.load(path, map_location="cpu", weights_only=True)
        content = _plain(content, {}, iter(range(MAX_MODULES)))
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # a text, a page, another pickle
            raise ValueError("it is no checkpoint as torch.save, in its own protocol, or safetensors write") from None
        raise ValueError(f"it holds more than tensors and plain values ({_reason(error)})") from None
    except Exception as error:  # whatever a damaged or malicious file makes torch raise, or a network of itself
        raise ValueError(f"it is damaged or no checkpoint ({type(error).__name__}: {_reason(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a checkpoint or a state dict")
    return content


def _plain(value, done, allowance):
    """Return `value` with plain values in the stand-ins' place, at any depth.

    done: {id of what was seen: (itself, its plain value)}, so that what occurs many times is converted once;
    allowance: an iterator of as many items as modules may occur.
    Raises ValueError for a dictionary or list that contains itself.
    """
    if not isinstance(value, (_Held, dict, list, tuple)):
        return value
    if id(value) in done:
        if done[id(value)] is None:
            raise ValueError("a part contains itself")
        return done[id(value)][1]
    done[id(value)] = None
    if isinstance(value, dict):
        plain = {_plain(k, done, allowance): _plain(v, done, allowance) for k, v in value.items()}
    elif isinstance(value, (list, tuple)):
        plain = type(value)([_plain(v, done, allowance) for v in value]) if type(value) in (list, tuple) else value
    elif isinstance(value, _Module):
        plain = _collect(value, "", {}, allowance) if "_modules" in vars(value) else value
    elif isinstance(value, _Number):
        number = _decoded(value.args[0], (), value.args[1], "C")
        plain = value if number is None else number.item()
    elif isinstance(value, _Array):
        _, shape, dtype, by_columns, content = value.state
        array = _decoded(dtype, shape, content, "F" if by_columns else "C")
        plain = value if array is None or array.dtype.kind in "US" else torch.from_numpy(array.copy())
    elif isinstance(value, _Picture):
        _, mode, size, palette, content = value.state
        plain = {"mode": mode, "size": size, "palette": palette, "data": content}
    else:
        plain = value
    done[id(value)] = (value, plain)
    return plain


def _decoded(dtype, shape, content, order):
    """Return the array, in native byte order, that numpy would make of the bytes `content`; None if of no plain type.

    Raises ValueError for a shape that does not fit the content.
    """
    code, swapped = dtype.args[0], bool(dtype.state) and dtype.state[1] == ">"
    if not re.fullmatch(r"f[248]|[iu][1248]|b1|[US]\d{1,4}", code) or not isinstance(content, bytes):
        return None
    array = np.frombuffer(content, np.dtype(code).newbyteorder(">" if swapped else "<"))
    if math.prod(shape) != array.size:
        raise ValueError("an array's shape is not that of its content")
    return array.astype(array.dtype.newbyteorder("=")).reshape(shape, order=order)


def _collect(record, prefix, out, allowance):
    """Add the parameters and persistent buffers of a pickled module to `out`, under their paths; return it."""
    if next(allowance, None) is None:  # a small file can hold a module in the other many times, at each of many levels
        raise ValueError(f"more than {MAX_MODULES:,} modules")
    for group in ("_parameters", "_buffers"):
        hidden = record.__dict__.get("_non_persistent_buffers_set", ()) if group == "_buffers" else ()
        for name, tensor in record.__dict__.get(group, {}).items():
            if tensor is not None and name not in hidden:
                out[prefix + name] = tensor.detach()
    for name, child in record.__dict__.get("_modules", {}).items():
        if child is not None:
            _collect(child, f"{prefix}{name}.", out, allowance)
    return out


def unwrap(content):
    """Return the state dict, {key: tensor}, within the content of a file.

    It may lie under a key such as "net", at any depth, with plain values beside it, and all its keys may have a prefix
    such as DataParallel's "module.". Content without tensors is returned as it is.
    """
    while inner := next((content[k] for k in AROUND if isinstance(content.get(k), dict)), None):
        content = inner
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    while tensors and (prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), None)):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors or content


def _reason(error):
    """Return torch's reason in one line, without its advice on how to load the file unsafely."""
    if "TorchScript" in str(error) or "torchscript" in str(error):
        return "a TorchScript archive"
    lines = [line for line in str(error).splitlines() if line.strip()]
    # its own words come first, what the unpickler says last
    said = [line for line in lines if re.search("WeightsUnpickler error:|unsupported GLOBAL", line)] or lines
    text = re.sub(r"^.*?WeightsUnpickler error:", "", (said or ["unreadable"])[0])
    return re.split(r"\. |, please| Please| was not an allowed", text)[0].strip()[:160]
