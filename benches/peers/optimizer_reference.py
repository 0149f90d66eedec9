"""Writes the fixtures that tests/optimizer_reference.rs replays: seeded weights, gradients, and the weights that torch
makes of them, under tests/data/reference/optimizers. Each rule is written here from its paper and its authors' text, on
[out, in] matrices as torch has them; the files hold burn's [in, out].

    python3 -m venv venv && venv/bin/pip install torch safetensors numpy
    venv/bin/python benches/peers/optimizer_reference.py

It also derives Polar Express's coefficients (Amsel et al., 2025) with Remez's algorithm and holds them against those in
src/optimizer/orthogonalize.rs.
"""

import math
import pathlib
import re

import numpy
import torch
from safetensors.torch import save_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/data/reference/optimizers"
STEPS = 12
SHAPES = {"wide": (3, 5), "tall": (7, 2), "row": (1, 3), "long": (4, 9), "square": (6, 6)}
BETAS, EPS, DECAY, RATE = (0.9, 0.95), 1e-8, 0.1, 0.02
JORDAN = [(3.4445, -4.775, 2.0315)] * 5


def optimal_quintic(low, high):
    """The odd quintic a x + b x^3 + c x^5 that is nearest to 1 on [low, high], by Remez's exchange."""
    points = numpy.linspace(low, high, 4)
    for _ in range(200):
        rows = [[x, x**3, x**5, (-1.0) ** i] for i, x in enumerate(points)]
        a, b, c, _ = numpy.linalg.solve(numpy.array(rows), numpy.ones(4))
        # The error's extremes inside the interval: roots of a + 3 b x^2 + 5 c x^4.
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = sorted(math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1))
        following = numpy.array([low, *inner, high])
        if numpy.abs(following - points).max() < 1e-14:
            break
        points = following
    return a, b, c


def polar_express(iterations, low=1e-3, cushion=0.02407327424182761):
    """Without the safety factor. The cushion keeps the lower bound from being too small a share of the upper one, and
    the quintic is scaled so that it is as far below 1 at one bound as above it at the other."""
    high, found = 1.0, []
    for _ in range(iterations):
        a, b, c = optimal_quintic(max(low, cushion * high), high)
        p = lambda x: a * x + b * x**3 + c * x**5
        scale = 2 / (p(low) + p(high)) if cushion * high > low else 1.0
        a, b, c = a * scale, b * scale, c * scale
        found.append((a, b, c))
        low = p(low)
        high = 2 - low
    return found


def check_coefficients():
    text = (ROOT / "src/optimizer/orthogonalize.rs").read_text()
    table = text[text.index("const POLAR_EXPRESS") :]
    table = table[: table.index("];")]
    here = [tuple(map(float, row)) for row in re.findall(r"\[(\d\S+), (-\S+), (\d\S+)\],", table)]
    derived = polar_express(len(here))
    for ours, theirs in zip(here, derived):
        print("polar express", *theirs)
        assert numpy.allclose(ours, theirs, rtol=1e-6), (ours, theirs)
    assert len(here) == 5


def newton_schulz(g, quintics, margin=1.0):
    """On matrices [out, in], in f64."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / max(x.norm().item() * margin, 1e-7)
    for a, b, c in quintics:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def safe(quintics, safety=1.01):
    *before, last = quintics
    return [(a / safety, b / safety**3, c / safety**5) for a, b, c in before] + [last]


class Decay:
    def __init__(self, cautious):
        self.cautious = cautious

    def __call__(self, weight, update, rate):
        mask = (update * weight >= 0).double() if self.cautious else 1.0
        return weight - rate * DECAY * mask * weight


def ramp(start, end, steps, update):
    return end if update > steps else start + (end - start) * (update - 1) / steps


class AdamW:
    def __init__(self, cautious=False, beta2_start=None, beta2_steps=0):
        self.decay, self.start, self.steps = Decay(cautious), beta2_start, beta2_steps
        self.time, self.product, self.m, self.v = 0, 1.0, 0, 0

    def __call__(self, w, g, rate):
        self.time += 1
        beta2 = BETAS[1] if self.steps == 0 else ramp(self.start, BETAS[1], self.steps, self.time)
        self.product *= beta2
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * g
        self.v = beta2 * self.v + (1 - beta2) * g * g
        update = (self.m / (1 - BETAS[0] ** self.time)) / ((self.v / (1 - self.product)).sqrt() + EPS)
        return self.decay(w, update, rate) - rate * update


class Lion:
    def __init__(self, cautious=False):
        self.decay, self.m = Decay(cautious), 0

    def __call__(self, w, g, rate):
        update = torch.sign(BETAS[0] * self.m + (1 - BETAS[0]) * g)
        self.m = 0.99 * self.m + (1 - 0.99) * g
        return self.decay(w, update, rate) - rate * update


class Muon:
    def __init__(self, cautious=False, start=None, steps=0, quintics=JORDAN, margin=1.0):
        self.decay, self.start, self.steps = Decay(cautious), start, steps
        self.quintics, self.margin, self.time, self.velocity = quintics, margin, 0, 0

    def orthogonal(self, g):
        self.time += 1
        momentum = 0.95 if self.steps == 0 else ramp(self.start, 0.95, self.steps, self.time)
        self.velocity = g + momentum * self.velocity
        return newton_schulz(g + momentum * self.velocity, self.quintics, self.margin)

    def __call__(self, w, g, rate):
        update = self.orthogonal(g)
        return self.decay(w, update, rate) - rate * 0.2 * math.sqrt(max(w.shape)) * update


class NorMuon(Muon):
    """Algorithm 1 of arXiv 2510.05491, with Nesterov's momentum as in the authors' code."""

    v = 0

    def __call__(self, w, g, rate):
        update = self.orthogonal(g)
        self.v = 0.95 * self.v + 0.05 * (update * update).mean(dim=1, keepdim=True)
        update = update / (self.v.sqrt() + 1e-10)
        scale = 0.2 * math.sqrt(w.numel()) / (update.norm() + 1e-10)
        return self.decay(w, update, rate) - rate * scale * update


class Soap:
    """Arithmetic of the authors' code with the mean of the gradient in its own basis; decay before the update."""

    def __init__(self, largest=10000, frequency=3, cautious=False):
        self.decay, self.largest, self.frequency = Decay(cautious), largest, frequency
        self.time, self.m, self.v, self.means, self.bases = 0, 0, 0, None, None

    def accumulate(self, g):
        products = [g @ g.T, g.T @ g]
        before = self.means or [torch.zeros_like(p) for p in products]
        self.means = [0.95 * old + 0.05 * new for old, new in zip(before, products)]

    def turn(self, x, back=False):
        left, right = self.bases
        return left @ x @ right.T if back else left.T @ x @ right

    def __call__(self, w, g, rate):
        if self.bases is None:
            self.accumulate(g)
            # A side that is too long keeps the identity.
            self.bases = [
                torch.linalg.eigh(mean)[1].flip(1) if len(mean) <= self.largest else torch.eye(len(mean)).double()
                for mean in self.means
            ]
            return w
        self.time += 1
        turned = self.turn(g)
        self.m = 0.95 * self.m + 0.05 * g
        self.v = 0.95 * self.v + 0.05 * turned * turned
        update = self.turn(self.turn(self.m) / (self.v.sqrt() + EPS), back=True)
        correction = math.sqrt(1 - 0.95**self.time) / (1 - 0.95**self.time)
        w = self.decay(w, update, rate) - rate * correction * update
        self.accumulate(g)
        if self.time % self.frequency == 0:
            for side, (mean, basis) in enumerate(zip(self.means, self.bases)):
                if len(mean) > self.largest:
                    continue
                shares = (basis * (mean @ basis)).sum(dim=0)
                order = shares.argsort(descending=True)
                self.v = self.v.index_select(side, order)
                self.bases[side] = torch.linalg.qr(mean @ basis[:, order])[0]
        return w


RULES = {
    "adamw": AdamW,
    "adamw-cautious": lambda: AdamW(cautious=True),
    "adamw-ramp": lambda: AdamW(beta2_start=0.5, beta2_steps=5),
    "lion": Lion,
    "lion-cautious": lambda: Lion(cautious=True),
    "muon": Muon,
    "muon-cautious": lambda: Muon(cautious=True),
    "muon-ramp": lambda: Muon(start=0.5, steps=5),
    "muon-polar-express": lambda: Muon(quintics=safe(polar_express(5)), margin=1.01),
    "normuon": NorMuon,
    "normuon-cautious": lambda: NorMuon(cautious=True),
    "soap": Soap,
    "soap-cautious": lambda: Soap(cautious=True),
    "soap-short": lambda: Soap(largest=5),
}


def burns(matrix):
    return matrix.T.contiguous().float()


def main():
    check_coefficients()
    OUT.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(7)
    begun = {name: torch.randn(out, inputs).float().double() for name, (out, inputs) in SHAPES.items()}
    gradients = {
        name: [torch.randn(shape).float().double() for _ in range(STEPS)] for name, shape in SHAPES.items()
    }
    inputs = {f"{name}.weight": burns(weight) for name, weight in begun.items()}
    for name, all_steps in gradients.items():
        inputs[f"{name}.gradients"] = torch.stack([burns(g) for g in all_steps])
    save_file(inputs, OUT / "inputs.safetensors")
    for rule, make in RULES.items():
        weights = {}
        for name in SHAPES:
            step, weight = make(), begun[name]
            for time, g in enumerate(gradients[name]):
                weight = step(weight, g, RATE / (1 + 0.1 * time))
                if time in (0, 1, 5, STEPS - 1):
                    weights[f"{name}.{time}"] = burns(weight)
            if rule.startswith("soap"):
                # The first bases, which are not unique where the first gradient has less than full rank.
                again = make()
                again(begun[name], gradients[name][0], RATE)
                for side, basis in zip(("right", "left"), again.bases):
                    if len(basis) <= again.largest:
                        weights[f"{name}.{side}_basis"] = basis.contiguous().float()
        save_file(weights, OUT / f"{rule}.safetensors")


if __name__ == "__main__":
    main()
