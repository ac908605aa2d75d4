"""What the commands share: device, data, augmentation, checkpoints, files that are whole or absent."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import sysconfig
import time
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch
import torch.distributed as dist
import torch.nn.functional as F

import cifar10
import models
from cli import ATTACKS, DATASETS, DEFENSES, ROOT, InputError

CKPT = ROOT / "ckpt"
FORMAT = 1  # of our checkpoints


# --- device ---------------------------------------------------------------------------------------------------------


def get_device(name="auto"):
    """Return the torch.device for `auto`, `cuda`, `mps` or `cpu`; auto takes the first of these that is there.

    Raises InputError when the one asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n, ok in there.items() if ok)
    if not there[name]:
        raise InputError(f"no {name} device here; use --device auto or --device cpu")
    return torch.device(name)


def has_fast_bf16(device):
    """Return whether bf16 arithmetic is faster than fp32 on this device: AMX, AMD's AVX-512 bf16, Ampere or later.

    On Intel's processors AVX-512 bf16 alone does not pay: on a Xeon, convolutions ran at 0.6 to 1.3 times fp32's speed.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        by_avx512 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # not in every torch
        return has_amx(device) or (by_avx512 and not _cpu_name().startswith("Intel"))
    return False


def has_amx(device):
    """Return whether this device is a processor with AMX's bf16 tiles."""
    return device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def get_dtype(precision, device):
    """Return the dtype to compute in: torch.bfloat16 or torch.float32; `auto` takes bf16 where it is fast."""
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def autocast(device, dtype):
    """Return the autocast context for `dtype`; with float32 it does nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def repeatable():
    """Return a context, or decorator, in which a GPU gives the same bits again and fp32 means fp32 (no TF32)."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def recorded(work, device):
    """Return `work`, a function without arguments, so that it is one launch on a GPU: a CUDA graph of what it does.

    work() may read and change what lies on the device and does the same each time; it runs twice before it is recorded,
    which must do no harm. What it returns is overwritten by the next call. On another device it stays what it is.
    """
    if device.type != "cuda":
        return work
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # what is chosen, compiled and allocated once must not be recorded
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has threads of its own
            result = work()

    def replay():
        graph.replay()
        return result

    return replay


def machine(device):
    """Return what a figure computed on `device` depends on besides the code, as plain values: versions, device."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }


def peak_memory(device):
    """Return the most memory held so far, in GiB: the allocator's on a GPU, else the process's; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the parent held before it started this process
        kib = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(kib[0]) / 2**20 if kib else None
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def reset_peak_memory(device):
    """Let peak_memory() count from here on, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # Linux alone, and not in every sandbox
        Path("/proc/self/clear_refs").write_text("5")


def _cpu_name():
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- more than one process ------------------------------------------------------------------------------------------


def start_ranks(device):
    """Join the processes of torchrun and return this one's device; without torchrun no process group is started.

    Raises InputError where there are fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        n_gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if local_rank >= n_gpus:
            raise InputError(f"torchrun started more processes than the {n_gpus} GPUs here; lower --nproc_per_node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def ranks():
    """Return (rank of this process, number of processes); (0, 1) without torchrun."""
    started = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if started else (0, 1)


def sum_over_ranks(tensors):
    """Replace each tensor (same dtype and device) by its sum over all processes, in one all-reduce."""
    if ranks()[1] > 1:
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(total.view(t.shape))


# --- data -----------------------------------------------------------------------------------------------------------


def load_dataset(name, datadir, train):
    """Return (images uint8 (N, 3, H, W), labels int64 (N,)) of one split.

    name: `cifar10` (50,000 / 10,000 images; fetched into `datadir` when absent) or `cifar10_sample` (500 / 2,000,
    embedded in the repo). Raises InputError for another name and when the data can be neither found nor fetched.
    """
    if name == "cifar10":
        return cifar10.load(datadir, train)
    if name == "cifar10_sample":
        return cifar10.load_sample(train)
    raise InputError(f"unknown dataset {name!r}; there are cifar10 and cifar10_sample")


def training_layout(model):
    """Return the memory format to train in: channels last, which is the faster, but for narrow networks on a CPU.

    There the weight gradient of a strided 1x1 convolution of less than 16 channels, channels last and over an odd
    batch, writes past its buffer (seen with torch 2.13 on two threads).
    """
    convs = (m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    narrow = any(m.weight.is_cpu and m.kernel_size == (1, 1) and m.in_channels < 16 for m in convs)
    return torch.contiguous_format if narrow else torch.channels_last


def speed_up_small_maps(model, dtype):
    """Let the wide convolutions of `model` over small maps train in `dtype` by matrix products where these are faster.

    In place; in eval mode nothing changes. Returns the model.
    """
    fast = dtype == torch.bfloat16 and has_amx(next(model.parameters()).device)
    return models.small_maps_by_products(model, dtype) if fast else model


def compiling_pays(device, n_images, width=1.0, least=200_000):
    """Return whether to compile a network of this width, or a part of it, for n_images in all, epochs or steps counted.

    least: how many of full width pay for it. A network takes a minute, as long as the whole training on a GPU. It needs
    a C++ compiler and Python's headers.
    """
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    there = headers and any(map(shutil.which, ("g++", "clang++")))
    return device.type == "cpu" and there and n_images * width > least


def to_float(images):
    """Return images (N, 3, H, W), uint8 or float in [0, 1], as float32 in [0, 1], laid out channels last."""
    x = images.to(torch.float32, memory_format=torch.channels_last)
    return x if images.is_floating_point() else x / 255


def augment(images, generator, padding=4, mode="constant"):
    """Random crop after padding and random horizontal flip, per image, on the batch.

    images: (N, C, H, W), uint8 or float in [0, 1]; generator: on the CPU, so that every device draws alike;
    mode: of the padding, "constant" for zeros or "reflect" (floats only).
    Returns the same shape and type, laid out channels last.
    """
    n, _, h, w = images.shape
    device = images.device
    # nothing here waits for a CUDA device: it works while the next batch is prepared
    top = torch.randint(0, 2 * padding + 1, (n, 1), generator=generator)
    left = torch.randint(0, 2 * padding + 1, (n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    rows = top + torch.arange(h)
    cols = left + torch.arange(w)
    cols = torch.where(flip, cols.flip(1), cols)
    padded = F.pad(images, (padding,) * 4, mode=mode).permute(0, 2, 3, 1)
    which = torch.arange(n, device=device)[:, None, None]
    rows, cols = (t.to(device, non_blocking=images.is_cuda) for t in (rows, cols))
    return padded[which, rows[:, :, None], cols[:, None]].permute(0, 3, 1, 2)


def defence_split(labels, data_rate, num_classes=10, train_share=0.8, generator=None):
    """Choose the defence images: the first ones of each class in the data set's order, or drawn by `generator`.

    labels: int64 (N,). n = int(N * data_rate), n // num_classes of each class; of each class the first 80 % train,
    the rest validate. Returns two int64 index tensors, class by class.
    Raises InputError when a class has too few images or a side of the split would be empty.
    """
    per_class = int(len(labels) * data_rate) // num_classes
    n_train = int(per_class * train_share)
    if n_train < 1 or n_train == per_class:
        raise InputError(f"data_rate {data_rate} leaves {per_class} images per class; raise it to have at least 2")
    train, valid = [], []
    for c in range(num_classes):
        chosen = (labels == c).nonzero()[:, 0]
        if generator is not None:
            chosen = chosen[torch.randperm(len(chosen), generator=generator)]
        chosen = chosen[:per_class]
        if len(chosen) < per_class:
            raise InputError(
                f"class {c} has {len(chosen)} of the {per_class} images of data_rate {data_rate}; lower it"
            )
        train.append(chosen[:n_train])
        valid.append(chosen[n_train:])
    return torch.cat(train), torch.cat(valid)


# --- files that are whole or absent -----------------------------------------------------------------------------------


def write_whole(path, write):
    """Call write(temporary path) beside `path`, then rename it to `path`: a kill leaves the old file or none.

    Raises InputError when the disk refuses (full, read-only).
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        # torch.save's own words for a disk that takes no more
        full = any(words in str(error) for words in ("PytorchStreamWriter", "unexpected pos", "inline_container"))
        if isinstance(error, RuntimeError) and not full:
            raise
        reason = str(error).splitlines()[0]
        raise InputError(f"cannot write {path}: {reason}; make room or choose another place") from None


def check_place(path):
    """Raise InputError unless a file can be written at `path`: what a long run wants to know before it starts."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
    write_whole(path.with_name(f"{path.name}.probe"), lambda p: p.write_bytes(b""))
    path.with_name(f"{path.name}.probe").unlink()


def save_json(value, path):
    """Write plain values as JSON, whole or not at all."""
    write_whole(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


def sha256(path):
    """Return the SHA-256 sum of a file in hexadecimal. Raises InputError when it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


# --- checkpoints ----------------------------------------------------------------------------------------------------


def network_tag(network, width):
    """Return the network's part of a checkpoint's name: `resnet18`, or `resnet18-w0.25` for another width."""
    return network if width == 1 else f"{network}-w{width:g}"


def checkpoint_path(dataset, network, attack, width=1.0, suffix=""):
    """Return ckpt/{dataset}_{network}_{attack}{suffix}.pt."""
    return CKPT / f"{dataset}_{network_tag(network, width)}_{attack}{suffix}.pt"


def victim_path(args):
    """Return the victim that the flags of a command mean: --ckpt, else the one named after network and attack.

    The embedded sample has no victims of its own: it is for those of the full set.
    """
    return Path(args.ckpt) if args.ckpt else checkpoint_path("cifar10", args.network, args.attack)


def half_weights(state_dict):
    """Return the state dict with convolution and linear weights in half precision; batch norm's stay as they are."""
    return {k: v.detach().cpu().half() if v.dim() > 1 else v.detach().cpu() for k, v in state_dict.items()}


def packed_weights(state_dict):
    """Return the state dict on the CPU, its weights in half precision where that loses nothing."""
    whole = {k: v.detach().cpu() for k, v in state_dict.items()}
    return {k: h if torch.equal(h.to(whole[k].dtype), whole[k]) else whole[k] for k, h in half_weights(whole).items()}


def save_checkpoint(checkpoint, path):
    """Write a checkpoint (a dictionary of tensors and plain values), whole or not at all."""
    write_whole(path, lambda p: torch.save({"format": FORMAT, **checkpoint}, p))


def load_checkpoint(path):
    """Return a checkpoint as a dictionary: `state_dict`, what rebuilds the network, and what is known of it.

    Takes our own files, state dicts with the usual keys, plain or wrapped (models.unwrap), and the authors' pickled
    ResNet objects, of which only the tensors are taken; no code from a file ever runs.
    Raises InputError when there is no such file and for any other content.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint {path}; {_how_to_make(path)}")
    try:
        content = models.read_pickle(path)
    except ValueError as error:
        raise InputError(f"{path} is refused: {error}") from None
    if isinstance(content, dict) and "state_dict" in content:
        if content.get("format", FORMAT) != FORMAT:
            raise InputError(f"{path} has format {content['format']}, this version reads {FORMAT}; update the repo")
    else:
        content = {"state_dict": content}
    state = content["state_dict"] = models.unwrap(content["state_dict"])
    try:
        content = {**models.describe_state_dict(state), **content}
    except ValueError as error:
        raise InputError(f"{path} is refused: {error}") from None
    return {"attack": None, "target": None, "dataset": None, "trigger": None, "bounds": None, **content}


def _how_to_make(path):
    for attack in ("none", *ATTACKS):
        for network in models.NETWORKS:
            if path.resolve() == checkpoint_path("cifar10", network, attack):
                return f"make it with: python train.py --network {network} --attack {attack}"
            for dataset in DATASETS:
                for defense in ("unit", *DEFENSES):
                    if path.name == f"{dataset}_{network}_{attack}_{defense}.pt":
                        script = "unit.py" if defense == "unit" else f"defend.py --defense {defense}"
                        flags = f"--dataset {dataset} --network {network} --attack {attack}"
                        return f"make it with: python {script} {flags}"
    return "train one with: python train.py --attack badnet (or give --ckpt the right path)"


def load_model(path, device="cpu"):
    """Return (model in eval mode on `device`, checkpoint without its weights); a defended model comes clipped.

    Raises InputError as load_checkpoint does, and when weights or bounds do not fit the network that the file names.
    """
    checkpoint = load_checkpoint(path)
    state = checkpoint.pop("state_dict")
    try:
        if not (0 < checkpoint["width"] <= models.MAX_WIDTH and 0 < checkpoint["num_classes"] <= models.MAX_CLASSES):
            raise ValueError(f"width {checkpoint['width']}, {checkpoint['num_classes']} classes")
        model = models.get_model(checkpoint["network"], checkpoint["num_classes"], checkpoint["width"])
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        if checkpoint["bounds"] is not None:
            shapes = {name: tuple(bound.shape) for name, bound in checkpoint["bounds"].items()}
            if shapes != models.site_shapes(model.eval()):
                raise ValueError("bounds of other sites or shapes")
            models.set_bounds(model, checkpoint["bounds"])
    except (ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{path} does not fit: {' '.join(str(error).split())[:300]}") from None
    return model.to(device).eval(), checkpoint
