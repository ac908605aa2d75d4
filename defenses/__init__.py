"""Defenses that UNIT is compared with. Each changes weights; none sees test images or the trigger.

A new one is a module here (finetune.py is the one to copy), a line in DEFENSES, and its name in flags.DEFENSES: there
defend.py, compare.py and the tests find it. The module has

- `Config`, a frozen dataclass of every published constant: `data_rate` is the share of the training set that it is
  given, 0 for a method that needs none, `uses_labels` a ClassVar (it is no setting), `flip` whether augmentation
  mirrors the images, if there is any; with a field `epochs` it takes --epochs;
- `repair(model, images, labels, config, seed, dtype, callback, state)`, which leaves `model` as it is and returns a
  Repaired: the network in eval mode, of the same architecture, and history and findings as plain values; a finding
  `outcome` is a sentence that the table shows. `images` are uint8 (N, 3, H, W) on the model's device, `labels` int64
  (N,), or None where uses_labels is False. After each epoch it calls `callback` with the epoch's figures and a function
  that returns the state of its making; given that as `state`, and all else as before, it goes on from there to the same
  bits (common.Training does both).

dbd.py is no repair of a victim: it trains on the poisoned images themselves, by its own train().
"""

from . import anp, bcu, clp, finetune, fp, fst, ft_sam, i_bau, nad, nc, rnp, seam, ulrl

DEFENSES = {"ft": finetune, "fp": fp, "nad": nad, "anp": anp, "seam": seam, "nc": nc, "i_bau": i_bau, "ft_sam": ft_sam}
DEFENSES |= {"clp": clp, "rnp": rnp, "fst": fst, "bcu": bcu, "ulrl": ulrl}
