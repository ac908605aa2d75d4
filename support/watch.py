"""The callback of a search in a command: it prints progress, keeps the state, and ends on Ctrl-C or a time limit."""

import math
import signal
import sys
import time

import torch
from tqdm import tqdm

from fast import ranks


class Watch:
    """The callback of unit.tighten() in a command, and the context in which the search runs.

    n_steps: of the search; partial: the support.resume.Partial that keeps its state; max_minutes: time limit, or None;
    speak: whether this process prints and keeps. why: the reason of an early end, else None.
    """

    def __init__(self, n_steps, partial, max_minutes, speak):
        self.n_steps, self.partial, self.speak = n_steps, partial, speak
        self.limit = 60 * max_minutes if max_minutes else math.inf
        self.why, self.interrupted = None, False

    def __enter__(self):
        self.started = time.perf_counter()
        self.partial.begin()
        self.before = signal.signal(signal.SIGINT, self._interrupt)
        self.progress = tqdm(total=self.n_steps, initial=self.partial.step, unit="step", disable=not self.speak)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)
        self.progress.close()

    def _interrupt(self, *_):
        if self.interrupted:  # the second Ctrl-C ends at once
            raise KeyboardInterrupt
        self.interrupted = True
        print("ending after this step, with the best bounds so far", file=sys.stderr, flush=True)

    def __call__(self, search):
        """Called after each step with the unit.Search; return whether to end it."""
        self.progress.update()
        last = search.step == self.n_steps
        if self.speak and (search.step % 10 == 0 or last):
            now = {k: v[-1] for k, v in search.history.items()}
            self.progress.write(
                f"step {search.step:4d}  CE {now['ce']:.4f}  R {now['reg']:.4f}  alpha {now['alpha']:.3g}"
                f"  validation accuracy {100 * now['valid_acc']:.2f} %"
            )
            sys.stdout.flush()  # also into a log file
        late = time.perf_counter() - self.started >= self.limit
        over = torch.tensor(float(self.interrupted or late), device=search.bounds[0].device)
        ranks.sum_over_ranks([over])  # so that all processes end after the same step
        if over and not last:
            self.why = "interrupted" if self.interrupted else "out of time"
        if self.speak:
            self.partial.keep(search.step, search.state_dict, now=self.why is not None)
        return self.why is not None
