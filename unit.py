"""UNIT: Backdoor Mitigation via Automated Neural Distribution Tightening (Cheng et al., ECCV 2024).

    python unit.py --attack badnet                                          # the paper's: 2,500 images, 300 steps
    python unit.py --attack badnet --dataset cifar10_sample --n_steps 100   # 500 embedded images, no download
    python unit.py --attack badnet --max_minutes 30                         # what can be found in that time

Every neuron of a trained network gets an upper bound on its activation, as tight as a small loss of accuracy on the
defence images allows; a trigger's outsized activations are clipped there. The weights never change.
A run that was cut off goes on, from a minute and a step before at most, when the same command is given again.
"""

import argparse

import cli
from cli import InputError, bounded


def parser():
    """Return the command's parser; the first flags have the authors' names and defaults."""
    p = cli.parser("unit.py", "mitigate a backdoor by tight bounds on activations", attacks=("none", *cli.ATTACKS))
    p.add_argument("--phase", default="unit", choices=("unit", "test"), help="test: measure what an earlier run saved")
    p.add_argument("--lr", default=1e-3, type=bounded(float, 0, low_open=True), help="learning rate of the bounds")
    p.add_argument("--n_steps", default=300, type=bounded(int, 1), help="steps, each over all training images")
    p.add_argument(
        "--until", default="steps", choices=("steps", "budget"),
        help="steps: the authors' search; budget: ours, until acc_degrade is used, 2 * n_steps at most",
    )  # fmt: skip
    p.add_argument(
        "--data_rate", type=bounded(float, 0, 1, low_open=True),
        help="share of the training set that is defence data (default: 0.05; all of cifar10_sample)",
    )  # fmt: skip
    p.add_argument("--draw", default="first", choices=("first", "random"), help="which images of each class; by --seed")
    p.add_argument("--acc_degrade", default=0.03, type=bounded(float, 0, 1), help="validation accuracy it may cost")
    p.add_argument(
        "--micro_batch", type=bounded(int, 1), help="images in memory at a time (default: 100 on a CPU, else 1000)"
    )
    p.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto: bf16 where it is fast")
    p.add_argument("--compile", default="auto", choices=("auto", "on", "off"), help="the clips; auto: where it pays")
    p.add_argument(
        "--max_minutes", type=bounded(float, 0, low_open=True),
        help="end the search then, with the best bounds so far; given again, the command goes on",
    )  # fmt: skip
    p.add_argument("--resume", default=True, action=argparse.BooleanOptionalAction, help="go on after a cut-off run")
    p.add_argument("--ckpt", help="victim to defend (default: the one of --network and --attack)")
    p.add_argument("--out", help="where to save (default: ckpt/{dataset}_{network}_{attack}_unit[_budget].pt)")
    p.add_argument("--outdir", default=".", help="folder of the picture")
    p.add_argument("--results", default=str(cli.ROOT / "results"), help="folder of the JSON record")
    return p


if __name__ == "__main__":
    parser().parse_args()  # answers --help and a wrong flag before the seconds that torch takes

import copy
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import models
import pictures
import resuming
import utils
from evaluate import evaluate, load_victim, pass_size
from models import clip_kernels
from models.folding import fold_batch_norm, move_biases
from records import save_record

# --- the method -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnitConfig:
    """The constants of UNIT, the hidden ones too, and how it is computed."""

    lr: float = 1e-3  # of Adam on the bounds
    n_steps: int = 300
    until: str = "steps"  # the authors' search; "budget": ours, see BudgetSchedule
    acc_degrade: float = 0.03  # accuracy on the validation images that may be lost
    n_sigma: float = 4.0  # bounds start at mean + 4 std
    alpha: float = 1e-3  # weight of the tightening term at the start, and what it is reset to
    alpha_up: float = 2.0  # factor after `patience` good steps in a row
    alpha_down: float = 2**1.5  # divisor after `patience` bad steps in a row
    patience: int = 5
    betas: tuple[float, float] = (0.5, 0.9)  # of Adam
    eps: float = 1e-8  # of Adam; it matters, the gradient of alpha * R is itself about 1e-8
    micro_batch: int | None = None  # images in memory at a time, None: by device; changes nothing but rounding
    precision: str = "fp32"  # of the network's arithmetic, or bf16; the bounds are fp32 always
    compile: str = "auto"  # the clips, by torch.compile: "on", "off", or "auto", in long bf16 runs on a CPU

    @property
    def max_steps(self):
        """How many steps are done at most: n_steps, and exactly so many until="steps"; twice as many until="budget"."""
        return self.n_steps if self.until == "steps" else 2 * self.n_steps


@dataclass
class UnitResult:
    """What tighten() found.

    bounds: {site: (C, H, W)}, all >= 0, as they were when `best_step` was measured; best_step: the good step of the
    smallest R, or the last step when none was good; history: lists with one value per step done: `alpha`, `ce` and
    `reg` (R) before its update, `valid_acc` after it; bound_mean: {site: mean bound after each step}; initial_acc:
    accuracy of the unclipped network on the validation images; interrupted: "Ctrl-C" or "time" where that ended it
    before its last step.
    """

    bounds: dict
    best_step: int
    history: dict
    bound_mean: dict
    initial_acc: float
    found_good: bool
    interrupted: str = ""


@dataclass
class AlphaSchedule:
    """The weight alpha of the tightening term: doubled while accuracy holds, cut when it does not."""

    speed: ClassVar = 1.0  # the bounds' learning rate is speed * lr
    over: ClassVar = False  # whether the search ends before its last step
    config: UnitConfig = field(default_factory=UnitConfig)
    alpha: float = field(init=False)  # of the step to come
    up: int = 0  # good steps in a row
    down: int = 0  # bad steps in a row
    resets: int = 0  # good steps in a row with alpha under its start

    def __post_init__(self):
        self.alpha = self.config.alpha

    def update(self, good):
        """Move on by one step; good: whether the step's validation accuracy was within the budget."""
        c = self.config
        self.resets = self.resets + 1 if good and self.alpha < c.alpha else 0
        if self.resets == c.patience:
            self.alpha, self.up, self.down, self.resets = c.alpha, 0, 0, 0
        self.up, self.down = (self.up + 1, 0) if good else (0, self.down + 1)
        if self.up == c.patience:
            self.up, self.alpha = 0, self.alpha * c.alpha_up
        if self.down == c.patience:
            self.down, self.alpha = 0, self.alpha / c.alpha_down


@dataclass
class BudgetSchedule(AlphaSchedule):
    """The schedule of a search until the budget is used: ours, no part of UNIT.

    The authors' alpha falls for dozens of steps after it went too far, and Adam's second moment, which remembers the
    gradients of a large alpha, then keeps the bounds all but still for dozens more. Here they move `speed` times as
    fast; each bad step cuts alpha at once, down to its start, and Adam forgets its moments, so that cross-entropy heals
    what was cut too far. Where that takes more than `wait` bad steps in a row, the bounds go back to the best so far
    and the learning rate is halved. With the last of `halvings` the search ends: then no smaller R within the budget
    was found at the finest rate. It sees what the authors' sees.
    """

    speed: ClassVar = 3.0
    wait: ClassVar = 20
    halvings: ClassVar = 3
    halved: int = 0

    @property
    def over(self):
        """Whether the search is over."""
        return self.halved == self.halvings

    def update(self, good):
        """Move on by one step; good: whether the step's validation accuracy was within the budget."""
        if good:
            super().update(good)
        else:
            self.up, self.down = 0, self.down + 1
            self.alpha = max(self.alpha / self.config.alpha_down, self.config.alpha)

    def mend(self, optimizer, sites, best_bounds):
        """After a bad step: change the optimizer, and the bounds of `sites`.

        best_bounds: {site: (C, H, W)}, or None as long as no step was good: then there is nothing to go back to.
        """
        optimizer.state.clear()
        if self.down < self.wait or best_bounds is None:
            return
        with torch.no_grad():
            for name, site in sites.items():
                site.bound.copy_(best_bounds[name])
        for group in optimizer.param_groups:
            group["lr"] /= 2
        self.down, self.halved = 0, self.halved + 1


class Search:
    """A search under way: what it has measured and found, of which it can end after any step, or go on.

    sites: {site: ClippedReLU} of the network; optimizer: of their bounds; schedule: of alpha.
    """

    def __init__(self, sites, optimizer, schedule):
        self.sites, self.optimizer, self.schedule = sites, optimizer, schedule
        self.history = {"alpha": [], "ce": [], "reg": [], "valid_acc": []}
        self.bound_mean = {name: [] for name in sites}
        self.measured, self.best = None, (math.inf, None, None)

    def record(self, step, now, good):
        """Take what a step gave; now: a value for each list of the history; good: see AlphaSchedule.update."""
        for key, value in now.items():
            self.history[key].append(value)
        means = torch.stack([site.clip_level().mean() for site in self.sites.values()]).tolist()
        for name, mean in zip(self.sites, means, strict=True):
            self.bound_mean[name].append(mean)
        here = step, self._levels()
        # in one go, so that Ctrl-C finds both of the same step
        self.measured, self.best = here, (now["reg"], *here) if good and now["reg"] < self.best[0] else self.best

    def result(self, initial_acc, interrupted):
        """Return the UnitResult of the steps recorded, without what an interrupted one left."""
        for values in (*self.history.values(), *self.bound_mean.values()):
            del values[self.measured[0] + 1 :]
        found_good = self.best[2] is not None
        best_step, bounds = self.best[1:] if found_good else self.measured
        return UnitResult(bounds, best_step, self.history, self.bound_mean, initial_acc, found_good, interrupted)

    def state(self):
        """Return a copy of what the steps to come follow from, and the result, as tensors and plain values."""
        return copy.deepcopy({
            "bounds": {name: site.bound.detach() for name, site in self.sites.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": {k: v for k, v in vars(self.schedule).items() if k != "config"},
            "history": self.history,
            "bound_mean": self.bound_mean,
            "best": self.best,
        })  # fmt: skip

    @torch.no_grad()
    def go_on(self, state):
        """Take up another search where it stood."""
        state = copy.deepcopy(state)
        for name, site in self.sites.items():
            site.bound.copy_(state["bounds"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self.schedule).update(state["schedule"])
        self.history, self.bound_mean = state["history"], state["bound_mean"]
        self.measured, self.best = (len(self.history["ce"]) - 1, self._levels()), state["best"]

    def _levels(self):
        return {name: site.clip_level().detach() for name, site in self.sites.items()}


@utils.repeatable()
def tighten(
    model, x_train, y_train, x_valid, y_valid, config=UnitConfig(), on_step=None, keep=None, state=None,  # noqa: B008
    time_limit=None,
):  # fmt: skip
    """Learn a tight upper bound for every neuron's activation; the model itself is left as it is.

    model: a network of this repo; images uint8 (N, 3, H, W) or float in [0, 1], labels int64 (N,), on any device.
    on_step: called after each step with (step, {"alpha", "ce", "reg", "valid_acc"}).
    keep: called after each step with a function that returns the search's state, and with whether it was the last step
    for want of time; a search given that state as `state`, and all else as before, goes on from there to the same bits.
    time_limit: seconds after which the search ends, after a whole step, with what it found.
    Raises ValueError when the network has bounds already, no activation module that could be clipped, or one that a
    forward pass does not run just once, and for a config.until that is neither "steps" nor "budget". What is no
    nn.ReLU module, F.relu or a GELU, gets no bound.
    On a GPU its passes are recorded as CUDA graphs, so it must not wait for the host in them.
    Under torchrun the processes share the images, and all return the same result.
    Returns a UnitResult; models.set_bounds(model, result.bounds) applies it. Ctrl-C ends the search early and keeps
    what it found, unless not a single step was done.
    """
    if any(isinstance(site, models.ClippedReLU) for site in models.activation_sites(model).values()):
        raise ValueError("the network has bounds already; models.set_bounds(model, None) takes them off")
    if not models.activation_sites(model):
        raise ValueError("the network has no nn.ReLU module to clip; give each activation a module of its own")
    if config.until not in ("steps", "budget"):
        raise ValueError(f"until is {config.until!r}, neither 'steps' nor 'budget'")
    started = time.perf_counter()
    device = next(model.parameters()).device
    net = frozen_copy(model, utils.get_dtype(config.precision, device))
    n_train = len(y_train)
    size = config.micro_batch or usual_micro_batch(device)
    train = _batches(x_train, y_train, size, device)
    valid = _batches(x_valid, y_valid, size, device)

    n_valid = sum(map(len, valid[1]))  # of this process
    initial_acc = accuracy(hits(net, *valid), n_valid)
    fused = fuse_clips(config, device, n_train * config.max_steps)
    start = initial_bounds(net, x_train.to(device).split(size), config.n_sigma)  # of all images in each process
    models.set_bounds(net, start, fused)
    sites = models.activation_sites(net)
    bounds = [site.bound for site in sites.values()]
    schedule = (AlphaSchedule if config.until == "steps" else BudgetSchedule)(config)
    optimizer = torch.optim.Adam(bounds, lr=schedule.speed * config.lr, betas=config.betas, eps=config.eps)
    search, interrupted = Search(sites, optimizer, schedule), ""
    if state is not None:
        search.go_on(state)

    def backward():
        """Return CE(f_c(x), y) over all training images, c = max(b, 0); its gradient is then the bounds' .grad."""
        optimizer.zero_grad(set_to_none=True)
        ce = torch.zeros((), device=device)
        with models.as_one_batch(net):
            for x, y in zip(*train, strict=True):
                loss = cross_entropy(net(x).float(), y) / n_train
                loss.backward()
                ce += loss.detach()
        return ce

    # on a GPU, the many small launches in one
    ce_backward = utils.recorded(backward, device)
    valid_hits = utils.recorded(lambda: hits(net, *valid), device)

    try:
        for step in range(len(search.history["ce"]), config.max_steps):
            if schedule.over:
                break
            alpha = schedule.alpha

            # L = CE(f_c(x), y) + alpha * R
            ce = ce_backward()
            utils.sum_over_ranks([ce, *(b.grad for b in bounds)])
            reg = sum(site.clip_level().mean() for site in sites.values())
            (alpha * reg).backward()
            optimizer.step()

            valid_acc = accuracy(valid_hits(), n_valid)
            good = valid_acc >= initial_acc - config.acc_degrade
            schedule.update(good)

            now = {"alpha": alpha, "ce": ce.item(), "reg": reg.item(), "valid_acc": valid_acc}
            search.record(step, now, good)
            if on_step is not None:
                on_step(step, now)
            if config.until == "budget" and not good:
                schedule.mend(optimizer, sites, search.best[2])
            if time_limit is not None and not schedule.over and step + 1 < config.max_steps:
                late = torch.tensor(time.perf_counter() - started >= time_limit, dtype=torch.float32, device=device)
                utils.sum_over_ranks([late])  # the processes end after the same step
                interrupted = "time" if late else ""
            if keep is not None:
                keep(search.state, bool(interrupted))
            if interrupted:
                break
    except KeyboardInterrupt:
        if search.measured is None:
            raise
        interrupted = "Ctrl-C"
    return search.result(initial_acc, interrupted)


@torch.no_grad()
def initial_bounds(net, x_batches, n_sigma):
    """Return {site: mean + n_sigma * std} over all images of the unclipped activations, std with n - 1 below.

    x_batches: tuple of (n, 3, H, W). However the images are cut into batches, the bounds are to the bit what torch.mean
    and torch.std give on a CPU for all their activations at once, as the published code starts, unless several
    processes share them; no activation is kept.
    Raises ValueError for a site that a forward pass does not run just once.
    """
    moments, n = {name: _Moments() for name in models.activation_sites(net)}, 0

    def look(name, a):
        if moments[name].total.n != n:
            raise ValueError(f"the network runs {name} twice; give each activation a module of its own")
        moments[name].add(a)

    with models.watching(net, look):
        for x in x_batches:
            net(x)
            n += len(x)
    bounds = {}
    for name, seen in moments.items():
        if seen.total.n != n:
            raise ValueError(f"the network does not run {name}; take that module out")
        mean, std = seen.mean_and_std()
        bounds[name] = mean + n_sigma * std
    return bounds


class _Moments:
    """Mean and standard deviation over images that come a few at a time, rounded where torch.mean and torch.std round.

    A standard deviation torch accumulates in double precision.
    """

    def __init__(self):
        self.total = models.ImageSum()
        self.s1 = self.s2 = 0  # in double precision

    def add(self, a):
        """Take further activations (n, C, H, W)."""
        a = (a.cpu() if a.device.type == "mps" else a).float()  # mps has no double precision
        self.total.add(a)
        a = a.double()
        self.s1, self.s2 = self.s1 + a.sum(0), self.s2 + a.square().sum(0)

    def mean_and_std(self):
        """Return both, float32 (C, H, W), std with n - 1 below."""
        n = self.total.n
        variance = (self.s2 - self.s1.square() / n).clamp_min(0) / max(n - 1, 1)
        return self.total.result() / n, variance.sqrt().float()


def cross_entropy(logits, y):
    """Return the sum over images of CE(logits (N, K) in fp32, y (N,) int64), a scalar with a gradient.

    The same bits with AVX2 as with AVX-512. Along a row torch adds as many classes at once as a vector holds, and that
    rounding shows late in a search; with a row per class it adds class after class, if the images fill whole vectors.
    """
    n = len(logits)
    by_class = F.pad(logits, (0, 0, 0, -n % 16)).t()
    return F.nll_loss(F.log_softmax(by_class, 0).t()[:n], y, reduction="sum")


@torch.no_grad()
def hits(net, x_batches, y_batches):
    """Return how many images `net` classifies as labelled, an int64 scalar."""
    return sum((net(x).argmax(1) == y).sum() for x, y in zip(x_batches, y_batches, strict=True))


def accuracy(n_hits, n):
    """Return the accuracy over all processes, a float in [0, 1] with float32's digits; n_hits of n are this one's.

    Those recorded of the published loop are rounded so: where a step costs just acc_degrade, it decides whether that is
    good.
    """
    counts = torch.stack([n_hits, torch.full_like(n_hits, n)])
    utils.sum_over_ranks([counts])
    n_hits, n = counts.float()
    return (n_hits / n).item()


def frozen_copy(model, dtype=torch.float32):
    """Return a copy of `model` that computes the same faster: eval mode, no weight gradients.

    In bf16 batch norm is folded into the convolutions, a twentieth faster; on a GPU its clips then add what it added.
    In fp32 it stays: the folded weights' rounding shows late in a search. On AMX its widest convolutions are matrix
    products.
    dtype: of its convolutions and its linear layer, and so of its activations and logits. It takes uint8 images, too.
    """
    device = next(model.parameters()).device
    net = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    if dtype != torch.float32:
        folded = fold_batch_norm(copy.deepcopy(net))
        if device.type == "cuda":
            folded = move_biases(folded)
        probe = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
        # a network that does not run each batch norm right after the convolution registered before it stays as it is
        if torch.allclose(folded(probe), net(probe), rtol=1e-3, atol=1e-3):
            net = folded
    if utils.has_amx(device):
        models.small_maps_by_products(net, dtype, in_eval=True)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.to(dtype).register_forward_pre_hook(lambda layer, x: x[0].to(layer.weight.dtype))
    net.register_forward_pre_hook(lambda _net, x: utils.to_float(x[0]))
    return net.to(device, memory_format=torch.channels_last)


def fuse_clips(config, device, n_images):
    """Return whether to compile the clips of a search over n_images in all, steps counted.

    That takes some seconds, and saves a quarter of the time in bf16, in fp32 a twentieth; on a GPU a second, for nearly
    half the time in bf16.
    """
    if device.type == "cuda":
        pays = clip_kernels.available(device) and n_images > 200_000
    else:
        pays = config.precision == "bf16" and utils.compiling_pays(device, n_images, least=20_000)
    return {"auto": pays, "on": True, "off": False}[config.compile]


def usual_micro_batch(device):
    """Return how many images to hold in memory at a time: enough to keep a GPU busy, few enough for a CPU's caches."""
    return pass_size(device, 100)


def _batches(x, y, size, device):
    rank, n_ranks = utils.ranks()
    x, y = x[rank::n_ranks], y[rank::n_ranks]
    return x.to(device).split(size), y.to(device).split(size)


# --- the command ------------------------------------------------------------------------------------------------------


def run_search(model, data, config, partial, keep, time_limit):
    """Run tighten() under a progress bar; return its result and its seconds, those before it was cut off too.

    data: what defence_data() returns; partial: {"state", "step", "seconds", ...} to go on from; else see tighten().
    """
    start = time.perf_counter()
    with tqdm(total=config.max_steps, initial=partial["step"], unit="step") as progress:

        def on_step(step, now):
            report(step, now, config.max_steps, progress)

        result = tighten(model, *data, config, on_step, keep=keep, state=partial["state"], time_limit=time_limit)
    return result, partial["seconds"] + time.perf_counter() - start


def defence_data(args):
    """Return (x_train, y_train, x_valid, y_valid), each uint8 image passed once through crop and flip, by the flags."""
    images, labels = utils.load_dataset(args.dataset, args.datadir, train=True)
    rate = args.data_rate or (1.0 if args.dataset == "cifar10_sample" else 0.05)
    drawing = torch.Generator().manual_seed(args.seed) if args.draw == "random" else None
    train, valid = utils.defence_split(labels, rate, generator=drawing)
    generator = torch.Generator().manual_seed(args.seed)
    x_train, x_valid = (utils.augment(images[i], generator) for i in (train, valid))
    return x_train, labels[train], x_valid, labels[valid]


def report(step, now, n_steps, progress):
    """Move the progress bar on; every ten steps, and after the last, print a line."""
    progress.update()
    if (step + 1) % 10 == 0 or step + 1 == n_steps:
        progress.write(
            f"step {step + 1:4d}  CE {now['ce']:.4f}  R {now['reg']:.4f}  alpha {now['alpha']:.3g}"
            f"  validation accuracy {100 * now['valid_acc']:.2f}%"
        )
        sys.stdout.flush()  # in a log file, too, the line is there when the step is done


def save_defended(model, checkpoint, result, config, figures, path):
    """Write the defended model, weights and bounds and what is known of it, as one file that evaluate.py takes.

    figures: what was measured on it and with which trigger, plain values and tensors.
    """
    weights = {k: v for k, v in model.state_dict().items() if not k.endswith(".bound")}
    utils.save_checkpoint(
        {
            **checkpoint,
            **figures,
            "state_dict": utils.packed_weights(weights),
            "bounds": {k: v.cpu() for k, v in result.bounds.items()},
            "defence": {"name": "unit", "best_step": result.best_step, **asdict(config)},
        },
        path,
    )


def main(argv=None):
    """The command."""
    args = parser().parse_args(argv)
    device = utils.start_ranks(utils.get_device(args.device))
    first = utils.ranks()[0] == 0  # under torchrun one process speaks, measures and writes
    dtype = utils.get_dtype(args.precision, device)
    utils.reset_peak_memory(device)
    path, model, checkpoint, backdoor, target = load_victim(args, device)
    tag = utils.network_tag(checkpoint["network"], checkpoint["width"])
    name = "unit" if args.until == "steps" else "unit_budget"
    out = Path(args.out or utils.CKPT / f"{args.dataset}_{tag}_{args.attack}_{name}.pt")
    test = tuple(t.to(device) for t in utils.load_dataset(args.dataset, args.datadir, train=False))
    if first and args.dataset != "cifar10":
        print(f"on {args.dataset}: {len(test[0]):,} test images, a part of CIFAR-10's 10,000")

    def measure(model):
        return evaluate(model, *test, backdoor, target, args.batch_size, dtype)

    if args.phase == "test":
        if not first:
            return
        defended = utils.load_model(out, device)[0].to(memory_format=torch.channels_last)
        print(f"before  {path}\n        {measure(model)}\nafter   {out}\n        {measure(defended)}")
        return
    if checkpoint["bounds"] is not None:
        raise InputError(f"{path} has bounds already; give --ckpt the victim")
    config = UnitConfig(
        lr=args.lr,
        n_steps=args.n_steps,
        until=args.until,
        acc_degrade=args.acc_degrade,
        micro_batch=args.micro_batch or usual_micro_batch(device),
        precision="fp32" if dtype == torch.float32 else "bf16",
        compile=args.compile,
    )
    data = defence_data(args)
    victim = {"file": path.name, "sha256": utils.sha256(path)}
    settings = resuming.settings_of(args, config, victim["sha256"], device)
    kept_at = resuming.partial_path(out, settings)
    partial = (resuming.load_partial(kept_at, settings) if args.resume else None) or resuming.FRESH
    time_limit = 60 * args.max_minutes if args.max_minutes else None
    if not first:
        tighten(model, *data, config, state=partial["state"], time_limit=time_limit)
        return
    picture = Path(args.outdir) / f"{name}_{args.attack}.png"
    if out.resolve() == path.resolve():
        raise InputError(f"--out is the victim {path} itself; give another place")
    for place in (out, picture, Path(args.results) / "record.json"):
        utils.check_place(place)

    print(f"{path}, {len(data[0]):,} training and {len(data[2]):,} validation images, {config.precision} on {device}")
    before = measure(model)
    print(f"before  {before}", flush=True)
    if partial["step"]:
        print(f"going on after step {partial['step']} of {config.max_steps} ({kept_at})", flush=True)
    keep = resuming.keeping(kept_at, settings, partial, device)
    result, seconds = run_search(model, data, config, partial, keep, time_limit)
    done = len(result.history["ce"])
    if result.interrupted:
        why = {"Ctrl-C": "interrupted", "time": "out of time"}[result.interrupted]
        print(f"{why} after {done} of {config.max_steps} steps: keeping the best bounds so far")
    if not result.found_good:
        print("note: no step kept the validation accuracy within acc_degrade; the last step's bounds are taken")
    models.set_bounds(model, result.bounds)
    known = {}
    if backdoor is not None and checkpoint["attack"] is None:  # a file from elsewhere: what the user knows of it
        trigger = {k: v.cpu() for k, v in backdoor.state_dict().items()}
        known = {"attack": args.attack, "target": target, "trigger": trigger}
    unmeasured = dict.fromkeys(before._fields)
    save_defended(model, checkpoint, result, config, known | unmeasured, out)  # whatever happens from here on
    after = measure(model)
    peak = resuming.peak_so_far(partial["peak"], device)
    memory = "" if peak is None else f", {peak:.2f} GiB of memory at most"
    print(f"after   {after}\nstep {result.best_step + 1} chosen, {seconds:.1f} s for {done} steps{memory}")

    save_defended(model, checkpoint, result, config, known | after._asdict(), out)
    pictures.draw_history(result.history, result.best_step, result.initial_acc - config.acc_degrade, picture)
    figures = {"n_train": len(data[0]), "n_valid": len(data[2]), "seconds": seconds, "peak_GiB": peak}
    figures |= {"before": before._asdict(), "after": after._asdict(), "resumed_after": partial["step"]}
    figures |= {k: v for k, v in vars(result).items() if k != "bounds"}
    record = save_record("unit", args, config, victim, device, tag, **figures)
    print(f"wrote {out}, {picture}, {record}")
    if result.interrupted == "Ctrl-C":
        raise KeyboardInterrupt
    if result.interrupted:
        print("the same command goes on from there")
    else:
        kept_at.unlink(missing_ok=True)


if __name__ == "__main__":
    cli.run(main)
