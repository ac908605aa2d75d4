"""evaluate() against the bare network's own inference on ready batches, in the same precision."""

import bench
import torch

import data
import models
import utils
from backdoors import get_backdoor
from evaluate import evaluate


def main():
    """Print the figures."""
    args = bench.arguments(n=5, images=1000, batch_size=128)
    model = models.get_model("resnet18").to(args.device, memory_format=torch.channels_last).eval()
    backdoor = get_backdoor("wanet").to(args.device)  # the dearest of the triggers
    images = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8, device=args.device)
    labels = torch.arange(args.images, device=args.device) % 10
    n = args.images + int((labels != 0).sum())
    x = data.to_float(images)
    size = utils.pass_size(args.device, args.batch_size)
    ready = x.split(size) + x[labels != 0].split(size)

    @utils.repeatable()  # as evaluate() is
    def bare():
        with torch.no_grad(), utils.autocast(args.device, args.dtype):
            for batch in ready:
                model(batch)

    rivals = {
        "bare network": bare,
        "evaluate": lambda: evaluate(model, images, labels, backdoor, 0, args.batch_size, args.dtype),
    }
    t = bench.in_turn(rivals, args.n, args.device)
    for name, times in t.items():
        bench.figure(name, [n / s for s in times], "images/s")
    bench.ratios("bare / evaluate", t["bare network"], t["evaluate"])


if __name__ == "__main__":
    main()
