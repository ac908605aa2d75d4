"""Does a network carry a backdoor? Neural Cleanse searches the smallest patch that leads every image to a class.

    python detect.py --ckpt mine.pt

prints for each class the L1 norm of the smallest patch found and its anomaly index, then a verdict, and writes the
patches as detect_{file}.png. It needs clean images without labels. It finds patches only: triggers that cover the whole
image, such as those of WaNet, Reflection and Blended, escape it. The same command resumes an interrupted search.
"""

import flags  # first: it answers --help and a wrong flag before torch is imported

from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import utils
from defenses import inversion
from support import inputs, plots
from support.resume import Partial

LIMIT = "a trigger that covers the whole image escapes this search"


def verdict(norms, config=inversion.Config()):
    """Return the verdict, a sentence, on a network with these L1 norms of the smallest patch of each class."""
    suspicious, index = inversion.anomalies(norms, config)
    smallest = min(range(len(norms)), key=norms.__getitem__)
    if len(norms) < 3:  # both of two lie equally far from their median
        return f"no verdict: of {len(norms)} classes none can stand out; the smallest patch is that of class {smallest}"
    if not suspicious:
        return f"no class stands out (the smallest patch, class {smallest}, has index {index[smallest]:.2f}); {LIMIT}"
    found = " and ".join(f"class {c} (index {index[c]:.2f}, above {config.anomaly:g})" for c in suspicious)
    return f"suspected target of a backdoor: {found}; a clean class can look the same, see the picture"


@utils.repeatable()
def main(argv=None):
    """The command."""
    args = flags.parser("detect.py").parse_args(argv)
    device = utils.get_device(args.device)
    dtype = utils.get_dtype(args.precision, device)
    path, model, checkpoint = inputs.load_network(args, device)
    picture = Path(args.outdir) / f"detect_{path.stem}.png"
    utils.check_place(picture)
    images = torch.cat(inputs.defense_data(args)[::2]).to(device)  # UNIT's training and validation images
    config = inversion.Config()
    settings = {k: getattr(args, k) for k in ("dataset", "size", "data_rate", "draw", "seed")} | asdict(config)
    settings |= inputs.origin(path, checkpoint, images) | {"precision": str(dtype)}
    partial = Partial(picture, settings, device, args.resume)
    print(f"{path}, {len(images):,} clean images{partial.said()}", flush=True)
    done = partial.step
    with tqdm(unit="class", initial=done) as progress:

        def callback(_now, state_of):
            nonlocal done
            progress.update()
            done += 1
            partial.keep(done, state_of)

        found = inversion.search(model, images, config, args.seed, dtype, callback, partial.state)
    norms, (suspicious, index) = found["norms"], inversion.anomalies(found["norms"], config)
    print("class     norm   anomaly index")
    for c, norm in enumerate(norms):
        print(f"{c:5d}  {norm:7.2f}   {index[c]:7.2f}{'  <- suspected' if c in suspicious else ''}")
    print(f"{verdict(norms, config)}\n{partial.seconds_so_far():.1f} s")
    plots.draw_patches(found["patches"], norms, index, picture)
    partial.remove()
    print(f"wrote {picture}")


if __name__ == "__main__":
    flags.run(main)
