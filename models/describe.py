"""Which network a state dict is of: name, width, classes and, where its keys show it, the size of its images."""

from flags import LIBRARIES

import functools
import math

import torch

from .networks import NETWORKS, get_model

# the largest that a file may ask for
MAX_WIDTH, MAX_CLASSES, MAX_PARAMETERS = 16, 100_000, 2**30


def shown_size(state):
    """Return the side, in pixels, of the images that position embeddings are made for; None without embeddings.

    state: {key: tensor}, with the keys of timm's, torchvision's or our vision transformers. The patches are taken to be
    a square grid; beside them there may be a few other tokens, such as the class token.
    """
    for position, patches in (("pos_embed", "patch_embed.proj.weight"), ("encoder.pos_embedding", "conv_proj.weight")):
        if position in state and patches in state and state[position].dim() == 3 and state[patches].dim() == 4:
            return math.isqrt(state[position].shape[1]) * state[patches].shape[-1]
    return None


def describe_state_dict(state, network=None):
    """Return {"network", "width", "num_classes"} of a state dict; shown_size() tells the size of its images.

    state: {key: tensor}; network: the required name, None for any of NETWORKS. Keys and shapes must be exactly those
    of the network; only batch norm's num_batches_tracked may be absent.
    Raises ValueError, in one line, with the closest network and the first keys that differ; InputError for a library
    that is not installed.
    """
    misfits = []
    for name in [network] if network else NETWORKS:
        found = _fit(state, name)
        if isinstance(found, dict):
            return found
        misfits.append((*found, name))
    _, why, closest = min(misfits, key=lambda misfit: misfit[0])
    if network:
        raise ValueError(f"it is no {network}: {why}")
    others = ", ".join(f"{library}:NAME" for library in LIBRARIES)
    raise ValueError(f"it fits no network here; closest is {closest}: {why} (--network {others} for one of theirs)")


def _fit(state, name):
    """Return the description of `state` as the network `name`, else (number of keys that differ, a line about them)."""
    size = shown_size(state)
    kwargs = {"size": size} if size and (name == "vit" or name not in NETWORKS) else {}
    try:
        small, wide, many = _references(name, **kwargs)
        width, classes = _ratio(state, small, wide) or 1.0, 2 * (_ratio(state, small, many) or 1.0)
        if not (0 < width <= MAX_WIDTH and 0 < classes <= MAX_CLASSES):
            return 1, f"a width of {width:g} and {classes:g} classes is out of bounds"
        exact = shapes(name, round(classes), width, **kwargs)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        return math.inf, " ".join(str(error).split())[:160]
    own, theirs = ({k for k in keys if not k.endswith("num_batches_tracked")} for keys in (exact, state))
    lacks, strange = sorted(own - theirs), sorted(theirs - own)
    other = [k for k in exact if k in state and tuple(state[k].shape) != exact[k]]
    why = [f"it lacks {_some(lacks)}"] * bool(lacks) + [f"{_some(strange)} is none of its keys"] * bool(strange)
    why += [f"{k} is {tuple(state[k].shape)}, not {exact[k]}" for k in other[:1]]
    if why:
        return len(lacks) + len(strange) + len(other), " and ".join(why)
    if sum(map(math.prod, exact.values())) > MAX_PARAMETERS:
        return 1, f"it has more than {MAX_PARAMETERS:,} parameters"
    return {"network": name, "width": width, "num_classes": round(classes)}


def _some(keys):
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _ratio(state, one, other):
    """Return size in `state` / size in `one` on the first axis on which `one` and `other` differ; None if none does."""
    for key, shape in one.items():
        if key in state and key in other and state[key].dim() == len(shape):
            for size, a, b in zip(state[key].shape, shape, other[key], strict=True):
                if a != b:
                    return size / a
    return None


@functools.cache
def _references(name, **kwargs):
    """Return {key: shape} of a network with two classes; of one twice as wide, if it has widths; with three classes."""
    small = shapes(name, 2, 1.0, **kwargs)
    wide = shapes(name, 2, 2.0, **kwargs) if name in NETWORKS else small
    return small, wide, shapes(name, 3, 1.0, **kwargs)


def shapes(name, num_classes, width, **kwargs):
    """Return {key: shape} of a network; its memory is not allocated where its constructor works without."""
    try:
        with torch.device("meta"):
            model = get_model(name, num_classes, width, **kwargs)
    except (RuntimeError, NotImplementedError):  # some of timm's and torchvision's read numbers while they are built
        model = get_model(name, num_classes, width, **kwargs)
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}
