"""UNIT: Backdoor Mitigation via Automated Neural Distribution Tightening (Cheng et al., ECCV 2024).

    python unit.py --attack badnet                                          # the paper's: 2,500 images, 300 steps
    python unit.py --attack badnet --step_images 250                        # an eighth of the images at a time
    python unit.py --attack badnet --dataset cifar10_sample --n_steps 40 --step_images 50    # embedded images

Every neuron of a trained network gets an upper bound on its activation, as tight as a small loss of accuracy on clean
images allows. Activations are clipped there, so that abnormally large ones do not pass. The weights do not change.
"""

import flags  # first: it answers --help and a wrong flag before torch is imported

import copy
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import fast
import models
import utils
from evaluate import evaluate
from fast import ranks
from support import inputs, machine, plots, records
from support.export import write_export
from support.resume import Partial
from support.watch import Watch

# --- the method -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnitConfig:
    """Settings of the search: those of the paper and of the authors' code, then those of the computation."""

    lr: float = 1e-3  # of Adam on the bounds
    n_steps: int = 300
    step_images: int | None = None  # training images per step, drawn at each step; None: all, as published
    acc_degrade: float = 0.03  # validation accuracy that the bounds may cost
    n_sigma: float = 4.0  # bounds start at mean + 4 std
    alpha: float = 1e-3  # initial weight of R, and the value it is reset to
    alpha_up: float = 2.0  # factor after `patience` good steps in a row
    alpha_down: float = 2**1.5  # divisor after `patience` bad steps in a row
    patience: int = 5
    betas: tuple[float, float] = (0.5, 0.9)  # of Adam
    eps: float = 1e-8  # of Adam; it matters, because the gradient of alpha * R is about as small
    seed: int = 0  # of the draw of step_images
    micro_batch: int | None = None  # images per forward pass, None: by device; it changes only rounding
    precision: str = "fp32"  # of the network's arithmetic, or bf16; the bounds are always fp32
    plain: bool = False  # True: the reference, without the code of fast/

    def check(self, n_train):
        """Raise ValueError for an impossible setting; n_train: number of training images."""
        for name in ("lr", "n_steps", "patience", "micro_batch", "step_images"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
            if name != "lr" and value is not None and not hasattr(value, "__index__"):
                raise ValueError(f"{name} is {value}; it must be a whole number")
        if not 0 <= self.acc_degrade <= 1:
            raise ValueError(f"acc_degrade is {self.acc_degrade}; it must be from 0 to 1")
        if self.step_images and self.step_images > n_train:
            raise ValueError(f"step_images is {self.step_images}, above the {n_train} training images")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {self.precision!r}; it must be fp32 or bf16")


@dataclass
class UnitResult:
    """The result of tighten().

    bounds: {site: (C, H, W)}, all >= 0, after the update of `best_step`.
    best_step: the good step of the smallest R, counted from 0; the last step if none was good (found_good is False).
    history: {name: one value per step}: `alpha`, `ce` and `reg` (R) before the step's update, `valid_acc` after it.
    initial_acc: validation accuracy of the unclipped network.
    """

    bounds: dict
    best_step: int
    found_good: bool
    history: dict
    initial_acc: float


@dataclass
class AlphaSchedule:
    """The weight alpha of R: doubled after 5 good steps in a row, divided by 2 ** 1.5 after 5 bad ones. Where it is
    below its initial value, 5 good steps in a row set it back to that."""

    config: UnitConfig = field(default_factory=UnitConfig)
    alpha: float = field(init=False)  # of the next step
    up: int = 0  # good steps in a row
    down: int = 0  # bad steps in a row
    resets: int = 0  # good steps in a row with alpha below its initial value

    def __post_init__(self):
        self.alpha = self.config.alpha

    def update(self, good):
        """Update alpha after a step; good: whether its validation accuracy was within the budget."""
        c = self.config
        self.resets = self.resets + 1 if good and self.alpha < c.alpha else 0
        if self.resets == c.patience:
            self.alpha, self.up, self.down, self.resets = c.alpha, 0, 0, 0
        self.up, self.down = (self.up + 1, 0) if good else (0, self.down + 1)
        if self.up == c.patience:
            self.up, self.alpha = 0, self.alpha * c.alpha_up
        if self.down == c.patience:
            self.down, self.alpha = 0, self.alpha / c.alpha_down


class Search:
    """The state of a search: the bounds, their optimizer, alpha, the history, and the best bounds so far.

    sites: {site: clip} of the network; initial_acc: validation accuracy of the unclipped network.
    """

    def __init__(self, sites, initial_acc, config):
        self.sites, self.initial_acc = sites, initial_acc
        self.bounds = [site.bound for site in sites.values()]
        for bound in self.bounds:
            bound.grad = torch.zeros_like(bound)
        self.optimizer = torch.optim.Adam(self.bounds, lr=config.lr, betas=config.betas, eps=config.eps)
        self.schedule = AlphaSchedule(config)
        self.history = {"alpha": [], "ce": [], "reg": [], "valid_acc": []}
        self.best = {"reg": math.inf, "step": None, "bounds": None}

    @property
    def step(self):
        """Number of steps done."""
        return len(self.history["ce"])

    def clip_levels(self):
        """Return {site: c = max(b, 0)}, differentiable in b."""
        return {name: site.clip_level() for name, site in self.sites.items()}

    @torch.no_grad()
    def record(self, good, **now):
        """Record a step's alpha, ce, reg and valid_acc; good: whether valid_acc is within the budget."""
        if good and now["reg"] < self.best["reg"]:
            self.best = {"reg": now["reg"], "step": self.step, "bounds": self.clip_levels()}
        for key, value in now.items():
            self.history[key].append(value)

    def result(self):
        """Return the UnitResult of the steps done, at least one."""
        best, found_good = self.best, self.best["step"] is not None
        step, bounds = (best["step"], best["bounds"]) if found_good else (self.step - 1, self.clip_levels())
        bounds = {name: level.detach() for name, level in bounds.items()}
        return UnitResult(bounds, step, found_good, self.history, self.initial_acc)

    def state_dict(self):
        """Return a copy of the state as tensors and plain values: bounds, optimizer, alpha, history, best bounds."""
        schedule = {k: v for k, v in vars(self.schedule).items() if k != "config"}
        state = {"bounds": [b.detach() for b in self.bounds], "optimizer": self.optimizer.state_dict()}
        return copy.deepcopy(state | {"schedule": schedule, "history": self.history, "best": self.best})

    @torch.no_grad()
    def load_state_dict(self, state):
        """Restore a state_dict(). With the same model, images and config the search continues bit for bit."""
        state = copy.deepcopy(state)
        for bound, value in zip(self.bounds, state["bounds"], strict=True):
            bound.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self.schedule).update(state["schedule"])
        self.history, self.best = state["history"], state["best"]


@utils.repeatable()
def tighten(model, x_train, y_train, x_valid, y_valid, config=UnitConfig(), callback=None, state=None):
    """Learn a tight upper bound for every neuron's activation; `model` itself is not changed.

    model: any nn.Module that takes images in [0, 1], normalizes them itself, and returns logits (N, classes) or an
    object with `.logits`. Images: uint8 or float in [0, 1], (N, 3, H, W); labels: int64 (N,); on any device.
    callback: called after each step with the Search; a true value ends the search early.
    state: a Search.state_dict() to resume from. Under torchrun the processes share the images.
    Returns a UnitResult; models.clipped(model, result.bounds) is the defended network.
    Raises ValueError for invalid images, labels or settings, and for a network that cannot be clipped
    (models.activation_sites).
    """
    config.check(len(x_train))
    data.check_images(x_train, "training")
    data.check_images(x_valid, "validation", x_train.shape[1:])
    device = models.weights_device(model)
    size = config.micro_batch or utils.pass_size(device, 100)
    dtype, n_images = utils.get_dtype(config.precision, device), config.n_steps * (config.step_images or len(x_train))
    net, sites, layer = fast.search_network(model, x_train[:2], dtype, n_images, config.plain)
    num_classes = models.logits(net(data.to_float(x_train[:2].to(device)))).shape[1]
    data.check_labels(y_train, len(x_train), num_classes, "training")
    data.check_labels(y_valid, len(x_valid), num_classes, "validation")

    # the start: b = mean + 4 std of each neuron's unclipped activation
    initial_acc = accuracy(net, x_valid, y_valid, size)
    net = models.with_bounds(net, initial_bounds(net, sites, x_train, size, config.n_sigma), layer)
    search = Search(models.clips_of(net), initial_acc, config)
    if state is not None:
        search.load_state_dict(state)

    for step in range(search.step, config.n_steps):
        # L = CE(f_c(x), y) + alpha * R,  c = max(b, 0),  R = sum over sites of mean(c); backward in two parts
        search.optimizer.zero_grad(set_to_none=False)  # zeros, for bounds on which no logit depends
        x, y = draw_images(x_train, y_train, config, step)
        ce = cross_entropy_backward(net, search.bounds, x, y, size)
        alpha, reg = search.schedule.alpha, sum(c.mean() for c in search.clip_levels().values())
        (alpha * reg).backward()
        search.optimizer.step()

        # good: the updated bounds cost at most acc_degrade of accuracy. The best step is the good one of the smallest R
        # (that before its update, as published).
        valid_acc = accuracy(net, x_valid, y_valid, size)
        good = valid_acc >= initial_acc - config.acc_degrade
        search.record(good, alpha=alpha, ce=ce.item(), reg=reg.item(), valid_acc=valid_acc)
        search.schedule.update(good)
        if callback is not None and callback(search):
            break
    return search.result()


def initial_bounds(net, sites, x, size, n_sigma):
    """Return {site: (C, H, W)}, mean + n_sigma * std of each unclipped activation over the images, std by n - 1.

    sites: models.activation_sites(net, ...); x: the training images, of which `size` are passed at a time.
    """
    device = next(net.parameters()).device
    moments = models.activation_moments(net, sites, (data.to_float(x_batch.to(device)) for x_batch in x.split(size)))
    return {name: (mean + n_sigma * std).float() for name, (mean, std) in moments.items()}


def draw_images(x, y, config, step):
    """Return the training images and labels of a step: all, or config.step_images of them without replacement."""
    if config.step_images is None:
        return x, y
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    chosen = torch.randperm(len(y), generator=generator)[: config.step_images]
    return x[chosen.to(x.device)], y[chosen.to(y.device)]


def cross_entropy_backward(net, bounds, x, y, size):
    """Add d CE / d b to each bound's .grad and return CE, the mean over all images, of which `size` pass at a time."""
    n, ce = len(y), torch.zeros((), device=bounds[0].device)
    for x_batch, y_batch in ranks.share(x, y, size, ce.device):
        loss = F.cross_entropy(net(data.to_float(x_batch)).float(), y_batch, reduction="sum") / n
        if not loss.requires_grad:
            raise ValueError("no gradient reaches the bounds; the network must not detach its activations")
        loss.backward()
        ce += loss.detach()
    ranks.sum_over_ranks([ce, *(b.grad for b in bounds)])
    return ce


@torch.no_grad()
def accuracy(net, x, y, size):
    """Return the accuracy of `net`, rounded to float32 as published."""
    device = next(net.parameters()).device
    hits = torch.zeros((), dtype=torch.int64, device=device)
    for x_batch, y_batch in ranks.share(x, y, size, device):
        hits += (net(data.to_float(x_batch)).argmax(1) == y_batch).sum()
    ranks.sum_over_ranks([hits])
    return (hits.float() / len(y)).item()


# --- the command ------------------------------------------------------------------------------------------------------


def main(argv=None):
    """The command."""
    args = flags.parser("unit.py").parse_args(argv)
    device = ranks.start_ranks(utils.get_device(args.device))
    first = ranks.ranks()[0] == 0  # under torchrun one process speaks, measures and writes
    dtype = utils.get_dtype(args.precision, device)
    machine.reset_peak_memory(device)
    path, model, checkpoint, backdoor = inputs.load_victim(args, device)
    out = inputs.defended_path(args, checkpoint, "unit")
    inputs.check_apart("--export", args.export, {"the victim": path, "the defended model": out})
    *test_set, triggered = inputs.test_data(args, checkpoint, device)

    def measure(model):
        return evaluate(model, *test_set, backdoor, args.target, args.batch_size, dtype, triggered)

    if args.phase == "test":
        if not out.is_file():
            raise flags.InputError(f"no defended model {out}; make it by the same command without --phase test")
        if first:
            defended = utils.load_model(out, device)[0]
            print(f"before  {path}\n        {measure(model)}\nafter   {out}\n        {measure(defended)}")
            write_export(defended, args.export, args.size)
        return
    inputs.check_victim(path, checkpoint, out)
    images = inputs.augmented_defense_data(args)
    config = UnitConfig(
        **{k: getattr(args, k) for k in ("lr", "n_steps", "step_images", "acc_degrade", "seed")},
        micro_batch=args.micro_batch or utils.pass_size(device, 100),
        precision="fp32" if dtype == torch.float32 else "bf16",
    )
    inputs.check_search(path, model, config, images)
    victim = records.victim_of(path, checkpoint)
    settings = {k: getattr(args, k) for k in ("dataset", "size", "data_rate", "draw")} | {"flip": inputs.flips(args)}
    partial = Partial(out, settings | asdict(config) | inputs.origin(path, checkpoint, *images), device, args.resume)
    picture = Path(args.outdir) / f"unit_{utils.file_tag(args.attack)}.png"
    record_at = records.path_of("unit", args, victim)
    if first:
        for place in filter(None, (out, picture, record_at, args.export)):
            utils.check_place(place)
        n = f"{len(images[0]):,} training and {len(images[2]):,} validation images"
        before = measure(model)
        print(f"{path}, {n}, {config.precision} on {device}\nbefore  {before}{partial.said()}", flush=True)

    with Watch(config.n_steps, partial, args.max_minutes, first) as watch:
        result = tighten(model, *images, config, watch, partial.state)
    if not first:
        return
    seconds, peak, steps = partial.seconds_so_far(), partial.peak_so_far(), len(result.history["ce"])
    if watch.why:
        print(f"{watch.why} after {steps} of {config.n_steps} steps: keeping the best bounds so far")
    if not result.found_good:
        print("note: no step kept the validation accuracy within acc_degrade; the last step's bounds are taken")
    if watch.why and records.whole(record_at):  # whose files stay
        out, picture = (p.with_stem(f"{p.stem}_cut_off") for p in (out, picture))
    saved = checkpoint | inputs.about_defended(args, checkpoint, backdoor)
    saved |= {"defense": {"name": "unit", "best_step": result.best_step, **asdict(config)}}
    saved |= {"bounds": {k: v.cpu() for k, v in result.bounds.items()}}
    saved |= {"state_dict": utils.packed_weights(model.state_dict())}
    utils.save_checkpoint(saved | dict.fromkeys(before._fields), out)  # before measuring, which may be interrupted
    defended = models.clipped(model, result.bounds)
    after = measure(defended)
    utils.save_checkpoint(saved | after._asdict(), out)
    memory = "" if peak is None else f", {peak:.2f} GiB of memory at most"
    print(f"after   {after}\nstep {result.best_step + 1} of {steps} chosen, {seconds:.1f} s{memory}")

    plots.draw_history(result.history, result.best_step, result.initial_acc - config.acc_degrade, picture)
    figures = {"before": before._asdict(), "after": after._asdict(), "seconds": seconds, "peak_GiB": peak}
    figures |= {"n_train": len(images[0]), "n_valid": len(images[2]), "steps": steps, "interrupted": watch.why}
    figures |= {k: getattr(result, k) for k in ("best_step", "found_good", "initial_acc")}
    figures |= {"R": [result.history["reg"][i] for i in (0, result.best_step)]}
    kept = not records.save(record_at, "unit", args, config, victim, device, figures, result.history)
    print(f"wrote {out}, {picture}" + (f"; {record_at} stays that of a whole search" if kept else f", {record_at}"))
    write_export(defended, args.export, args.size)
    if watch.why is None:
        partial.remove()
        return
    print("the same command goes on from there")
    if watch.why == "interrupted":
        raise KeyboardInterrupt


if __name__ == "__main__":
    flags.run(main)
