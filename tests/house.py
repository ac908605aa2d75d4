"""What the tests of compare.py share: a folder with victims and the records of runs on them."""

import flags

import compare
import utils
from backdoors import get_backdoor
from evaluate import Measured
from support import records, victims


def parsed(defense, *given):
    script, words = ("unit.py", []) if defense == "unit" else ("defend.py", ["--defense", defense])
    return flags.parser(script).parse_args([*words, *given])


def figures(ba, asr=None, ra=None):
    return Measured(ba, asr, ra, 0.75, 10000, 0 if asr is None else 9000, 1000)._asdict()


class House:
    """A folder with small victims in ckpt/, and results/ for their records."""

    def __init__(self, folder, state):
        self.folder, self.results, self.state = folder, folder / "results", state

    def victim(self, name, attack="badnet", width=1.0, seed=1024, **changes):
        path = self.folder / "ckpt" / f"cifar10_{name}.pt"
        about = {"network": "resnet18", "width": width, "num_classes": 10, "attack": attack, "target": 0, "seed": seed}
        about |= {"bounds": None, "trigger": None if attack == "none" else get_backdoor(attack).state_dict()}
        about |= {"clean_label": attack == "reflection", "poison_rate": 0.1, "sampling": "resampled", "epochs": 30}
        about |= figures(0.93, *((None, None) if attack == "none" else (1.0, 0.0))) | changes
        # what its width is stands in the file; these weights are of the same for all
        utils.save_checkpoint({**about, "state_dict": self.state, "seconds": 99.4, "commit": "abc"}, path)
        return path

    def record(self, path, cell, measured, seconds=12.3, alone=False, **changes):
        """Write a record of a victim; alone: with what lets it count without the victim's file."""
        victim = {"file": path.name, "sha256": utils.sha256(path), "attack": "badnet"}
        if alone:
            victim = records.victim_of(path, utils.load_checkpoint(path))
        record = {"defense": cell.split(",")[0], "victim": victim, "settings": {}, "after": measured}
        record |= {"machine": {"threads": 2}, "commit": "0123456789", "seconds": seconds, **changes}
        utils.save_json(record, self.results / path.stem / f"{cell}.json")

    def args(self, *given):
        return flags.parser("compare.py").parse_args(["--results", str(self.results), "--device", "cpu", *given])

    def compare(self, *given):
        compare.main(["--results", str(self.results), "--device", "cpu", *given])

    def victims(self):
        return victims.all_victims(self.results)

    def groups(self):
        return victims.grouped(self.victims())

    def table(self, text, title):
        """The table of a title in a text: {first cell: [the other cells]}."""
        lines = next(t for t in text.split("\n\n") if t.lstrip("| ").startswith(title)).splitlines()
        cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
        return {c[0]: c[1:] for c in [cells[0], *cells[2:]]}
