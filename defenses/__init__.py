"""Defences that UNIT is compared with. Each changes weights; none sees test images or the trigger.

A new one is a module here (finetune.py is the one to copy), a line in DEFENSES, and its name in cli.DEFENSES: there
defend.py, compare.py and the tests find it. The module has

- `Config`, a frozen dataclass of every published constant: `data_rate` is the share of the training set that it is
  given, `uses_labels` a ClassVar (it is no setting); with a field `epochs` it takes --epochs;
- `repair(model, images, labels, config, seed, on_epoch, dtype, keep, state)`, which leaves `model` as it is and
  returns a Repaired: the network in eval mode, of the same architecture, and history and findings as plain values; a
  finding `outcome` is a sentence that the table shows. `images` are uint8 on the model's device, `labels` None where
  uses_labels is False. After each epoch it calls `keep` with a function that returns the state of its making; given
  that as `state`, and all else as before, it goes on from there to the same bits (common.Training does both).
"""

from . import bcu, finetune, ulrl

DEFENSES = {"ft": finetune, "bcu": bcu, "ulrl": ulrl}
