"""Train a victim: poison CIFAR-10, train a network on it, save it with everything needed to judge it.

    python train.py --attack badnet     # writes ckpt/cifar10_resnet18_badnet.pt

A run that was cut off goes on after its last whole epoch when the same command is given again.
"""

import argparse

import cli
from cli import InputError, bounded


def parser():
    """Return the command's parser."""
    p = cli.parser("train.py", "train a (backdoored) victim", attacks=("none", *cli.ATTACKS))
    p.add_argument("--width", default=1.0, type=bounded(float, 1 / 64, 8), help="factor on all channels")
    p.add_argument("--epochs", default=30, type=bounded(int, 1), help="as many images each as the training set has")
    p.add_argument("--lr", default=0.1, type=bounded(float, 0, low_open=True), help="peak learning rate")
    p.add_argument("--weight_decay", default=5e-4, type=bounded(float, 0), help="on all parameters")
    p.add_argument("--poison_rate", type=bounded(float, 0, 0.99), help="share poisoned (default: the attack's usual)")
    p.add_argument(
        "--sampling", default="resampled", choices=("resampled", "fixed"),
        help="poisoned images drawn anew at every access, trigger after augmentation; or drawn once, trigger before",
    )  # fmt: skip
    p.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where it is fast")
    p.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="torch.compile; auto: long runs")
    p.add_argument("--resume", default=True, action=argparse.BooleanOptionalAction, help="go on after a cut-off run")
    p.add_argument("--overwrite", action="store_true", help="train again although the victim lies there already")
    p.add_argument("--ckpt", help="where to write (default: ckpt/{dataset}_{network}_{attack}.pt)")
    return p


if __name__ == "__main__":
    parser().parse_args()  # answers --help and a wrong flag before the seconds that torch takes

import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import models
import resuming
import utils
from backdoors import epoch_order, poison_training_set
from evaluate import evaluate, victim_backdoor

QUICK = 1000  # test images measured after each epoch; all of them after the last
# two runs are the same run when these agree
SETTINGS = ("dataset", "network", "attack", "seed", "batch_size", "target", "width", "epochs", "lr", "weight_decay")
SETTINGS += ("poison_rate", "sampling", "precision")


def learning_rate(step, n_steps, peak, warmup=0.15):
    """Return the rate at `step` of `n_steps`: linear from 0 to `peak` over the first 15 %, then linear to 0."""
    rise = warmup * n_steps
    return peak * min((step + 1) / rise, (n_steps - step) / (n_steps - rise))


def poisoned_batch(images, labels, index, roles, poison, backdoor, generator):
    """Return one training batch, float in [0, 1], and its labels; augmentation and trigger in the sampling's order.

    images, labels: the whole training set, uint8 (N, 3, H, W) and int64 (N,); index: int64 (B,), the batch;
    roles: int64 (B,): 0 clean, 1 poisoned, 2 WaNet's noise mode.
    """
    index = index.to(images.device, non_blocking=images.is_cuda)
    x, y = utils.to_float(images[index]), labels[index].clone()
    trigger_last = poison.sampling == "resampled"
    if trigger_last:
        x = utils.augment(x, generator)
    hit = (roles == 1).nonzero()[:, 0].to(x.device, non_blocking=x.is_cuda)
    if len(hit):
        x[hit] = backdoor(x[hit])
        if poison.relabel:
            y[hit] = poison.target
    noisy = (roles == 2).nonzero()[:, 0].to(x.device, non_blocking=x.is_cuda)
    if len(noisy):
        x[noisy] = backdoor.noise_mode(x[noisy], generator)
    return x if trigger_last else utils.augment(x, generator), y


def _generator(seed, epoch, stream, rank=0):
    return torch.Generator().manual_seed((seed * 100_003 + epoch) * 7 + stream + (rank << 56))


def training_batches(data, poison, backdoor, config, epoch):
    """Yield (images float in [0, 1], labels, size of the whole batch) of one epoch, this process's share of each batch.

    data: the whole training set, uint8 (N, 3, H, W) and int64 (N,). All follows from seed and epoch, so that a resumed
    run sees the same images.
    """
    size = config["batch_size"]
    order, roles = epoch_order(poison, len(data[0]), size, _generator(config["seed"], epoch, 0))
    rank, n_ranks = utils.ranks()
    generator = _generator(config["seed"], epoch, 1, rank)
    share = slice(rank, None, n_ranks)
    for index, role in zip(order.split(size), roles.split(size), strict=True):
        x, y = poisoned_batch(*data, index[share], role[share], poison, backdoor, generator)
        yield x, y, len(index)


def forward_backward(model, x, y, size, dtype):
    """Leave in .grad the gradient of the mean cross-entropy over a batch of `size` images, of which x is one's share.

    Returns (summed cross-entropy, number of labels met) of these images, fp32.
    """
    with utils.autocast(x.device, dtype):
        logits = model(x)
    loss = F.cross_entropy(logits.float(), y, reduction="sum")
    # gradients are averaged over the processes: this is the mean over the whole batch
    (loss / size * utils.ranks()[1]).backward()
    return torch.stack((loss.detach(), (logits.detach().argmax(1) == y).sum()))


class RecordedStep:
    """forward_backward() of whole batches as one launch on a GPU: recorded at the first batch of its shape.

    Small batches keep a GPU waiting for the next of many small launches.
    """

    def __init__(self, model, batch_size, dtype):
        self.model, self.batch_size, self.dtype = model, batch_size, dtype
        self.params = list(model.parameters())
        self.recordings = {}  # of each shape: images, labels, what replays, gradients

    def __call__(self, x, y, size):
        if len(x) != self.batch_size:  # the last of an epoch
            return forward_backward(self.model, x, y, size, self.dtype)
        if x.shape not in self.recordings:
            self.recordings[x.shape] = self._record(x.clone(), y.clone())
        images, labels, replay, grads = self.recordings[x.shape]
        images.copy_(x)
        labels.copy_(y)
        result = replay()
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad
        return result

    def _record(self, x, y):
        buffers = copy.deepcopy(dict(self.model.named_buffers()))  # batch norm's, which a rehearsal moves

        def work():
            for p in self.params:
                p.grad = None
            return forward_backward(self.model, x, y, len(x), self.dtype)

        replay = utils.recorded(work, x.device)
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
        return x, y, replay, [p.grad for p in self.params]


def train_epoch(step, optimizer, data, poison, backdoor, config, epoch, layout, after_step):
    """Train one epoch in place, calling after_step(images seen) at each step; step: what training_step() returns.

    Returns (mean loss, share of training labels met).
    """
    images = data[0]
    total = torch.zeros(2, device=images.device)
    per_epoch = -(-len(images) // config["batch_size"])
    for i, (x, y, size) in enumerate(training_batches(data, poison, backdoor, config, epoch)):
        for group in optimizer.param_groups:
            done, n_steps = epoch * per_epoch + i, config["epochs"] * per_epoch
            group["lr"] = learning_rate(done, n_steps, config["lr"])
        total += step(x.contiguous(memory_format=layout), y, size)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step(size)
    utils.sum_over_ranks([total])
    return (total / len(images)).tolist()


def training_step(model, compiling, width, n_images, batch_size, dtype):
    """Return forward_backward() for the model, given (images, labels, size of the whole batch), the fast way.

    Shared among the processes of torchrun; compiled on a CPU if that pays, recorded on a GPU.
    compiling: the flag; n_images: to be trained on; batch_size: over all processes; dtype: computed in. A batch of
    another size, the last of an epoch, goes through as it is.
    """
    utils.speed_up_small_maps(model, dtype)
    n_ranks = utils.ranks()[1]
    device = next(model.parameters()).device
    if device.type == "cuda" and n_ranks == 1 and compiling != "on":
        return RecordedStep(model, batch_size, dtype)
    shared = DistributedDataParallel(model) if n_ranks > 1 else model
    pays = utils.compiling_pays(device, n_images, width)
    chosen = {"auto": pays, "on": True, "off": False}[compiling]
    compiled = torch.compile(shared, dynamic=False) if chosen else shared

    def step(x, y, size):
        return forward_backward(compiled if len(x) * n_ranks == batch_size else shared, x, y, size, dtype)

    return step


def save_victim(model, config, poison, backdoor, test, dtype, history, seconds, path):
    """Round the weights to half precision, measure what that gives on `test`, save it; return the Measured."""
    state = utils.half_weights(model.state_dict())
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    measured = evaluate(model, *test, backdoor, config["target"], config["batch_size"], dtype)
    utils.save_checkpoint(
        {
            **config,
            "num_classes": 10,
            "sampling": poison.sampling,
            "poison_rate": poison.rate,
            "noise_rate": poison.noise_rate,
            "clean_label": not poison.relabel,
            "poison_indices": poison.indices.to(torch.int32),
            "trigger": None if backdoor is None else {k: v.cpu() for k, v in backdoor.state_dict().items()},
            "state_dict": state,
            "bounds": None,
            **measured._asdict(),
            "history": history,
            "seconds": seconds,
            "versions": utils.machine(test[0].device),
        },
        path,
    )
    return measured


@utils.repeatable()
def main(argv=None):
    """The command."""
    args = parser().parse_args(argv)
    device = utils.start_ranks(utils.get_device(args.device))
    first_rank = utils.ranks()[0] == 0  # under torchrun one process speaks, measures and writes
    dtype = utils.get_dtype(args.precision, device)
    config = {k: getattr(args, k) for k in SETTINGS} | {"precision": str(dtype).removeprefix("torch.")}
    out = Path(args.ckpt or utils.checkpoint_path(args.dataset, args.network, args.attack, args.width))
    partial_path = resuming.partial_path(out)
    if out.exists() and not args.overwrite:
        raise InputError(f"{out} exists; --overwrite trains it again, --ckpt writes elsewhere")
    if first_rank:
        utils.check_place(out)

    data = tuple(t.to(device) for t in utils.load_dataset(args.dataset, args.datadir, train=True))
    test = tuple(t.to(device) for t in utils.load_dataset(args.dataset, args.datadir, train=False))
    try:
        poison = poison_training_set(data[1], args.attack, args.target, args.poison_rate, args.seed, args.sampling)
    except ValueError as error:
        raise InputError(str(error)) from None
    backdoor = victim_backdoor(args.attack, {"trigger": None}, device)

    torch.manual_seed(args.seed)
    model = models.get_model(args.network, 10, args.width)
    layout = utils.training_layout(model.to(device))
    model.to(memory_format=layout)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    first, seconds, history = 0, 0.0, []
    partial = resuming.load_partial(partial_path, {k: config[k] for k in SETTINGS}) if args.resume else None
    if partial:
        model.load_state_dict(partial["state_dict"])
        optimizer.load_state_dict(partial["optimizer"])
        first, seconds, history = partial["epoch"], partial["seconds"], partial["history"]
    n_images = len(data[0])
    poisoned = round(poison.rate * n_images)
    say = print if first_rank else lambda *_args, **_kwargs: None
    if partial:
        say(f"going on after epoch {first} of {args.epochs} ({partial_path})")
    say(
        f"{args.network} width {args.width:g} on {args.dataset}, {args.attack} -> {args.target}, {poisoned:,} of"
        f" {n_images:,} images poisoned, {args.epochs} epochs, {dtype}, {device}"
    )

    # by the whole run's length, so that a resumed one rounds alike
    step = training_step(model, args.compile, args.width, n_images * args.epochs, args.batch_size, dtype)
    for epoch in range(first, args.epochs):
        start = time.perf_counter()
        model.train()
        with tqdm(
            total=n_images, unit="img", desc=f"epoch {epoch + 1}/{args.epochs}", leave=False, disable=not first_rank
        ) as progress:
            loss, accuracy = train_epoch(
                step, optimizer, data, poison, backdoor, config, epoch, layout, progress.update
            )
        seconds += time.perf_counter() - start
        if not first_rank:
            continue
        quick = evaluate(model, test[0][:QUICK], test[1][:QUICK], backdoor, args.target, args.batch_size, dtype)
        line = f"epoch {epoch + 1:3d}  loss {loss:.4f}  training accuracy {100 * accuracy:.2f}%"
        print(f"{line}  {quick}  {seconds:.0f} s", flush=True)
        history.append({"loss": loss, "accuracy": accuracy, "BA": quick.BA, "ASR": quick.ASR})
        utils.save_checkpoint(
            {
                "config": config,
                "epoch": epoch + 1,
                "seconds": seconds,
                "history": history,
                "state_dict": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
            partial_path,
        )

    if first_rank:
        measured = save_victim(model, config, poison, backdoor, test, dtype, history, seconds, out)
        partial_path.unlink(missing_ok=True)
        print(f"{measured}\nwrote {out} after {seconds:.0f} s of training")


if __name__ == "__main__":
    cli.run(main)
