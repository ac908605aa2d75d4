"""Defenses that UNIT is compared with. Each changes weights; none sees test images or the trigger.

A new one is a module here (copy finetune.py), a line in DEFENSES, and its name in flags.DEFENSES; defend.py, compare.py
and the tests then find it. The module has

- `Config`, a frozen dataclass of every published constant. `data_rate`: share of the training set that the method gets,
  0 for none. `uses_labels`: a ClassVar, because it is no setting. `flip`: whether augmentation mirrors the images, if
  the method augments. With a field `epochs` the method takes --epochs.
- `repair(model, images, labels, config, seed, dtype, callback, state)`, which leaves `model` unchanged and returns a
  Repaired: a network of the same architecture in eval mode, history and findings as plain values. The finding
  `outcome` is a sentence for the table. `images`: uint8 (N, 3, H, W) on the model's device; `labels`: int64 (N,), or
  None where uses_labels is False. After each epoch it calls `callback(figures, state_of)`; state_of() returns the
  state of the run. Called with that `state` and otherwise the same arguments, it resumes and gives the same bits
  (common.Training does both).

dbd.py repairs no victim: it trains on the poisoned images, by its own train().
"""

from . import anp, bcu, clp, finetune, fp, fst, ft_sam, i_bau, nad, nc, rnp, seam, ulrl

DEFENSES = {"ft": finetune, "fp": fp, "nad": nad, "anp": anp, "seam": seam, "nc": nc, "i_bau": i_bau, "ft_sam": ft_sam}
DEFENSES |= {"clp": clp, "rnp": rnp, "fst": fst, "bcu": bcu, "ulrl": ulrl}
