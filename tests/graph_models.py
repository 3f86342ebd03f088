"""Small models, one for each thing a traced graph can be made of, and what must be found in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Entries = Callable[[int], list[int]]


@dataclass(frozen=True)
class Where:
    """Where a unit is seen: entries of a dimension of a module's output."""

    module: str
    dim: int = -1
    entries: Entries = lambda unit: [unit]


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and the groups in it: name -> kind, units, and where a unit's activations are."""

    build: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]
    groups: Mapping[str, tuple[str, int]]
    units: Mapping[str, tuple[Where, ...]] = field(default_factory=dict)


def run(start: int, size: int) -> Entries:
    """`size` entries for each unit in turn, from `start`."""
    return lambda unit: [start + unit * size + i for i in range(size)]


def every(step: int, count: int, start: int = 0) -> Entries:
    """`count` entries for each unit, `step` apart."""
    return lambda unit: [start + unit + i * step for i in range(count)]


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def tokens(*shape: int, below: int = 11) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(7))


class Net(nn.Module):
    """Children by keyword and a forward by function, so that a model is a few lines."""

    def __init__(self, forward: Callable[..., Tensor], **children: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._forward = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self._forward(self, x) if y is None else self._forward(self, x, y)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def net(forward: Callable[..., Tensor], **children: Callable[[], nn.Module | nn.Parameter]) -> Callable[[], nn.Module]:
    return lambda: Net(forward, **{name: child() for name, child in children.items()})


def lin(inputs: int, outputs: int, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outputs, bias=bias)


def conv(inputs: int, outputs: int, size: int = 3, groups: int = 1, dims: int = 2) -> Callable[[], nn.Module]:
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    return lambda: kind(inputs, outputs, size, padding=size // 2, groups=groups)


def par(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: parameter(*shape)


class Rms(nn.Module):
    """RMSNorm as Llama writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.epsilon = parameter(width), 0.01

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


class FrozenBatchNorm(nn.Module):
    """As in detection models: buffers only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale


class Pieces(nn.Module):
    """A gate and a value, cut out by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.size = nn.Linear(5, 8), nn.Linear(4, 2), 4

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y.narrow(-1, 0, self.size).relu() * y.narrow(-1, self.size, self.size))


def rope(x: Tensor) -> Tensor:
    """Rotary embedding of ``[b, h, s, d]``."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), torch.linspace(0.1, 1, half, dtype=x.dtype))
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v


def heads(x: Tensor, size: int = 3) -> Tensor:
    """``[b, s, h*size]`` to ``[b, h, s, size]``."""
    return x.view(*x.shape[:2], -1, size).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def attend(m: Net, x: Tensor, how: Callable[..., Tensor] = F.scaled_dot_product_attention) -> Tensor:
    return m.o(merged(how(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)))))


def grouped(m: Net, x: Tensor) -> Tensor:
    """Four query heads, two key and value heads, repeated as Llama does it, with rotary embeddings."""
    q, k, v = rope(heads(m.q(x), 4)), rope(heads(m.k(x), 4)), heads(m.v(x), 4)
    k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(t.shape[0], -1, *t.shape[2:]) for t in (k, v))
    return m.o(merged(eager(q, k, v)))


def packed_timm(m: Net, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).reshape(*x.shape[:2], 3, -1, 3).permute(2, 0, 3, 1, 4).unbind(0)
    return m.o(merged(F.scaled_dot_product_attention(q, k, v)))


def packed_bloom(m: Net, x: Tensor) -> Tensor:
    fused = m.qkv(x).view(*x.shape[:2], -1, 3, 3)
    return m.o(merged(eager(*(fused[..., i, :].transpose(1, 2) for i in range(3)))))


def packed_gpt2(m: Net, x: Tensor) -> Tensor:
    return m.o(merged(F.scaled_dot_product_attention(*map(heads, m.qkv(x).chunk(3, dim=-1)))))


def packed_neox(m: Net, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(*x.shape[:2], -1, 9).transpose(1, 2).chunk(3, dim=-1)
    return m.o(merged(eager(q, k, v)))


def shuffled(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    y = y.view(y.shape[0], 2, -1, *y.shape[2:]).transpose(1, 2).reshape(y.shape)
    return m.c(m.b(y).relu())


def dense_block(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    y = torch.cat((y, m.b(y.relu())), 1)
    y = torch.cat((y, m.c(y.relu())), 1)
    return m.d(y.relu()).mean((2, 3))


def residual(m: Net, x: Tensor) -> Tensor:
    y = m.stem(x)
    for a, na, b, nb in ((m.a1, m.n1, m.b1, m.m1), (m.a2, m.n2, m.b2, m.m2)):
        y = y + nb(b(na(a(y)).relu()))
    return m.head(y.mean((2, 3)))


def excite(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.c(y * m.up(m.down(F.adaptive_avg_pool2d(y, 1)).relu()).sigmoid())


def mixture(m: Net, x: Tensor) -> Tensor:
    gates = m.router(x).softmax(-1)
    return sum(gates[..., i : i + 1] * expert(x) for i, expert in enumerate(m.experts))


def gathered(m: Net, x: Tensor) -> Tensor:
    weight, best = m.router(x).softmax(-1).topk(2, dim=-1)
    hidden = torch.einsum("bd,bkdh->bkh", x, m.up[best]).relu()
    return (torch.einsum("bkh,bkhd->bkd", hidden, m.down[best]) * weight[..., None]).sum(1)


def every_expert(m: Net, x: Tensor) -> Tensor:
    y = x.expand(3, -1, -1)
    return (torch.bmm(torch.bmm(y, m.up).relu(), m.down) * m.router(x).softmax(-1).T[..., None]).sum(0)


def recurrent(m: Net, x: Tensor) -> Tensor:
    return m.head(m.rnn(x)[0])


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5))


def rnn(kind: type[nn.RNNBase], layers: int = 1, both: bool = False) -> Callable[[], nn.Module]:
    return lambda: kind(5, 4, num_layers=layers, bidirectional=both, batch_first=True)


X, S, IMAGES = {"x": floats(7, 5)}, {"x": floats(2, 7, 5)}, {"x": floats(2, 3, 7, 7)}
NEURONS = {"a": ("neurons", 6)}
CHANNELS = {"a": ("channels", 6)}
A, AC = {"a": (Where("a"),)}, {"a": (Where("a", 1),)}
PACKED: Entries = lambda unit: [part * 12 + unit * 3 + i for part in range(3) for i in range(3)]  # noqa: E731
HEADS = {"q": ("heads", 4)}

CASES: dict[str, Case] = {
    # products
    "linear": Case(net(lambda m, x: m.b(m.a(x).relu()), a=lin(5, 6), b=lin(6, 2)), X, NEURONS, A),
    "linear over three dimensions": Case(net(lambda m, x: m.b(m.a(x).tanh()), a=lin(5, 6), b=lin(6, 2)), S, NEURONS, A),
    "matmul": Case(net(lambda m, x: F.silu(x @ m.a) @ m.b, a=par(5, 6), b=par(6, 2)), S, NEURONS),
    "weight on the left": Case(
        net(lambda m, x: m.b @ (m.a @ x.mT).relu(), a=par(6, 5), b=par(2, 6)), {"x": floats(7, 5)}, NEURONS
    ),
    "addmm": Case(
        net(
            lambda m, x: torch.addmm(m.d, torch.addmm(m.c, x, m.a).relu(), m.b),
            a=par(5, 6),
            b=par(6, 2),
            c=par(6),
            d=par(2),
        ),
        X,
        NEURONS,
    ),
    "einsum": Case(
        net(
            lambda m, x: torch.einsum("bsh,ho->bso", torch.einsum("bsd,dh->bsh", x, m.a).relu(), m.b),
            a=par(5, 6),
            b=par(6, 2),
        ),
        S,
        NEURONS,
    ),
    "einsum that scales": Case(
        net(lambda m, x: m.b(torch.einsum("bsh,h->bsh", m.a(x), m.s)), a=lin(5, 6), b=lin(6, 2), s=par(6)),
        S,
        NEURONS,
        A,
    ),
    "low rank": Case(
        net(lambda m, x: m.b(F.linear(x, m.a + m.u @ m.v).relu()), a=par(6, 5), u=par(6, 2), v=par(2, 5), b=lin(6, 2)),
        S,
        NEURONS,
    ),
    "weights put together": Case(
        net(lambda m, x: m.c(F.linear(x, torch.cat((m.a, m.b))).relu()), a=par(6, 5), b=par(4, 5), c=lin(10, 2)),
        S,
        {"a": ("neurons", 6), "b": ("neurons", 4)},
    ),
    "tied": Case(
        net(
            lambda m, x: m.n(m.a(x).relu()) @ m.e.weight.T,
            a=lambda: nn.Embedding(11, 5),
            n=lin(5, 6),
            e=lambda: nn.Embedding(11, 6),
        ),
        {"x": tokens(2, 7)},
        {"a": ("neurons", 5), "n": ("neurons", 6)},
        {"a": (Where("a"),), "n": (Where("n"),)},
    ),
    # convolutions
    **{
        f"conv{n}d": Case(
            net(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 6, dims=n), b=conv(6, 2, dims=n)),
            {"x": floats(2, 3, *[5] * n)},
            CHANNELS,
            AC,
        )
        for n in (1, 2, 3)
    },
    "grouped": Case(
        net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=conv(3, 6), b=conv(6, 8, groups=2), c=conv(8, 2)),
        IMAGES,
        {"a": ("channels", 3), "b": ("channels", 4)},
        {"a": (Where("a", 1, every(3, 2)),), "b": (Where("b", 1, every(4, 2)),)},
    ),
    "depthwise": Case(
        net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=conv(3, 6), b=conv(6, 6, groups=6), c=conv(6, 2)),
        IMAGES,
        CHANNELS,
        {"a": (Where("b", 1),)},
    ),
    "depthwise with a multiplier": Case(
        net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=conv(3, 6), b=conv(6, 12, groups=6), c=conv(12, 2)),
        IMAGES,
        CHANNELS,
        {"a": (Where("b", 1, run(0, 2)),)},
    ),
    "transposed": Case(
        net(
            lambda m, x: m.c(m.b(m.a(x).relu()).relu()),
            a=conv(3, 6),
            b=lambda: nn.ConvTranspose2d(6, 4, 2, 2),
            c=conv(4, 2),
        ),
        IMAGES,
        {"a": ("channels", 6), "b": ("channels", 4)},
        {**AC, "b": (Where("b", 1),)},
    ),
    "transposed depthwise": Case(
        net(
            lambda m, x: m.c(m.b(m.a(x)).relu()),
            a=conv(3, 6),
            b=lambda: nn.ConvTranspose2d(6, 12, 2, 2, groups=6),
            c=conv(12, 2),
        ),
        IMAGES,
        CHANNELS,
        {"a": (Where("b", 1, run(0, 2)),)},
    ),
    "pools": Case(
        net(lambda m, x: m.b(F.avg_pool2d(F.max_pool2d(m.a(x).relu(), 2), 2)), a=conv(3, 6), b=conv(6, 2, 1)),
        IMAGES,
        CHANNELS,
        AC,
    ),
    "resized and padded": Case(
        net(
            lambda m, x: m.b(F.pad(F.interpolate(m.a(x).relu(), scale_factor=2.0), (1, 1))), a=conv(3, 6), b=conv(6, 2)
        ),
        IMAGES,
        CHANNELS,
        AC,
    ),
    "flattened, channels first": Case(
        net(lambda m, x: m.b(m.a(x).relu().flatten(1)), a=conv(3, 6), b=lin(6 * 49, 2)), IMAGES, CHANNELS, AC
    ),
    "flattened, channels last": Case(
        net(lambda m, x: m.b(m.a(x).relu().permute(0, 2, 3, 1).flatten(1)), a=conv(3, 6), b=lin(6 * 49, 2)),
        IMAGES,
        CHANNELS,
        AC,
    ),
    "channel shuffle": Case(
        net(shuffled, a=conv(3, 8), b=conv(8, 8, groups=2), c=conv(8, 2)),
        IMAGES,
        {"a": ("channels", 2), "b": ("channels", 4)},  # the groups of b pair what the shuffle paired
        {"a": (Where("a", 1, every(2, 4)),), "b": (Where("b", 1, every(4, 2)),)},
    ),
    "squeeze and excite": Case(
        net(excite, a=conv(3, 6), down=conv(6, 4, 1), up=conv(4, 6, 1), c=conv(6, 2)),
        IMAGES,
        {"a": ("channels", 6), "down": ("channels", 4)},
        {**AC, "down": (Where("down", 1),)},
    ),
    "residual": Case(
        net(
            residual,
            stem=conv(3, 6),
            a1=conv(6, 4),
            n1=lambda: nn.BatchNorm2d(4),
            b1=conv(4, 6),
            m1=lambda: nn.BatchNorm2d(6),
            a2=conv(6, 5),
            n2=lambda: nn.BatchNorm2d(5),
            b2=conv(5, 6),
            m2=lambda: nn.BatchNorm2d(6),
            head=lin(6, 2),
        ),
        IMAGES,
        {"stem": ("channels", 6), "a1": ("channels", 4), "a2": ("channels", 5)},
        {"stem": (Where("stem", 1), Where("m1", 1), Where("m2", 1)), "a1": (Where("n1", 1),), "a2": (Where("n2", 1),)},
    ),
    "concatenated": Case(
        net(dense_block, a=conv(3, 4), b=conv(4, 5), c=conv(9, 6), d=conv(15, 2)),
        IMAGES,
        {"a": ("channels", 4), "b": ("channels", 5), "c": ("channels", 6)},
        {name: (Where(name, 1),) for name in "abc"},
    ),
    # norms
    "batch norm": Case(
        net(lambda m, x: m.b(m.n(m.a(x)).relu()), a=conv(3, 6), n=lambda: nn.BatchNorm2d(6), b=conv(6, 2)),
        IMAGES,
        CHANNELS,
        {"a": (Where("n", 1),)},
    ),
    "batch norm of buffers": Case(
        net(lambda m, x: m.b(m.n(m.a(x)).relu()), a=conv(3, 6), n=lambda: FrozenBatchNorm(6), b=conv(6, 2)),
        IMAGES,
        CHANNELS,
        {"a": (Where("n", 1),)},
    ),
    "group norm": Case(
        net(lambda m, x: m.b(m.n(m.a(x)).relu()), a=conv(3, 6), n=lambda: nn.GroupNorm(3, 6), b=conv(6, 2)),
        IMAGES,
        {"a": ("channels", 3)},
        {"a": (Where("n", 1, run(0, 2)),)},
    ),
    "instance norm": Case(
        net(
            lambda m, x: m.b(m.n(m.a(x)).relu()),
            a=conv(3, 6),
            n=lambda: nn.InstanceNorm2d(6, affine=True),
            b=conv(6, 2),
        ),
        IMAGES,
        CHANNELS,
        {"a": (Where("n", 1),)},
    ),
    "RMS norm": Case(
        net(lambda m, x: m.b(m.n(m.a(x))), a=lin(5, 6), n=lambda: nn.RMSNorm(6, eps=0.01), b=lin(6, 2)), S, NEURONS, A
    ),
    "RMS norm by hand": Case(
        net(lambda m, x: m.b(m.n(m.a(x))), a=lin(5, 6), n=lambda: Rms(6), b=lin(6, 2)), S, NEURONS, A
    ),
    "RMS norm of two layers": Case(
        net(
            lambda m, x: m.c(m.n(torch.cat((m.a(x), m.b(x)), -1))),
            a=lin(5, 6),
            b=lin(5, 4),
            n=lambda: nn.RMSNorm(10, eps=0.01),
            c=lin(10, 2),
        ),
        S,
        {"a": ("neurons", 6), "b": ("neurons", 4)},
    ),
    "mixed along both dimensions": Case(
        net(
            lambda m, x: m.o(m.e(x) + m.b(m.a(m.e(x).mT).relu()).mT),
            e=lin(5, 6),
            a=lin(7, 8),
            b=lin(8, 7),
            o=lin(6, 2),
        ),
        S,
        {"a": ("neurons", 8)},
        {"a": (Where("a"),)},
    ),
    "pieces of a stated size": Case(Pieces, S, {"a": ("neurons", 4)}, {"a": (Where("a", -1, every(4, 2)),)}),
    "layer norm": Case(net(lambda m, x: m.b(m.n(m.a(x))), a=lin(5, 6), n=lambda: nn.LayerNorm(6), b=lin(6, 2)), S, {}),
    # elementwise
    "scale and shift": Case(
        net(lambda m, x: m.b(m.a(x) * m.s + m.t), a=lin(5, 6), s=par(6), t=par(1, 1, 6), b=lin(6, 2)), S, NEURONS
    ),
    "layer scale": Case(
        net(
            lambda m, x: m.h(m.s * m.b(m.a(x).relu()) + m.e(x)),
            e=lin(5, 4),
            a=lin(5, 6),
            b=lin(6, 4),
            s=par(4),
            h=lin(4, 2),
        ),
        S,
        {**NEURONS, "b": ("hidden", 4)},
        {**A, "b": (Where("b"), Where("e"))},
    ),
    "divided by a parameter": Case(
        net(lambda m, x: m.b(m.a(x) / m.s), a=lin(5, 6), s=par(6), b=lin(6, 2)), S, NEURONS, A
    ),
    "slopes of channels": Case(
        net(lambda m, x: m.b(m.p(m.a(x))), a=conv(3, 7), p=lambda: nn.PReLU(7), b=conv(7, 2)),
        IMAGES,
        {"a": ("channels", 7)},
        AC,
    ),
    "gated": Case(
        net(lambda m, x: m.d(F.silu(m.g(x)) * m.u(x)), g=lin(5, 6), u=lin(5, 6), d=lin(6, 2)),
        S,
        {"g": ("neurons", 6)},
        {"g": (Where("g"),)},
    ),
    "gate and value packed": Case(
        net(lambda m, x: m.d(F.silu(m.a(x).chunk(2, -1)[0]) * m.a(x).chunk(2, -1)[1]), a=lin(5, 12), d=lin(6, 2)),
        S,
        NEURONS,
        {"a": (Where("a", -1, every(6, 2)),)},
    ),
    "gate and value interleaved": Case(
        net(lambda m, x: m.d(F.silu(m.a(x)[..., ::2]) * m.a(x)[..., 1::2]), a=lin(5, 12), d=lin(6, 2)),
        S,
        NEURONS,
        {"a": (Where("a", -1, run(0, 2)),)},
    ),
    "glu": Case(
        net(lambda m, x: m.d(F.glu(m.a(x))), a=lin(5, 12), d=lin(6, 2)),
        S,
        NEURONS,
        {"a": (Where("a", -1, every(6, 2)),)},
    ),
    "halves with readers of their own": Case(
        net(
            lambda m, x: m.b(m.a(x).chunk(2, -1)[0].relu()) + m.c(m.a(x).chunk(2, -1)[1].relu()),
            a=lin(5, 12),
            b=lin(6, 2),
            c=lin(6, 2),
        ),
        S,
        NEURONS,
        {"a": (Where("a", -1, every(6, 2)),)},
    ),
    "stacked and picked": Case(
        net(lambda m, x: m.c(torch.stack((m.a(x), m.b(x)), 1)[:, 1].relu()), a=lin(5, 6), b=lin(5, 6), c=lin(6, 2)),
        S,
        NEURONS,
        {"a": (Where("a"), Where("b"))},
    ),
    # attention
    **{
        f"attention, {name}": Case(
            net(lambda m, x, how=how: attend(m, x, how), q=lin(5, 12), k=lin(5, 12), v=lin(5, 12), o=lin(12, 5)),
            S,
            HEADS,
            {"q": tuple(Where(name, -1, run(0, 3)) for name in "qkv")},
        )
        for name, how in (("sdpa", F.scaled_dot_product_attention), ("eager", eager))
    },
    "attention of grouped queries": Case(
        net(grouped, q=lin(5, 16), k=lin(5, 8), v=lin(5, 8), o=lin(16, 5)),
        S,
        {"q": ("heads", 2)},
        {"q": (Where("q", -1, run(0, 8)), Where("k", -1, run(0, 4)), Where("v", -1, run(0, 4)))},
    ),
    "attention of grouped queries, sdpa": Case(
        net(
            lambda m, x: m.o(
                merged(F.scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), enable_gqa=True))
            ),
            q=lin(5, 12),
            k=lin(5, 6),
            v=lin(5, 6),
            o=lin(12, 5),
        ),
        S,
        {"q": ("heads", 2)},
        {"q": (Where("q", -1, run(0, 6)), Where("v", -1, run(0, 3)))},
    ),
    "attention, keys repeated": Case(
        net(
            lambda m, x: m.o(
                merged(
                    eager(
                        heads(m.q(x)), heads(m.k(x)).repeat_interleave(2, 1), heads(m.v(x)).repeat_interleave(2, dim=1)
                    )
                )
            ),
            q=lin(5, 12),
            k=lin(5, 6),
            v=lin(5, 6),
            o=lin(12, 5),
        ),
        S,
        {"q": ("heads", 2)},
        {"q": (Where("q", -1, run(0, 6)), Where("v", -1, run(0, 3)))},
    ),
    "attention of one key": Case(
        net(
            lambda m, x: m.o(merged(eager(heads(m.q(x)), heads(m.k(x)), heads(m.v(x))))),
            q=lin(5, 12),
            k=lin(5, 3),
            v=lin(5, 3),
            o=lin(12, 5),
        ),
        S,
        {},
    ),
    "attention with a norm of each head": Case(
        net(
            lambda m, x: m.o(merged(eager(m.n(heads(m.q(x))), m.n(heads(m.k(x))), heads(m.v(x))))),
            q=lin(5, 12, False),
            k=lin(5, 12, False),
            v=lin(5, 12),
            o=lin(12, 5),
            n=lambda: Rms(3),
        ),
        S,
        HEADS,
        {"q": (Where("v", -1, run(0, 3)),)},
    ),
    "packed (3, heads, size)": Case(
        net(packed_timm, qkv=lin(5, 36), o=lin(12, 5)),
        S,
        {"qkv": ("heads", 4)},
        {"qkv": (Where("qkv", -1, PACKED),)},
    ),
    "packed (heads, 3, size)": Case(
        net(packed_bloom, qkv=lin(5, 36), o=lin(12, 5)),
        S,
        {"qkv": ("heads", 4)},
        {"qkv": (Where("qkv", -1, run(0, 9)),)},
    ),
    "packed (heads, 3 size)": Case(
        net(packed_neox, qkv=lin(5, 36), o=lin(12, 5)),
        S,
        {"qkv": ("heads", 4)},
        {"qkv": (Where("qkv", -1, run(0, 9)),)},
    ),
    "packed, split in three": Case(
        net(packed_gpt2, qkv=lin(5, 36), o=lin(12, 5)),
        S,
        {"qkv": ("heads", 4)},
        {"qkv": (Where("qkv", -1, PACKED),)},
    ),
    # experts
    "experts as modules": Case(
        net(mixture, router=lin(5, 2), experts=lambda: nn.ModuleList([expert(), expert()])),
        S,
        {"experts.0.0": ("neurons", 6), "experts.1.0": ("neurons", 6)},
        {f"experts.{i}.0": (Where(f"experts.{i}.0"),) for i in range(2)},
    ),
    "experts gathered": Case(
        net(gathered, router=lin(5, 3), up=par(3, 5, 6), down=par(3, 6, 5)), X, {"up": ("neurons", 6)}
    ),
    "experts side by side": Case(
        net(every_expert, router=lin(5, 3), up=par(3, 5, 6), down=par(3, 6, 5)), X, {"up": ("neurons", 6)}
    ),
    # recurrent
    **{
        f"{kind.__name__}, {layers} layers{', both ways' * both}": Case(
            net(recurrent, rnn=rnn(kind, layers, both), head=lin(8 if both else 4, 2)),
            S,
            {"rnn": ("neurons", 4)},
        )
        for kind in (nn.LSTM, nn.GRU)
        for layers, both in ((1, False), (2, False), (1, True), (2, True))
    },
    "recurrent with a first state of its own": Case(
        net(
            lambda m, x: m.head(m.rnn(x, (m.h(x[:, 0])[None], m.c(x[:, 0])[None]))[0]),
            rnn=rnn(nn.LSTM),
            h=lin(5, 4),
            c=lin(5, 4),
            head=lin(4, 2),
        ),
        S,
        {"h": ("neurons", 4)},
    ),
    # torch's own blocks
    "nn.MultiheadAttention": Case(
        net(
            lambda m, x: m.o(m.a(x, x, x, need_weights=False)[0]),
            a=lambda: nn.MultiheadAttention(6, 2, batch_first=True, kdim=6, vdim=6),
            o=lin(6, 2),
        ),
        {"x": floats(2, 7, 6)},
        {"a.out_proj": ("neurons", 6)},  # its forward asks for as many heads as it has
    ),
    # picking
    "embedding": Case(
        net(lambda m, x: m.b(m.a(x)), a=lambda: nn.Embedding(11, 6), b=lin(6, 2)), {"x": tokens(2, 7)}, NEURONS, A
    ),
    "rows picked": Case(
        net(lambda m, x, y: m.b(m.a(x)[torch.arange(2), y].relu()), a=lin(5, 6), b=lin(6, 2)),
        {"x": floats(2, 7, 5), "y": tokens(2, below=7)},
        NEURONS,
        A,
    ),
    "rows gathered": Case(
        net(lambda m, x, y: m.b(m.a(x).gather(1, y).relu()), a=lin(5, 6), b=lin(6, 2)),
        {"x": floats(2, 7, 5), "y": tokens(2, 3, 6, below=7)},
        {},
    ),
    "first row": Case(net(lambda m, x: m.b(m.a(x)[:, 0].tanh()), a=lin(5, 6), b=lin(6, 2)), S, NEURONS, A),
    "largest of all rows": Case(net(lambda m, x: m.b(m.a(x).max(1).values), a=lin(5, 6), b=lin(6, 2)), S, NEURONS, A),
    "a token put in front": Case(
        net(
            lambda m, x: m.b(torch.cat((m.t.expand(x.shape[0], -1, -1), m.a(x)), 1)[:, 0]),
            a=lin(5, 6),
            t=par(1, 1, 6),
            b=lin(6, 2),
        ),
        S,
        NEURONS,
    ),
}


def build(name: str) -> nn.Module:
    """The model of a case in double precision, nothing in it at its initial value."""
    torch.manual_seed(0)
    model = CASES[name].build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    return model
