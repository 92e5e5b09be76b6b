import torch
import torch.nn.functional as F
from torch import nn

# ---- model -----------------------------------------------------------------------------

class PatchGAN(nn.Module):
    """Discriminator of overlapping patches: images (B, 3, H, W) -> logits (B, 1, h, w).

    layers  convolutions of stride 2 before two of stride 1; with 3 a logit sees 70 x 70 pixels.
    BatchNorm always takes the statistics of its batch, so call it on real and fake ones apart.
    """

    def __init__(self, channels=64, layers=3):
        super().__init__()
        widths = [min(2**i, 8) * channels for i in range(layers + 1)]
        body = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (a, b) in enumerate(zip(widths, widths[1:]), 1):
            body += [nn.Conv2d(a, b, 4, 2 if i < layers else 1, 1, bias=False),
                     nn.BatchNorm2d(b, track_running_stats=False), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*body, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.body:
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                nn.init.normal_(module.weight, float(isinstance(module, nn.BatchNorm2d)), 0.02)

    def forward(self, images):
        return self.body(images)

# ---- method ----------------------------------------------------------------------------

def hinge_discriminator(real, fake):
    """(E relu(1 - D(x)) + E relu(1 + D(x_hat))) / 2 of logits of any shape. Scalar."""
    return (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()) / 2

def hinge_generator(fake):
    """-E D(x_hat) of logits of any shape. Scalar."""
    return -fake.float().mean()

def adaptive_weight(reference, loss, weight, ceiling=1e4):
    """|grad reference| / (|grad loss| + 1e-4) at a parameter, at most ceiling. Scalar, no gradient.

    Times it, loss has the gradient norm of reference there. Both graphs are kept for backward().
    """
    size = [torch.autograd.grad(value, weight, retain_graph=True)[0].float().norm()
            for value in (reference, loss)]
    return (size[0] / (size[1] + 1e-4)).clamp(max=ceiling)
