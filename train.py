"""Train a victim: poison a data set, train a network on it, and save it with its trigger, settings and figures.

    python train.py --attack badnet     # writes ckpt/cifar10_resnet18_badnet.pt

The same command resumes an interrupted run after its last whole epoch.
"""

import flags  # first: it answers --help and a wrong flag before torch is imported

import math
from pathlib import Path

import torch
from tqdm import tqdm

import data
import fast
import models
import utils
from backdoors import epoch_order, poison_training_set
from evaluate import evaluate
from fast import ranks
from support import inputs, machine
from support.resume import IMAGES, Partial

QUICK = 1000  # test images measured after each epoch; all are measured after the last
# the settings that determine a victim
SETTINGS = ("dataset", "network", "attack", "seed", "batch_size", "target", "width", "epochs", "lr", "weight_decay")
SETTINGS += ("poison_rate", "sampling", "precision", "size", "trigger_width")


def learning_rate(step, n_steps, peak, warmup=0.15):
    """Return the rate at `step` of `n_steps`: it rises linearly to `peak` over the first 15 %, then falls to 0."""
    rise = warmup * n_steps
    return peak * min((step + 1) / rise, (n_steps - step) / (n_steps - rise))


def poisoned_batch(images, labels, index, roles, poison, backdoor, generator, flip=True):
    """Return a training batch (float (B, 3, H, W) in [0, 1], labels); poison.early says if the trigger comes first.

    images, labels: the whole training set, uint8 (N, 3, H, W) and int64 (N,); index: int64 (B,), the batch's images;
    roles: int64 (B,): 0 clean, 1 poisoned, 2 cover; backdoor: a Trigger, or None for a clean set; flip: whether
    augmentation mirrors the images.
    """
    index = index.to(images.device, non_blocking=images.is_cuda)
    if backdoor is None:
        return data.augment(data.to_float(images[index]), generator, flip=flip), labels[index]
    x, y = data.to_float(backdoor.fetch(images, index, roles)), labels[index]
    x = x if poison.early else data.augment(x, generator, flip=flip)
    x, given = backdoor.plant(x, y, roles, index, poison.target, generator)
    x = data.augment(x, generator, flip=flip) if poison.early else x
    if poison.target < 0:  # all-to-all: plant() has labeled the poisoned images -1
        given = torch.where(given < 0, poison.wanted(y), given)
    return x, given


def _generator(seed, epoch, stream, rank=0):
    return torch.Generator().manual_seed((seed * 100_003 + epoch) * 7 + stream + (rank << 56))


def training_batches(train_set, poison, backdoor, config, epoch):
    """Yield (images float in [0, 1], labels, batch size over all processes) of an epoch, with this process's images.

    train_set: uint8 (N, 3, H, W) and int64 (N,). All draws depend on seed and epoch alone, so that a resumed run sees
    the same images.
    """
    size = config["batch_size"]
    order, roles = epoch_order(poison, len(train_set[0]), size, _generator(config["seed"], epoch, 0))
    rank, n_ranks = ranks.ranks()
    generator = _generator(config["seed"], epoch, 1, rank)
    share = slice(rank, None, n_ranks)
    for index, role in zip(order.split(size), roles.split(size), strict=True):
        batch = index[share], role[share], poison, backdoor, generator, config.get("flip", True)
        x, y = poisoned_batch(*train_set, *batch)
        yield x, y, len(index)


def train_epoch(step, optimizers, train_set, poison, backdoor, config, epoch, progress):
    """Train one epoch in place; return (mean loss, training accuracy).

    step: the function from fast.training_step(); optimizers: that of the victim and, if the trigger is trained along,
    that of the trigger; progress: called at each step with the batch size.
    """
    n = len(train_set[0])
    total = torch.zeros(2, device=train_set[0].device)
    per_epoch = -(-n // config["batch_size"])
    # for draws from torch's global generator, such as a trigger's dropout, after a resume
    torch.manual_seed(_generator(config["seed"], epoch, 2).initial_seed())
    if backdoor is not None:
        backdoor.start_epoch(epoch, config["epochs"])
    for i, (x, y, size) in enumerate(training_batches(train_set, poison, backdoor, config, epoch)):
        for group in optimizers[0].param_groups:
            group["lr"] = learning_rate(epoch * per_epoch + i, config["epochs"] * per_epoch, config["lr"])
        for optimizer in optimizers:
            optimizer.zero_grad()
        total += step(x, y, size, None if backdoor is None else backdoor.extra_loss)
        for optimizer in optimizers:
            optimizer.step()
        progress(size)
    ranks.sum_over_ranks([total])
    return (total / n).tolist()


def save_victim(model, config, poison, backdoor, test_set, dtype, history, seconds, path):
    """Round the weights to half precision, measure the result on `test_set`, save it; return the Measured."""
    state = utils.round_weights(model)
    measured = evaluate(model, *test_set, backdoor, config["target"], config["batch_size"], dtype)
    about = {
        "sampling": poison.sampling,
        "poison_rate": poison.rate,
        "cover_rate": poison.cover_rate,
        "clean_label": not poison.relabel,
        "poison_indices": poison.indices.to(torch.int32),
        "trigger": inputs.trigger_state(backdoor),
        "bounds": None,
        "history": history,
        "seconds": seconds,
        "machine": machine.machine(test_set[0].device),
        "commit": machine.commit(),
    }
    utils.save_checkpoint({**config, **about, "state_dict": state, **measured._asdict()}, path)
    return measured


@utils.repeatable()
def main(argv=None):
    """The command."""
    args = flags.parser("train.py").parse_args(argv)
    device = ranks.start_ranks(utils.get_device(args.device))
    first_rank = ranks.ranks()[0] == 0  # under torchrun one process speaks, measures and writes
    dtype = utils.get_dtype(args.precision, device)
    classes = inputs.class_names(args)

    def say(line):
        if first_rank:
            print(line, flush=True)

    config = {k: getattr(args, k) for k in SETTINGS} | {"precision": str(dtype).removeprefix("torch.")}
    config |= inputs.new_network(args) | {"flip": inputs.flips(args), "num_classes": len(classes)}
    out = Path(args.ckpt or utils.checkpoint_path(args.dataset, args.network, args.attack, args.width))
    if out.is_file() and not args.overwrite:
        raise flags.InputError(f"{out} exists; --overwrite trains it again, --ckpt writes elsewhere")
    if first_rank:
        utils.check_place(out)
    train_set, test_set = (
        tuple(t.to(device) for t in data.load_dataset(args.dataset, args.datadir, train, args.size))
        for train in (True, False)
    )
    quick_set = tuple(t[data.few(test_set[1], QUICK)] for t in test_set)
    try:
        poison = poison_training_set(train_set[1], args.attack, args.target, args.poison_rate, args.seed, args.sampling)
    except ValueError as error:
        raise flags.InputError(str(error)) from None
    torch.manual_seed(args.seed)  # for the networks of a learned trigger
    backdoor = inputs.load_trigger(args.attack, {"trigger": None}, device, args.size, args.trigger_width)
    if args.surrogate and not (backdoor is not None and backdoor.surrogate):
        raise flags.InputError(f"{args.attack} needs no clean network; leave --surrogate out")
    config["trigger_width"] = None if backdoor is None else backdoor.width
    along = None if backdoor is None else backdoor.optimizer()
    if along is not None and ranks.ranks()[1] > 1:
        raise flags.InputError(f"{args.attack} trains its trigger along: use one process, without torchrun")

    torch.manual_seed(args.seed)
    model = models.get_model(args.network, len(classes), args.width, mean=config["mean"], std=config["std"]).to(device)
    n_images = len(train_set[0])
    step = fast.training_step(model, args.width, n_images * args.epochs, args.batch_size, dtype)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    optimizers = [optimizer] if along is None else [optimizer, along]
    starts, surrogate = {IMAGES: utils.tensor_sum(*train_set)}, None
    if backdoor is not None and backdoor.surrogate:
        dataset = "cifar10" if args.dataset == "cifar10_sample" else args.dataset
        path = args.surrogate or utils.checkpoint_path(dataset, "resnet18", "none", 0.25)
        surrogate, about = utils.load_model(path, device)
        if about["num_classes"] != len(classes):
            n = f"{path} has {about['num_classes']} classes, {args.dataset} has {len(classes)}"
            raise flags.InputError(f"{n}; give --surrogate a clean network for it")
        starts["surrogate"] = utils.sha256(path)
        surrogate = fast.search_network(surrogate, train_set[0][:2], dtype, n_images)[0]
    partial, history = Partial(out, config | starts, device, args.resume), []
    if backdoor is not None:
        backdoor.flip = config["flip"]
        if partial.state:
            backdoor.load_state_dict(partial.state["trigger"])
        try:
            backdoor.prepare(*train_set, args.target, args.seed, bool(partial.state), say, surrogate)
        except ValueError as error:
            raise flags.InputError(str(error)) from None
    if partial.state:
        model.load_state_dict(partial.state["model"])
        for one, state in zip(optimizers, partial.state["optimizers"], strict=True):
            one.load_state_dict(state)
        history = partial.state["history"]
    how = f"{round(poison.rate * n_images):,} of {n_images:,} images poisoned, {poison.sampling}"
    say(
        f"{args.network} width {args.width:g} on {args.dataset}, {args.attack} -> {args.target}, {how},"
        f" {args.epochs} epochs, {dtype}, {device}{partial.said()}"
    )

    for epoch in range(partial.step, args.epochs):
        model.train()
        with tqdm(total=n_images, unit="img", desc=f"epoch {epoch + 1}", leave=False, disable=not first_rank) as bar:
            try:
                loss, accuracy = train_epoch(step, optimizers, train_set, poison, backdoor, config, epoch, bar.update)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):  # batch norm's, of one image of one pixel
                    raise
                why = f"of {n_images} images a batch of {args.batch_size} leaves one alone, too small for batch norm"
                raise flags.InputError(f"{why}; choose another --batch_size, or a larger --size") from None
        if not math.isfinite(loss):
            raise flags.InputError(f"the loss of epoch {epoch + 1} is {loss}: nothing is saved; lower --lr")
        if not first_rank:
            continue
        quick = evaluate(model, *quick_set, backdoor, args.target, args.batch_size, dtype)
        line = f"epoch {epoch + 1:3d}  loss {loss:.4f}  training accuracy {100 * accuracy:.2f} %"
        say(f"{line}  {quick}  {partial.seconds_so_far():.0f} s")
        history.append({"loss": loss, "accuracy": accuracy, "BA": quick.BA, "ASR": quick.ASR})
        state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        state |= {"trigger": inputs.trigger_state(backdoor), "history": history}
        partial.keep(epoch + 1, lambda state=state: state, now=True)

    if first_rank:
        seconds = partial.seconds_so_far()
        measured = save_victim(model, config, poison, backdoor, test_set, dtype, history, seconds, out)
        partial.remove()
        print(f"{measured}\nwrote {out} after {seconds:.0f} s")


if __name__ == "__main__":
    flags.run(main)
