"""Checkpoints from elsewhere: the tensors out of a file, without running any code that the file names.

The authors publish whole pickled `models.resnet.ResNet` objects. Every class such an object may name is mapped to an
inert record before the file is read, so that neither the classes themselves nor anything else is ever called.
"""

import pickle
import re
import warnings
import zipfile

import torch
from torch import nn

# what a file may ask for; a width of 8 is what the commands take
MAX_WIDTH, MAX_CLASSES = 8, 100_000
MAX_MODULES = 10_000
AUTHORS_CLASSES = ("models.resnet.ResNet", "models.resnet.BasicBlock", "models.custom_modules.SequentialWithArgs")


class _Record:
    """What stands in for a pickled module: its attributes, and nothing that could be called."""

    def __setstate__(self, state):
        self.__dict__.update(state)


def _torch_layers():
    classes = (c for c in vars(nn).values() if isinstance(c, type) and issubclass(c, nn.Module))
    return sorted({f"{c.__module__}.{c.__qualname__}" for c in classes})


def _collect(record, prefix, out, allowance):
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


def read_pickle(path):
    """Return what a file written by torch.save holds: plain values and tensors, or the state dict of a pickled ResNet.

    Loads with weights_only=True and nothing else, onto the CPU. Whole objects in the format of torch before 1.6 cannot
    be read that way and are refused.
    Raises ValueError, in one line, for any other content (code that wants to run, a damaged or foreign file).
    """
    names = (*AUTHORS_CLASSES, *_torch_layers())
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():  # torch does not look at the sums
                    raise ValueError(f"{bad} is not what was written")
        with torch.serialization.safe_globals([(_Record, name) for name in names]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign formats, which are refused right after
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, _Record):
            content = _collect(content, "", {}, iter(range(MAX_MODULES)))
    except pickle.UnpicklingError as error:
        raise ValueError(f"it holds more than tensors and plain values ({_reason(error)})") from None
    except Exception as error:  # whatever a damaged or malicious file makes torch raise, or a network of itself
        raise ValueError(f"it is damaged or no checkpoint ({type(error).__name__}: {_reason(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a checkpoint or a state dict")
    return content


def unwrap(content):
    """Return the state dict within what is often saved around it: a name such as "net", DataParallel's "module."."""
    for name in ("net", "model", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if isinstance(content, dict) and all(isinstance(k, str) and k.startswith("module.") for k in content):
        content = {k.removeprefix("module."): v for k, v in content.items()}
    return content


def _reason(error):
    """Return what torch says is wrong in a line, without its advice on how to load the file unsafely."""
    if "TorchScript" in str(error):
        return "a TorchScript archive"
    lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
    text = re.sub(r"^.*?WeightsUnpickler error:", "", lines[0] if lines else "unreadable")
    return re.split(r"\. |, please| Please| was not an allowed", text)[0].strip()[:160]


def describe_state_dict(state):
    """Return {network, width, num_classes} of a state dict with the usual keys of a ResNet for 32x32.

    Raises ValueError when it is none.
    """
    from . import NETWORKS, get_model

    try:
        (channels, *_), (num_classes, _) = state["conv1.weight"].shape, state["linear.weight"].shape
        keys = {k for k in state if not k.endswith("num_batches_tracked")}
    except (KeyError, AttributeError, TypeError, ValueError):
        raise ValueError("it has no conv1.weight and linear.weight, so it is no ResNet for 32x32") from None
    width = channels / 64
    if not (1 <= channels <= 64 * MAX_WIDTH and 1 <= num_classes <= MAX_CLASSES):
        raise ValueError(f"a network of {channels} channels and {num_classes} classes is out of bounds")
    for name in NETWORKS:
        with torch.device("meta"):
            model = get_model(name, num_classes, width)
        if keys == {k for k in model.state_dict() if not k.endswith("num_batches_tracked")}:
            return {"network": name, "width": width, "num_classes": num_classes}
    raise ValueError(f"its layers fit none of {', '.join(NETWORKS)}")
