"""Trains one DiT for all tasks on encoded clips.

A first shot (T2V) is the 36-channel network with zeros in the 20 condition channels, so the T2V expert is the same
network without that part of its patch embedding.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from storymem_dist.models.attention import Attend
from storymem_dist.models.wan.dit import CrossAttention, DiTConfig, SelfAttention, WanDiT, run_block
from storymem_dist.models.wan.presets import I2V_IN_DIM
from storymem_dist.weights.tiny_checkpoint import LORA_TARGETS
from tools.nano import encode, vae_passes, words, world
from tools.nano.training import Ranks, Schedule, Training

STEP_TASKS = ("t2v", "m2v", "t2v", "m2v", "mi2v", "m2v", "mm2v")
"""The task of each step, in turn."""

FLOW_SHIFT = 4.0
MEMORY_STRIDE = 5
"""Positions between memory images, as the sampler gives them."""

_KIND_OF_TASK = {"t2v": "cut", "m2v": "cut", "mi2v": "continued", "mm2v": "motion"}
_NUM_GIVEN_LATENTS = {"mi2v": 1, "mm2v": 2}
_NUM_CONDITION = I2V_IN_DIM - vae_passes.NUM_LATENT_CHANNELS
_NUM_MASK = _NUM_CONDITION - vae_passes.NUM_LATENT_CHANNELS
_T, _H, _W = (world.FRAMES - 1) // 4 + 1, world.HEIGHT // 8, world.WIDTH // 8
# how many memory images a step has, and how often
_MEMORY_OF_A_CUT = ((0, 1, 2, 3, 4, 6, 9), (1.0, 5.0, 5.0, 4.0, 3.0, 1.0, 0.7))
_MEMORY_OF_A_CONTINUATION = ((0, 1, 2, 3, 5), (1.0, 3.0, 3.0, 2.0, 1.0))


def dit_config(dim: int, ffn_dim: int, num_heads: int, num_layers: int) -> DiTConfig:
    """Sizes of the network that is trained."""
    return DiTConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        freq_dim=64,
        num_heads=num_heads,
        num_layers=num_layers,
        in_dim=I2V_IN_DIM,
        text_dim=words.TEXT_DIM,
        text_len=words.TEXT_LEN,
    )


def new_dit(config: DiTConfig, seed: int) -> WanDiT:
    """A DiT with random weights, fp32; its head is zero and its gates begin open a little."""
    torch.manual_seed(seed)
    model = WanDiT(config, dtype=torch.float32)
    matrices = tuple(f".{target}.weight" for target in LORA_TARGETS)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or name == "head.head.weight":
                p.zero_()
            elif name.endswith(matrices):
                nn.init.xavier_uniform_(p)
            elif name.startswith(("time_embedding", "time_projection")):
                p.normal_(std=0.02)
            elif name.startswith("text_embedding"):
                p.normal_(std=p.shape[1] ** -0.5)
            elif name == "patch_embedding.weight":
                nn.init.xavier_uniform_(p.flatten(1))
            elif name.endswith("modulation"):
                p.normal_(std=config.dim**-0.5)
                if p.shape[1] == 6:
                    p[:, 2].add_(0.5)
                    p[:, 5].add_(0.5)
    return model


def is_block_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon takes a weight: the matrices of the blocks."""
    return name.startswith("blocks.") and p.ndim == 2


def train_dit(
    work: Path,
    *,
    steps: int,
    config: DiTConfig,
    batch: int,
    shards: int,
    seed: int,
    device: torch.device,
    ranks: Ranks,
    compiled: bool,
    save_every: float,
) -> None:
    """Train to ``steps``, from ``work/dit.pt`` on if it is there, on the shards in ``work``."""
    data = Data(work, shards)
    model = new_dit(config, seed).to(device)
    if device.type == "cpu":
        for attention in model.modules():
            if isinstance(attention, SelfAttention | CrossAttention):
                attention.attend = _Fp32Attend()
    schedule = Schedule(steps=steps, lr=2e-3, muon_lr=0.02, warm_up=50, hold=0.4, least=0.01)
    extra = {"mean": data.mean, "std": data.std}
    training = Training(model, is_block_matrix, schedule, average=0.997, clip_all=False, extra=extra)
    training.go_on_from(work / "dit.pt")
    if compiled:
        model.blocks.run_block = torch.compile(run_block, dynamic=True)

    def loss_of(step: int, g: torch.Generator) -> Tensor:
        x0, extra_channels, weight, context, positions = data.batch(STEP_TASKS[step % len(STEP_TASKS)], batch, g)
        u = (torch.arange(batch) + torch.rand(batch, generator=g)) / batch
        sigma = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)
        noise = torch.randn(x0.shape, generator=g)
        share = sigma[:, None, None, None, None]
        x = torch.cat([(1 - share) * x0 + share * noise, extra_channels], 1).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = model(x, (sigma * 1000).long().to(device), context.to(device), positions.to(device))
        error = (velocity.float() - (noise - x0).to(device)).square()
        return (error * weight.to(device)).mean()

    training.run(loss_of, ranks=ranks, seed=seed + 1, state=work / "dit.pt", save_every=save_every)


class _Fp32Attend(Attend):
    """``Attend`` in fp32: on a CPU the backward pass of bf16 attention is four times slower."""

    def forward(self, q_BLNH: Tensor, k_BSNH: Tensor, v_BSNH: Tensor) -> Tensor:
        """Return ``[B, L, N, H]``, fp32."""
        with torch.autocast("cpu", enabled=False):
            return super().forward(q_BLNH.float(), k_BSNH.float(), v_BSNH.float())


class Data:
    """All clips of the shards, normalized by mean and deviation of each latent channel over the first shard's cuts."""

    def __init__(self, work: Path, shards: int) -> None:
        parts = [torch.load(encode.shard_path(work, number), weights_only=True) for number in range(shards)]
        first = parts[0]["cut"]["latents"].float()
        self.mean, self.std = first.mean((0, 2, 3, 4)), first.std((0, 2, 3, 4))
        blank = torch.load(encode.blank_path(work), weights_only=True)
        self._blank = self._normal(blank)
        self._latents = {kind: self._joined(parts, kind, "latents") for kind in encode.TASKS}
        self._conditions = {
            kind: self._joined(parts, kind, "conditions") for kind, given in encode.TASKS.items() if given
        }
        self._images = self._joined(parts, "cut", "images").flatten(0, 1)
        clips = {kind: _joined_clips([part[kind]["clips"] for part in parts]) for kind in encode.TASKS}
        self._ids = {kind: words.concept_ids(one) for kind, one in clips.items()}
        self._weight = {kind: loss_weight(one) for kind, one in clips.items()}
        self._character = {kind: one.colour * len(world.SHAPES) + one.shape for kind, one in clips.items()}
        of_image = self._character["cut"].repeat_interleave(encode.NUM_IMAGES)
        num_characters = len(world.COLOURS) * len(world.SHAPES)
        pools = [torch.nonzero(of_image == number).flatten() for number in range(num_characters)]
        # a few clips may lack a character: any image then stands for it
        self._images_of = [pool if len(pool) else torch.arange(len(of_image)) for pool in pools]

    def _joined(self, parts: list[dict[str, Any]], kind: str, key: str) -> Tensor:
        return self._normal(torch.cat([part[kind][key] for part in parts]))

    def _normal(self, latents: Tensor) -> Tensor:
        return (latents.float() - self.mean[:, None, None, None]) / self.std[:, None, None, None]

    def batch(self, task: str, num: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Clean latents ``[B, 16, K+T, h, w]``, condition, loss weight, text and positions in time of a batch."""
        kind = _KIND_OF_TASK[task]
        index = torch.randint(len(self._latents[kind]), (num,), generator=g)
        x0, weight = self._latents[kind][index], self._weight[kind][index]
        clashing = torch.zeros(num, dtype=torch.bool)
        num_memory = 0
        if task != "t2v":
            sizes, odds = _MEMORY_OF_A_CUT if task == "m2v" else _MEMORY_OF_A_CONTINUATION
            num_memory = sizes[int(torch.multinomial(torch.tensor(odds), 1, generator=g))]
        memory = torch.zeros(num, vae_passes.NUM_LATENT_CHANNELS, 0, _H, _W)
        if num_memory:
            character = self._character[kind][index]
            if task == "m2v":  # words may overrule the memory
                clashing = _chance(num, 0.12, g)
                other = torch.randint(len(self._images_of), (num,), generator=g)
                character = torch.where(clashing, other, character)
            memory = self._memory(character, num_memory, g)
            weight = torch.cat([torch.full((num, 1, num_memory, _H, _W), 0.2), weight], 2)
        condition = torch.zeros(num, _NUM_CONDITION, num_memory + _T, _H, _W)
        if task != "t2v":
            blank = self._blank.expand(num, -1, -1, -1, -1)
            given = self._conditions[kind][index] if kind in self._conditions else blank
            condition[:, _NUM_MASK:] = torch.cat([memory, given], 2)
            condition[:, :_NUM_MASK, : num_memory + _NUM_GIVEN_LATENTS.get(task, 0)] = 1
        ids = {name: values[index] for name, values in self._ids[kind].items()}
        context = words.context(_texts(ids, task, clashing, g), words.embeddings())
        positions = torch.cat([torch.arange(-num_memory, 0) * MEMORY_STRIDE, torch.arange(_T)])
        return torch.cat([memory, x0], 2), condition, weight, context, positions

    def _memory(self, characters: Tensor, num_memory: int, g: torch.Generator) -> Tensor:
        """Images of these characters in other scenes, with a little noise: ``[B, 16, K, h, w]``."""
        rows = []
        for character in characters.tolist():
            pool = self._images_of[character]
            rows.append(pool[torch.randint(len(pool), (num_memory,), generator=g)])
        memory = self._images[torch.stack(rows)].squeeze(3).transpose(1, 2)
        strength = 0.1 * torch.rand(len(rows), 1, 1, 1, 1, generator=g)
        return memory + strength * torch.randn(memory.shape, generator=g)


def loss_weight(clips: world.Clips) -> Tensor:
    """``[B, 1, T, h, w]``: 3 where the character is during a latent's frames, else 1; the mean is about 1.3."""
    frames = [clips.path[:, max(0, 4 * t - 3) : 4 * t + 1] for t in range(_T)]
    low = torch.stack([part.amin(1) for part in frames], 1) - 13
    high = torch.stack([part.amax(1) for part in frames], 1) + 13
    xs, ys = torch.arange(_W) * 8 + 4.0, torch.arange(_H) * 8 + 4.0
    inside_x = (xs > low[..., :1] - 4) & (xs < high[..., :1] + 4)
    inside_y = (ys > low[..., 1:] - 4) & (ys < high[..., 1:] + 4)
    return 1 + 2 * (inside_y[:, :, :, None] & inside_x[:, :, None, :])[:, None].float()


def _texts(ids: dict[str, Tensor], task: str, clashing: Tensor, g: torch.Generator) -> Tensor:
    """Concept ids ``[B, 6]``: the four kinds, perhaps "the character", the end mark; what is left out comes last."""
    num = len(ids["colour"])
    none = torch.full((num,), words.ABSENT)
    if task == "t2v":
        hidden = {"colour": 0.06, "shape": 0.06, "motion": 0.04, "background": 0.04}
    else:
        hidden = {"colour": 0.1, "shape": 0.1, "motion": 0.04, "background": 0.04 if task == "m2v" else 0.4}
    row = {kind: torch.where(_chance(num, odds, g), none, ids[kind]) for kind, odds in hidden.items()}
    word = none
    if task != "t2v":
        anonymous = _chance(num, 0.65, g) & ~clashing
        for kind in ("colour", "shape"):
            row[kind] = torch.where(anonymous, none, torch.where(clashing, ids[kind], row[kind]))
        unnamed = torch.full((num,), words.NAMES.index("character"))
        word = torch.where(anonymous & _chance(num, 0.9, g), unnamed, none)
    out = torch.stack([*(row[kind] for kind in world.KINDS), word], 1)
    out = torch.where(_chance(num, 0.1, g)[:, None], torch.full_like(out, words.ABSENT), out)  # for guidance
    out = torch.cat([out, torch.full((num, 1), words.END)], 1)
    order = (out == words.ABSENT).long().argsort(dim=1, stable=True)
    return out.gather(1, order)


def _chance(num: int, odds: float, g: torch.Generator) -> Tensor:
    return torch.rand(num, generator=g) < odds


def _joined_clips(parts: list[dict[str, Tensor]]) -> world.Clips:
    return world.Clips(**{key: torch.cat([part[key] for part in parts]) for key in parts[0]})
