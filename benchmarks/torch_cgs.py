"""The same network and CGS step in PyTorch, tuned: what a JAX figure has to stand against.

python benchmarks/torch_cgs.py --plan lean --layout channels_last --compile

Prints one JSON line: milliseconds of every timed step and peak memory. Written from the paper's
equations (Wang et al., IEEE TMI 2025), independently of `cgs_jax`; `tests/test_benchmark.py` checks
that both compute the same loss. `--plan full` is the authors' iteration: student on weak and strong
views of all images, teacher on them and on a second batch; `--plan predict` makes labels instead.
Views are made on the device, by `grid_sample`, and batches wait in memory: loaders are not part of
the comparison.
"""

import argparse
import json
import math
import resource
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class Block(nn.Sequential):
    """conv3x3 - BN - LeakyReLU - dropout - conv3x3 - BN - LeakyReLU."""

    def __init__(self, inputs, outputs, dropout=0.0):
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(inplace=True),
        )


class UNet(nn.Module):
    """UNet, generalist head and K specialist heads whose 1x1 convolutions are one wide one."""

    def __init__(
        self, targets, channels=(16, 32, 64, 128, 256), dropout=(0.05, 0.1, 0.2, 0.3, 0.5)
    ):
        super().__init__()
        inputs = (1, *channels)
        self.down = nn.ModuleList(map(Block, inputs, channels, dropout))
        self.reduce = nn.ModuleList(
            nn.Conv2d(a, b, 1) for a, b in zip(channels[:0:-1], channels[-2::-1], strict=True)
        )
        self.up = nn.ModuleList(Block(2 * b, b) for b in channels[-2::-1])
        width = channels[0]
        self.generalist = nn.Conv2d(width, targets + 1, 3, padding=1)
        self.wide = nn.Sequential(
            nn.Conv2d(width, targets * width, 1),
            nn.BatchNorm2d(targets * width),
            nn.LeakyReLU(inplace=True),
        )
        self.last = nn.ModuleList(nn.Conv2d(width, 3, 3, padding=1) for _ in range(targets))

    def features(self, x):
        """[B, 1, H, W] -> [B, 16, H, W]."""
        skips = []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for reduce, block, skip in zip(self.reduce, self.up, skips[-2::-1], strict=True):
            x = F.interpolate(reduce(x), scale_factor=2, mode="bilinear", align_corners=True)
            x = block(torch.cat([skip, x], 1))
        return x

    def forward(self, x):
        """[B, 1, H, W] -> logits [B, K + 1, H, W] and K times [B, 3, H, W]."""
        x = self.features(x)
        parts = self.wide(x).chunk(len(self.last), 1)
        return self.generalist(x), [conv(part) for conv, part in zip(self.last, parts, strict=True)]


def segmentation_loss(log_probs, probs, labels, mask=None):
    """Masked cross-entropy over all pixels, and Dice over masked ones."""
    target = F.one_hot(labels, probs.shape[1]).movedim(-1, 1).to(probs.dtype)
    square = probs.square()
    if mask is not None:
        mask = mask[:, None].to(probs.dtype)
        target, square = target * mask, square * mask
    ce = -(target * log_probs).sum() / labels.numel()
    overlap = (target * probs).sum((0, 2, 3))
    total = square.sum((0, 2, 3)) + target.sum((0, 2, 3))
    return ce + (1 - (2 * overlap + 1e-10) / (total + 1e-10)).mean()


def relabel(labels, k):
    """Labels of specialist k (from 1): background, target, remaining."""
    return torch.where(labels == k, 1, torch.where(labels == 0, 0, 2))


def _log_probs(logits):
    logs = F.log_softmax(logits.float(), 1)
    return logs, logs.exp()


def supervised(generalist, specialists, label):
    """L_sup of the labelled images."""
    loss = segmentation_loss(*_log_probs(generalist), label)
    for k, logits in enumerate(specialists, 1):
        loss = loss + segmentation_loss(*_log_probs(logits), relabel(label, k)) / len(specialists)
    return loss


def pseudo_labels(generalist, specialists, tau):
    """(y_g, M_g, y_s, M_d, z_1..z_K) of a teacher's logits."""
    confidence, y_g = generalist.float().softmax(1).max(1)
    probs = torch.stack([logits.float().softmax(1) for logits in specialists])
    votes = probs.argmax(2)
    y_s = torch.cat([probs[:, :, 0].mean(0)[:, None], probs[:, :, 1].movedim(0, 1)], 1).argmax(1)
    total = votes.sum(0)
    consistent = (total == 0) | (total == 2 * len(specialists) - 1)
    return (y_g, confidence > tau, y_s, consistent, *votes)


def unsupervised(generalist, specialists, pseudo):
    """L_G + L_S on the mixed images."""
    y_g, confident, y_s, consistent, *votes = pseudo
    agree = y_g == y_s
    logs = _log_probs(generalist)
    loss = segmentation_loss(*logs, y_g, confident) + segmentation_loss(*logs, y_g, agree)
    loss = loss + segmentation_loss(*logs, y_s, consistent)
    for k, (logits, vote) in enumerate(zip(specialists, votes, strict=True), 1):
        logs, own = _log_probs(logits), relabel(y_g, k)
        head = segmentation_loss(*logs, own, confident) + segmentation_loss(*logs, own, agree)
        loss = loss + (head + segmentation_loss(*logs, vote, consistent)) / len(specialists)
    return loss


def weak(image, label=None):
    """Mirror image (p .5), else rotation by up to 20 degrees (p .5), nearest, zero outside."""
    n, device = len(image), image.device
    flip = torch.rand(n, device=device) < 0.5
    rotate = torch.rand(n, device=device) < 0.5
    angle = torch.where(rotate, (torch.rand(n, device=device) * 2 - 1) * math.radians(20), 0.0)
    angle = torch.where(flip, torch.randint(4, (n,), device=device) * (math.pi / 2), angle)
    cos, sin = angle.cos(), angle.sin()
    mirror = torch.where(flip, -1.0, 1.0)
    theta = torch.stack([cos * mirror, -sin, 0 * cos, sin * mirror, cos, 0 * cos], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    both = image if label is None else torch.cat([image, label[:, None].to(image.dtype)], 1)
    moved = F.grid_sample(both, grid, mode="nearest", align_corners=False)
    return moved if label is None else (moved[:, :1].contiguous(), moved[:, 1].long())


def jitter(image):
    """Brightness and contrast (p .8), factors U(.5, 1.5), in random order."""
    n, device = len(image), image.device
    bright, contrast = (torch.rand(2, n, 1, 1, 1, device=device) + 0.5).unbind()

    def stretch(x):
        mean = x.mean((1, 2, 3), keepdim=True)
        return (mean + contrast * (x - mean)).clamp(0, 1)

    one = stretch((image * bright).clamp(0, 1))
    other = (stretch(image) * bright).clamp(0, 1)
    order, apply = (torch.rand(2, n, 1, 1, 1, device=device)).unbind()
    return torch.where(apply < 0.8, torch.where(order < 0.5, one, other), image)


def cutmix_keep(n, size, device):
    """[n, size, size], False inside one box an image."""
    area = torch.rand(n, device=device) * 0.38 + 0.02
    low, high = area.clamp(min=0.3), (1 / area).clamp(max=1 / 0.3)
    aspect = low + torch.rand(n, device=device) * (high - low)
    height, width = (size * (area * aspect).sqrt()).floor(), (size * (area / aspect).sqrt()).floor()
    y = (torch.rand(n, device=device) * (size - height + 1)).floor()
    x = (torch.rand(n, device=device) * (size - width + 1)).floor()
    at = torch.arange(size, device=device)
    rows = (at >= y[:, None]) & (at < (y + height)[:, None])
    columns = (at >= x[:, None]) & (at < (x + width)[:, None])
    return ~(rows[:, :, None] & columns[:, None, :])


class Trainer:
    """Student, teacher, optimiser and one CGS iteration by either plan."""

    def __init__(self, options):
        self.o = options
        self.device = torch.device(options.device)
        self.memory_format = getattr(torch, options.layout)
        models = UNet(options.targets), UNet(options.targets)
        models[1].load_state_dict(models[0].state_dict())
        models = [m.to(self.device, memory_format=self.memory_format) for m in models]
        self.weights = [list(m.parameters()) for m in models]
        for weight in self.weights[1]:
            weight.requires_grad_(False)
        self.optimizer = torch.optim.SGD(
            self.weights[0], lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True
        )
        self.student, self.teacher = models
        self.loss = self._lean if options.plan == "lean" else self._full
        if options.compile:
            self.loss = torch.compile(self.loss, dynamic=False)
        self.step = 0

    def _images(self, *parts):
        return torch.cat(parts).contiguous(memory_format=self.memory_format)

    def _lean(self, image, label, unlabelled, partner, ramp):
        """Student on [weak labelled, strong unlabelled], teacher on weak unlabelled."""
        image, label = weak(image, label)
        weak_view = weak(unlabelled)
        strong = jitter(weak_view)
        keep = cutmix_keep(len(strong), strong.shape[-1], strong.device)
        with torch.no_grad():
            own = pseudo_labels(*self.teacher(self._images(weak_view)), self.o.tau)
        pseudo = [torch.where(keep, x, x.roll(1, 0)) for x in own]
        strong = torch.where(keep[:, None], strong, strong.roll(1, 0))
        generalist, specialists = self.student(self._images(image, strong))
        n = len(image)
        loss = supervised(generalist[:n], [s[:n] for s in specialists], label)
        loss_u = unsupervised(generalist[n:], [s[n:] for s in specialists], pseudo)
        return loss + ramp * loss_u

    def _full(self, image, label, unlabelled, partner, ramp):
        """The authors' iteration; `partner` is the second batch [B, 1, H, W]."""
        n = len(image)
        image, label = weak(image, label)
        weak_view, partner = weak(unlabelled), weak(partner)
        strong, strong_partner = jitter(weak_view), jitter(partner[n:])
        keep = cutmix_keep(len(strong), strong.shape[-1], strong.device)
        all_weak = self._images(image, weak_view)
        with torch.no_grad():
            other = self.teacher(self._images(partner))
            own = self.teacher(all_weak)
            other, own = (
                pseudo_labels(g[n:], [x[n:] for x in s], self.o.tau) for g, s in (other, own)
            )
        pseudo = [torch.where(keep, a, b) for a, b in zip(own, other, strict=True)]
        strong = torch.where(keep[:, None], strong, strong_partner)
        generalist, specialists = self.student(all_weak)
        loss = supervised(generalist[:n], [s[:n] for s in specialists], label)
        generalist, specialists = self.student(self._images(jitter(image), strong))
        loss_u = unsupervised(generalist[n:], [s[n:] for s in specialists], pseudo)
        return loss + ramp * loss_u

    def __call__(self, *batch):
        """One iteration; returns the loss, on the device."""
        # A tensor: a Python number would make torch.compile trace every step anew.
        ramp = torch.full((), self.o.ramp, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.o.dtype == "bfloat16"):
            loss = self.loss(*batch, ramp)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(1 - 1 / (self.step + 1), 0.99)
        with torch.no_grad():
            torch._foreach_lerp_(self.weights[1], self.weights[0], 1 - decay)
        return loss.detach()


class Prediction:
    """Labels of slices by the generalist alone, batch norm folded into the convolutions."""

    def __init__(self, options):
        self.device, self.dtype = torch.device(options.device), options.dtype
        self.memory_format = getattr(torch, options.layout)
        network = UNet(options.targets).eval()
        for block in (*network.down, *network.up):
            for i in (0, 4):
                block[i] = fuse_conv_bn_eval(block[i], block[i + 1])
                block[i + 1] = nn.Identity()
        self.network = network.to(self.device, memory_format=self.memory_format)
        self.labels = torch.compile(self._labels) if options.compile else self._labels

    def _labels(self, image):
        network = self.network
        return network.generalist(network.features(image)).softmax(1).argmax(1)

    def __call__(self, image, label, unlabelled, partner):
        """Labels [B, H, W] of both halves of the batch."""
        image = torch.cat([image, unlabelled]).contiguous(memory_format=self.memory_format)
        bfloat16 = self.dtype == "bfloat16"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, bfloat16):
            return self.labels(image)


def main():
    """Times the step on random images and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", choices=("lean", "full", "predict"), default="lean")
    parser.add_argument("--layout", choices=("channels_last", "contiguous_format"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=24, help="half of them labelled")
    parser.add_argument("--targets", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tau", type=float, default=0.9)
    parser.add_argument("--ramp", type=float, default=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(layout="channels_last")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    trainer = (Prediction if options.plan == "predict" else Trainer)(options)
    n, size, device = options.batch // 2, options.size, trainer.device
    image, unlabelled = torch.rand(2, n, 1, size, size, device=device).unbind()
    partner = torch.rand(2 * n, 1, size, size, device=device)
    label = torch.randint(options.targets + 1, (n, size, size), device=device)
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    started = time.perf_counter()
    for _ in range(3):
        trainer(image, label, unlabelled, partner)
    synchronise()
    warm, seconds = time.perf_counter() - started, []
    block = 5 if device.type == "cuda" else 1  # as ours: the host runs ahead of the device
    for _ in range(options.steps):
        started = time.perf_counter()
        for _ in range(block):
            trainer(image, label, unlabelled, partner)
        synchronise()
        seconds.append((time.perf_counter() - started) / block)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {"step_ms": [1000 * s for s in seconds], "compile_s": warm, "peak_bytes": peak}
    print(json.dumps(result | {"torch": torch.__version__, "device": str(device)}))


if __name__ == "__main__":
    main()
