"""The recorded search by unit.py, in a process of its own: python tests/golden/search.py MICRO_BATCH OUT.

So that the arithmetic can be chosen before torch starts (README.md says which, and why). Saves what was found, what
Adam was given at the first step, the best one and the last, {step: [(bound, gradient)]}, and the accuracy of the
network with the chosen bounds on the validation images.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import models
from unit import UnitConfig, tighten

with np.load(Path(__file__).parent / "unit_tiny.npz") as file:
    golden = dict(file)
torch.set_num_threads(1)  # with two, sums are cut where the machine's cores are
model = models.get_model("resnet18", width=0.125)
model.load_state_dict({k[2:]: torch.from_numpy(v) for k, v in golden.items() if k.startswith("w.")}, strict=True)
x_train, x_valid = (torch.from_numpy(golden[k]).permute(0, 3, 1, 2).float() / 255 for k in ("x_train", "x_valid"))
y_train, y_valid = (torch.from_numpy(golden[k]).long() for k in ("y_train", "y_valid"))
n_steps = int(golden["n_steps"])
config = UnitConfig(
    lr=float(golden["lr"]), acc_degrade=float(golden["acc_degrade"]), n_steps=n_steps, micro_batch=int(sys.argv[1])
)

steps, given, count = (0, int(golden["best_step"]), n_steps - 1), {}, itertools.count()


def keep(optimizer, _args, _kwargs):
    if (step := next(count)) in steps:
        given[step] = [(b.detach().clone(), b.grad.clone()) for b in optimizer.param_groups[0]["params"]]


register_optimizer_step_pre_hook(keep)
result = tighten(model.eval(), x_train, y_train, x_valid, y_valid, config)
models.set_bounds(model, result.bounds)
with torch.no_grad():
    accuracy = (model(x_valid).argmax(1) == y_valid).float().mean().item()
torch.save({**vars(result), "given": given, "accuracy": accuracy}, sys.argv[2])
