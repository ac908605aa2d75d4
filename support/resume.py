"""What a run keeps on disk of its state, and how the same command resumes from it after an interruption."""

from flags import InputError

import glob
import sys
import time
import zipfile

import torch

import utils

from . import machine

IMAGES = "set of images"  # the setting with their sum (utils.tensor_sum); it often follows from others
KEEP_EVERY = 60  # seconds, after which keep() writes again


class Partial:
    """A file beside a run's result, x.partial.pt for x.pt, with the state from which the same command resumes.

    state: the last one kept, None at the start; step: the number of steps or epochs done by then.
    """

    def __init__(self, out, settings, device, resume=True):
        """Load the file beside `out`, if there is one; settings: plain values that determine the run's figures.

        Raises InputError where a file lies there that cannot be read or has other settings, unless `resume` is false.
        """
        self.path, self.settings, self.device = (
            out.with_name(f"{out.name.removesuffix('.pt')}.partial.pt"),
            settings,
            device,
        )
        self.state, self.step, self.seconds, self.peak = None, 0, 0.0, None
        if resume and self.path.exists():
            self._load()
        self.begin()

    def begin(self):
        """Let the clock run from here on."""
        self.started = self.last = time.perf_counter()

    def _load(self):
        advice = "delete it or give --no-resume"
        try:
            with zipfile.ZipFile(self.path) as archive:
                if archive.testzip():  # torch does not look at the sums
                    raise ValueError
            kept = torch.load(self.path, map_location="cpu", weights_only=True)
            before, then = dict(kept["settings"]), dict(kept["machine"])
            self.state, self.step, self.peak = kept["state"], int(kept["step"]), kept["peak"]
            self.seconds = float(kept["seconds"])
        except Exception as error:  # whatever a damaged file makes torch raise
            raise InputError(f"{self.path} cannot be read ({type(error).__name__}); {advice}") from None
        differ = [k for k in {**before, **self.settings} if before.get(k) != self.settings.get(k)]
        if differ:
            differ = [k for k in differ if k != IMAGES] or differ
            raise InputError(f"{self.path} is a cut-off run with another {', '.join(differ)}; {advice}")
        now = self._machine()
        if then != now:
            print(f"note: {self.path} was begun on {then.get('device')}; the last digits may differ", file=sys.stderr)

    def _machine(self):
        return {k: v for k, v in machine.machine(self.device).items() if k != "date"}

    def said(self):
        """Return a line that says after which step the run resumes, an empty string if from the start."""
        return f"\ngoing on after {self.step} ({self.path})" if self.step else ""

    def keep(self, step, state_of, now=False):
        """Write state_of() if a minute has passed since the last time, or if `now`; a full disk is only a warning."""
        time_now = time.perf_counter()
        if time_now - self.last < KEEP_EVERY and not now:
            return
        kept = {"settings": self.settings, "machine": self._machine(), "step": step, "state": state_of()}
        try:
            utils.save_checkpoint(kept | {"seconds": self.seconds_so_far(), "peak": self.peak_so_far()}, self.path)
        except InputError as error:
            print(f"warning: {error}", file=sys.stderr)
        self.last = time_now

    def seconds_so_far(self):
        """Return the seconds that the run has taken, with those before an interruption."""
        return self.seconds + time.perf_counter() - self.started

    def peak_so_far(self):
        """Return the peak memory in GiB, with that before an interruption, or None where it is unknown."""
        return max(self.peak or 0, machine.peak_memory(self.device) or 0) or None

    def remove(self):
        """Remove the file, and what kills in the middle of writing left of it: the run is done."""
        for path in (self.path, *self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tmp")):
            path.unlink(missing_ok=True)
