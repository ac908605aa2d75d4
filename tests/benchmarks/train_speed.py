"""An epoch of train.py against the bare training step on one ready batch, compiled or recorded as train.py does it."""

import bench
import torch

import data
import fast
import models
import train
from backdoors import get_backdoor, poison_training_set


def main():
    """Print the figures."""
    args = bench.arguments(n=5, images=1280, batch_size=128, run_images=50_000 * 30)
    device = args.device
    model = models.get_model("resnet18").to(device).train()
    # compiled where a run of so many images would be
    step = fast.training_step(model, 1.0, args.run_images, args.batch_size, args.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
    images = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.arange(args.images, device=device) % 10
    poison = poison_training_set(labels, "wanet", 0)  # the dearest of the attacks
    backdoor = get_backdoor("wanet").to(device)
    config = {"batch_size": args.batch_size, "seed": 0, "epochs": 1, "lr": 1e-3}
    x, y = data.to_float(images[: args.batch_size]), labels[: args.batch_size]

    def bare():
        for _ in range(args.images // args.batch_size):
            optimizer.zero_grad()
            step(x, y, len(x))
            optimizer.step()

    def epoch():
        train.train_epoch(step, optimizer, (images, labels), poison, backdoor, config, 0, lambda _size: None)

    t = bench.in_turn({"bare step": bare, "train_epoch": epoch}, args.n, device)
    for name, times in t.items():
        bench.figure(name, [args.images / s for s in times], "images/s")
    bench.ratios("bare / train_epoch", t["bare step"], t["train_epoch"])


if __name__ == "__main__":
    main()
