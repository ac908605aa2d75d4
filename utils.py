"""What the commands share: device and precision, files written whole or not at all, checkpoints."""

from flags import ATTACKS, DATASETS, DEFENSES, MAX_SIZE, NORMALIZATIONS, ROOT, InputError, place_of

import contextlib
import hashlib
import json
import os
import platform
import re
import warnings
from pathlib import Path

import torch

import data
import models
from backdoors import TRIGGERS
from data import load_dataset

__all__ = ["load_dataset"]  # for users of this module

CKPT = ROOT / "ckpt"
FORMAT = 1  # of our checkpoints
# the keys that a checkpoint may lack
UNKNOWN = ("attack", "target", "dataset", "size", "trigger", "bounds", "defense", "mean", "std", "bd_test", "folder")
# what they are where they say it
KINDS = dict.fromkeys(("format", "num_classes", "size", "trigger_width", "seed", "epochs", "batch_size"), int)
KINDS |= dict.fromkeys(("width", "lr", "weight_decay", "poison_rate"), float | int) | {"flip": bool}
KINDS |= dict.fromkeys(("network", "attack", "dataset", "folder", "sampling"), str)
KINDS |= {"target": int | str, "bd_test": list}
KINDS |= dict.fromkeys(("state_dict", "bounds", "trigger"), dict) | dict.fromkeys(("mean", "std"), list | tuple)


# --- device and precision ---------------------------------------------------------------------------------------------


def get_device(name="auto"):
    """Return the torch.device for `auto`, `cuda`, `mps` or `cpu`; auto takes the first available of cuda, mps, cpu.

    Raises InputError for a device that is not available.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n, ok in there.items() if ok)
    if not there[name]:
        raise InputError(f"no {name} device here; use --device auto or --device cpu")
    return torch.device(name)


def has_fast_bf16(device):
    """Return whether bf16 is faster than fp32 on this device: a CPU with AMX, an AMD CPU with AVX-512 bf16, a GPU from
    Ampere on. On Intel CPUs AVX-512 bf16 without AMX is not faster.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        by_avx512 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # not in every torch
        return has_amx(device) or (by_avx512 and not cpu_name().startswith("Intel"))
    return False


def has_amx(device):
    """Return whether this device is a CPU with AMX."""
    return device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def get_dtype(precision, device):
    """Return the dtype to compute in: torch.bfloat16 or torch.float32; `auto` takes bf16 where it is fast."""
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def autocast(device, dtype):
    """Return the autocast context for `dtype`; with float32 it does nothing.

    On a GPU it does not cache casts, because CUDA graphs contain theirs.
    """
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=device.type != "cuda")


def repeatable():
    """Return a context manager, also a decorator, in which cuDNN is deterministic and uses no TF32."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def pass_size(device, n):
    """Return the number of images per forward pass: n on a CPU, at least 1,000 on a GPU, which needs large batches."""
    return n if device.type == "cpu" else max(n, 1000)


def cpu_name():
    """Return the CPU's name as the system reports it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- files written whole or not at all --------------------------------------------------------------------------------


def write_whole(path, write):
    """Call write(temporary path) beside `path`, then rename it to `path`: a kill leaves the old file or none.

    Raises InputError when the file cannot be written (full disk, read-only folder).
    """
    with _part_of(path) as part:
        write(part)
        os.replace(part, path)


def check_place(path):
    """Raise InputError unless a file can be written at `path`: what a long run wants to know before it starts."""
    with _part_of(path) as part:
        part.write_bytes(b"")


@contextlib.contextmanager
def _part_of(path):
    """Give the path of a temporary file beside `path` and remove what lies there in the end; errors: write_whole()."""
    path = Path(path)
    if path.is_dir() or not path.name:
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
    if path.exists() and not path.is_file():  # a rename would replace a device or a pipe
        raise InputError(f"cannot write {path}: it is no regular file; give another name")
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        # torch.save's messages for a full disk
        full = any(words in str(error) for words in ("PytorchStreamWriter", "unexpected pos", "inline_container"))
        if isinstance(error, RuntimeError) and not full:
            raise
        reason = "the disk takes no more" if full else getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"cannot write {path}: {reason}; make room or choose another place") from None


def save_json(value, path):
    """Write plain values as JSON, whole or not at all."""
    write_whole(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


def sha256(path):
    """Return the SHA-256 sum of a file in hexadecimal. Raises InputError when it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def tensor_sum(*tensors):
    """Return the SHA-256 sum of the bytes of tensors, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


# --- checkpoints ----------------------------------------------------------------------------------------------------


def network_tag(network, width):
    """Return the network's part of a checkpoint's name: `resnet18`, or `resnet18-w0.25` for another width."""
    network = network.replace(":", "-")  # not allowed in file names on Windows
    return network if width == 1 else f"{network}-w{width:g}"


def file_tag(name):
    """Return a data set or attack as part of a file name: `folder-my-signs` for `folder:/some/my signs`."""
    place = place_of(name)
    if place is None:
        return name
    path = place[1].resolve()
    stem = path.stem if path.suffix.lower() == ".npz" else path.name
    safe = re.sub(r"[^\w.]+", "-", stem).strip("-.")
    return f"{place[0]}-{safe or 'root'}"


def checkpoint_path(dataset, network, attack, width=1.0, suffix=""):
    """Return ckpt/{dataset}_{network}_{attack}{suffix}.pt."""
    return CKPT / f"{file_tag(dataset)}_{network_tag(network, width)}_{file_tag(attack)}{suffix}.pt"


def round_weights(model):
    """Round the weights of `model` to half precision, in place, as files hold them; return that state dict."""
    state = half_weights(model.state_dict())
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    model.to(memory_format=torch.channels_last)
    return state


def half_weights(state_dict):
    """Return the state dict on the CPU with tensors of two or more dimensions in half precision, others unchanged."""
    return {k: v.detach().cpu().half() if v.dim() > 1 else v.detach().cpu() for k, v in state_dict.items()}


def packed_weights(state_dict):
    """Return the state dict on the CPU, with those weights in half precision that this does not change."""
    whole = {k: v.detach().cpu() for k, v in state_dict.items()}
    return {k: h if torch.equal(h.to(whole[k].dtype), whole[k]) else whole[k] for k, h in half_weights(whole).items()}


def save_checkpoint(checkpoint, path):
    """Write a checkpoint (a dictionary of tensors and plain values), whole or not at all."""
    write_whole(path, lambda p: torch.save({"format": FORMAT, **checkpoint}, p))


def load_checkpoint(path, network=None):
    """Return a checkpoint as a dictionary: `state_dict`, the settings of the network, and what is known of it.

    Reads our own files; BackdoorBench's results; state dicts, plain or wrapped (models.unwrap), in torch's format or
    safetensors; and pickled networks, of which only the tensors are read. No code from a file ever runs.
    network: the required name of the network, None to take it from the file or infer it from the keys.
    `mean` and `std` are None where the file does not say how images are normalized; `bd_test` is a list of the
    triggered test images (data.backdoorbench.triggered_entries) and `folder` the folder of their files.
    Raises InputError for a missing file and for any other content.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the checkpoint, a file")
    if not path.is_file():
        raise InputError(f"no checkpoint {path}; {_how_to_make(path)}")
    try:
        content = models.read_file(path)
        if "state_dict" in content and "format" in content:
            checkpoint = _own(content, path, network)
        else:
            checkpoint = _foreign(content, path, network)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path} is refused: {error}") from None
    if checkpoint["network"] == "vit":
        checkpoint["size"] = models.shown_size(checkpoint["state_dict"])
    return {**dict.fromkeys(UNKNOWN), **checkpoint}


def _own(content, path, network):
    """Return the checkpoint in a file of ours."""
    for key, kind in KINDS.items():
        value = content.get(key)
        if not isinstance(value, kind | None) or (isinstance(value, str) and not value.isprintable()):
            raise ValueError(f"its {key} is {' '.join(repr(content[key]).split())[:60]}, which cannot be")
    if content["format"] != FORMAT:
        raise InputError(f"{path} has format {content['format']}, this version reads {FORMAT}; update the repo")
    entries, state = content.get("bd_test") or [], content["state_dict"]
    if not data.backdoorbench.are_entries(entries) or (content.get("folder") is None and any(e[1] for e in entries)):
        raise ValueError("its bd_test is not as a defended model keeps it")
    if not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError("it has no weights, or some that are no tensors")
    if content.get("trigger") is not None and content.get("attack") is None:
        raise ValueError("it holds a trigger, but does not say of which attack")
    if "defence" in content:  # an older file
        content["defense"] = content.pop("defence")
    mean, std = content.get("mean"), content.get("std")
    if mean is None and std is None:
        content["mean"], content["std"] = NORMALIZATIONS["authors"]
    elif None in (mean, std) or not all(isinstance(v, float | int) for v in (*mean, *std)):
        raise ValueError("its mean and std are not three numbers each")
    said = {k: v for k, v in content.items() if v is not None}
    if not {"network", "width", "num_classes"} <= set(said):
        content |= {**models.describe_state_dict(state), **said}
    if network not in (None, content["network"]):
        raise ValueError(f"it holds a {content['network']}, no {network}; leave --network out")
    return content


def _foreign(content, path, network):
    """Return a checkpoint made of another project's file: its fields, and what the weights show."""
    said = data.backdoorbench.fields(content) if data.backdoorbench.is_result(content) else {}
    state, name = models.unwrap(content), said.pop("network_name", None)
    if not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"it has no weights, but {', '.join(map(str, list(state)[:5])) or 'nothing'}")
    by_keys = name is None or network is not None
    shown = models.describe_state_dict(state, network) if by_keys else _by_name(state, name)
    if said.get("bd_test"):
        said["folder"] = str(path.resolve().parent)
    return {**shown, **said, "state_dict": state}


def _by_name(state, name):
    """Return models.describe_state_dict() for the network that BackdoorBench calls `name`, ours or torchvision's."""
    reasons = []
    for network in [name] * (name in models.NETWORKS) + [f"torchvision:{name}"]:
        try:
            return models.describe_state_dict(state, network)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(f"it says that it is a {name}, but {' and '.join(reasons)}")


def _how_to_make(path):
    for attack in ("none", *ATTACKS):
        for network in models.NETWORKS:
            if path.resolve() == checkpoint_path("cifar10", network, attack):
                there = [p for p in sorted(CKPT.glob("cifar10_*.pt")) if p.stem.split("_", 2)[2:] == [attack]]
                other = f"give --ckpt {os.path.relpath(there[0])}, or " if there else ""
                return f"{other}make it with: python train.py {training_flags(network, attack)}"
            for dataset in DATASETS:
                for defense in ("unit", *DEFENSES):
                    if path.name == f"{dataset}_{network}_{attack}_{defense}.pt":
                        script = "unit.py" if defense == "unit" else f"defend.py --defense {defense}"
                        flags = f"--dataset {dataset} --network {network} --attack {attack}"
                        return f"make it with: python {script} {flags}"
    return "train one with: python train.py --attack badnet (or give --ckpt the right path)"


def training_flags(network, attack):
    """Return the flags of train.py for a victim."""
    target = None if attack == "none" else TRIGGERS[attack].only_target
    return f"--network {network} --attack {attack}" + (f" --target {target}" if target else "")


def load_model(path, device="cpu", normalization=None, network=None):
    """Return (model in eval mode on `device`, with its bounds if any; checkpoint without its weights).

    normalization: (mean, std) of the images, None for those of the file; if it has none, the authors' are used with a
    warning. network: see load_checkpoint().
    Raises InputError as load_checkpoint() does, and if weights or bounds do not fit the network.
    """
    checkpoint = load_checkpoint(path, network)
    if normalization is not None:
        checkpoint["mean"], checkpoint["std"] = normalization
    elif checkpoint["mean"] is None:
        warnings.warn(
            f"{path} does not say how its images are normalized; the authors' mean and std are taken", stacklevel=2
        )
    return build_model(path, checkpoint, device), checkpoint


def build_model(path, checkpoint, device="cpu"):
    """Return the model of a checkpoint, in eval mode on `device`; `state_dict` is removed from the checkpoint.

    path: for the message. Raises InputError if weights or bounds do not fit the network.
    """
    state = checkpoint.pop("state_dict")
    mean, std = checkpoint["mean"], checkpoint["std"]
    if mean is None:
        mean, std = NORMALIZATIONS["authors"]
    try:
        size = checkpoint.get("size") or 32
        if not (0 < checkpoint["width"] <= models.MAX_WIDTH and 0 < checkpoint["num_classes"] <= models.MAX_CLASSES):
            raise ValueError(f"width {checkpoint['width']}, {checkpoint['num_classes']} classes")
        if not 0 < size <= MAX_SIZE:
            raise ValueError(f"images of {size}x{size}")
        about = checkpoint["network"], checkpoint["num_classes"], checkpoint["width"]
        sized = {"size": shown} if (shown := models.shown_size(state)) else {}
        if about[0] in models.NETWORKS:  # before the memory is allocated that a width asks for
            for key, shape in models.shapes(*about, **sized).items():
                if key in state and state[key].shape != shape:
                    raise ValueError(f"its width is {about[2]:g}, but {key} is {tuple(state[key].shape)}, not {shape}")
        model = models.get_model(*about, mean=mean, std=std, **sized)
        bounds = checkpoint["bounds"] or {}
        damaged = [k for k, v in {**state, **bounds}.items() if v.is_floating_point() and v.isnan().any()]
        damaged += [k for k, v in state.items() if v.is_floating_point() and v.isinf().any()]
        damaged += [k for k, v in state.items() if k.endswith("running_var") and (v < 0).any()]
        damaged += [f"the bound {k}" for k, v in bounds.items() if not v.is_floating_point() or (v < 0).any()]
        if damaged:
            raise ValueError(f"NaN, infinity or a value below 0 in {damaged[0]}; take a file that is whole")
        for key, own in model.state_dict().items():
            if key in state and own.is_floating_point() > state[key].is_floating_point():
                raise ValueError(f"{key} holds {state[key].dtype}; give weights in floating point")
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        if checkpoint["bounds"] is not None:
            shapes = {name: tuple(bound.shape) for name, bound in checkpoint["bounds"].items()}
            if shapes != models.activation_sites(model.eval(), torch.zeros(2, 3, size, size)):
                raise ValueError("bounds of other sites or shapes")
            model = models.with_bounds(model, checkpoint["bounds"])
    except InputError:
        raise
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{path} does not fit: {' '.join(str(error).split())[:300]}") from None
    return model.to(device, memory_format=torch.channels_last).eval()
