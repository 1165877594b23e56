"""Makes the weights of model=nano from nothing: VAE, latents, transformer, one packed file; then the judge looks at it.

    python -m tools.nano --work /data/nano --out nano.safetensors
    torchrun --standalone --nproc-per-node 2 -m tools.nano --work /data/nano --out nano.safetensors
    python -m tools.nano --device cuda --work /data/nano --out nano.safetensors

Hours on CPU cores. What is finished in --work is kept, so the same command goes on after a crash, as if there had been
none. Render with the result: storymem-render model=nano model.packed=nano.safetensors model.packed_sha256=null ...
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.weights.packed import unpack_once
from tools.nano import encode, export, train_dit, train_vae, vae_passes
from tools.nano.exam import Exam, Sampling, make_pipeline
from tools.nano.training import Ranks


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the weights."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    ranks, device = Ranks.start(), torch.device(args.device)
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    if args.compile:
        vae_passes.compile_norms()
    train_vae.train_vae(
        work,
        steps=args.vae_steps,
        base_dim=args.vae_base_dim,
        whole_from=0.75,
        seed=args.seed,
        device=device,
        ranks=ranks,
        save_every=args.save_every,
    )
    clips = dict(zip(encode.TASKS, args.clips, strict=True))
    encode.write_shards(work, shards=args.shards, clips=clips, seed=args.seed, device=device, ranks=ranks)
    config = train_dit.dit_config(args.dim, args.ffn_dim, args.heads, args.layers)
    train_dit.train_dit(
        work,
        steps=args.dit_steps,
        config=config,
        batch=args.batch,
        shards=args.shards,
        seed=args.seed,
        device=device,
        ranks=ranks,
        compiled=args.compile,
        save_every=args.save_every,
    )
    if ranks.rank == 0:
        _export(work, args.out, config)
        print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB", flush=True)
        if args.judged:
            print(json.dumps(_judge(args.out, work, args.judged, args.judged_steps), indent=1))


def _export(work: Path, out: Path, config: DiTConfig) -> None:
    vae = torch.load(work / "vae.pt", weights_only=True)
    dit = torch.load(work / "dit.pt", weights_only=True)
    weights = {name: value.half().contiguous() for name, value in dit["averaged"].items()}
    extra = dit["extra"]
    native = export.native_vae(vae["averaged"], vae["extra"]["base_dim"], extra["mean"], extra["std"])
    export.pack(out, config, weights, native)


def _judge(packed: Path, work: Path, num: int, steps: int) -> dict[str, dict[str, float]]:
    with make_pipeline(unpack_once(packed, None, work / "cache")) as pipeline:
        exam = Exam(pipeline, sampling=Sampling(steps=steps))
        return {"first shot": exam.first_shots(num).row(), "remembered": exam.remembered(num).row()}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.nano", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("nano"), help="states and latents (default: nano/)")
    parser.add_argument("--out", type=Path, default=Path("nano.safetensors"), help="the packed file")
    parser.add_argument("--vae-steps", type=int, default=4800)
    parser.add_argument("--vae-base-dim", type=int, default=16)
    parser.add_argument("--shards", type=int, default=14, help="files of latents")
    kinds = [kind.upper() for kind in encode.TASKS]
    parser.add_argument("--clips", type=int, nargs=3, default=[200, 60, 40], metavar=tuple(kinds), help="of a shard")
    parser.add_argument("--dit-steps", type=int, default=10900)
    parser.add_argument("--batch", type=int, default=16, help="clips of each of the two batches of a step")
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--ffn-dim", type=int, default=768)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save-every", type=float, default=120, metavar="SECONDS")
    parser.add_argument("--judged", type=int, default=30, help="clips of each kind that the judge sees at the end")
    parser.add_argument("--judged-steps", type=int, default=16)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
