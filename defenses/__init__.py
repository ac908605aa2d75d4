"""Defences that UNIT is compared with. Each changes weights; none sees test images or the trigger.

A new one: a module here with a frozen `Config` and `repair(model, images, labels, config, seed, on_epoch, dtype)`, a
line in DEFENSES, and its name in cli.DEFENSES, from which the commands take it. `Config` names every published
constant, `data_rate` and `uses_labels` among them.
"""

from . import bcu, finetune, ulrl

DEFENSES = {"ft": finetune, "bcu": bcu, "ulrl": ulrl}
