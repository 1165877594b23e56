"""Do pictures show what prompts and memory say?

    python -m benchmarks.meaning                            # the nano model that comes with the package
    python -m benchmarks.meaning --scale 0.2 --chains 1     # quick
    python -m benchmarks.meaning --packed nano.safetensors  # a file that python -m tools.nano made
    python -m benchmarks.meaning --faults                   # and what faults of a renderer would show

Prompts and seeds are drawn anew; a judge with fixed rules (tools/nano/judge.py) says what each clip shows. Columns are
shares of clips: "colour", "shape", "motion" and "background" as the prompt or the memory says. "clear" is the share of
frames that show a character at all, "seam" the dB between the frames that a clip continues from and what it shows in
their place. Chance is .2, .33, .17 and .2.

"first shot": T2V, the prompt says everything. "remembered": the prompt says only "the character", and three frames of a
first shot are its memory; what the judge saw there is right. "drawn memory": the same with drawn frames. "control": the
same prompts without memory. "continued": MI2V and MM2V after a first shot. "chain": whole stories through
storymem-render, with the memory bank; all shots but the first, which alone says what the character looks like.

"two characters": stories of two, of whom each later shot recalls one, by name or by entity. "away": a shot of a
character who was seen in one shot and away for eleven, with a window and with memory.recall=entities.

"fault": "drawn memory" with a fault of ``tools/nano/faults.py`` in the renderer.

Ends with 1 if a share is below its floor, or if the control is right too often: then it is not memory that is measured.
With ``--faults`` also if a fault is hardly seen.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import device_name, make_parser, print_table, write_json
from storymem_dist.artifacts.video import read_clip
from storymem_dist.resources import packed_weights
from storymem_dist.weights.packed import unpack_once
from tools.nano import world
from tools.nano.cast import Cast, Character, render, seen
from tools.nano.exam import KINDS, Exam, Sampling, Score, make_pipeline, sentence
from tools.nano.faults import FAULTS, SEEN_IN
from tools.nano.judge import judge

CLIPS = {
    "first shot": 60,
    "remembered": 36,
    "drawn memory": 30,
    "control": 24,
    "continued, MI2V": 12,
    "continued, MM2V": 12,
}
"""Clips of each part with ``--scale 1``."""

FLOORS: dict[str, Mapping[str, float]] = {
    "first shot": {"colour": 0.9, "shape": 0.84, "motion": 0.9, "background": 0.9},
    "remembered": {"colour": 0.88, "shape": 0.69, "motion": 0.85, "background": 0.9},
    "drawn memory": {"colour": 0.9, "shape": 0.83, "motion": 0.9, "background": 0.9},
    "continued, MI2V": {"colour": 0.9, "shape": 0.73, "motion": 0.48, "background": 0.9},
    "continued, MM2V": {"colour": 0.9, "shape": 0.81, "motion": 0.56, "background": 0.9},
    "chain": {"colour": 0.9, "shape": 0.75, "motion": 0.77, "background": 0.9},
    "two characters": {"colour": 0.9, "background": 0.9},
    "away, by entity": {"colour": 0.7, "background": 0.9},
}
"""The least share of each column."""

MOST_OF_CONTROL = {"colour": 0.4}
"""The most that the control may get right."""

LEAST_LOSS = 0.1
"""How far below its floor a fault takes the share that shows it."""

MOST_OF_WINDOW = 0.2
"""The most colours of a character who was away that a window may get right."""

_CHAIN_SHOTS = 5


def main() -> int:
    """Measure, print, write; the exit code."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    shown = {key for row in rows.values() for key in row}
    print(device_name(torch.device("cpu")), f"{args.steps} steps, guidance {args.guidance}")
    columns = ["clips", *KINDS, "clear", *(["seam"] if "seam" in shown else [])]
    print_table([{"part": name, **{key: _short(row.get(key, "")) for key in columns}} for name, row in rows.items()])
    failures = below(rows)
    for failure in failures:
        print(f"BELOW ITS FLOOR: {failure}")
    results = {"rows": rows, "floors": FLOORS, "control_at_most": MOST_OF_CONTROL, "failures": failures}
    write_json(args.json, "meaning", {"settings": _plain(args), **results}, torch.device("cpu"))
    return 1 if failures else 0


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """The row of each part."""
    folders = unpack_once(args.packed, None, folder / "weights")
    num = {name: max(1, round(count * args.scale)) for name, count in CLIPS.items()}
    rows = {}
    with make_pipeline(folders) as pipeline:
        exam = Exam(pipeline, args.seed, Sampling(steps=args.steps, guidance=args.guidance))
        rows["first shot"] = exam.first_shots(num["first shot"]).row()
        rows["remembered"] = exam.remembered(num["remembered"]).row()
        rows["drawn memory"] = exam.remembered_drawings(num["drawn memory"]).row()
        rows["control"] = exam.unremembered(num["control"]).row()
        for mode in ("mi2v", "mm2v"):
            name = f"continued, {mode.upper()}"
            rows[name] = exam.continued(num[name], mode).row()
        for fault, of in FAULTS.items() if args.faults else ():
            with of.context():
                again = Exam(pipeline, args.seed, Sampling(steps=args.steps, guidance=args.guidance))
                rows[f"fault: {fault}"] = again.remembered_drawings(
                    num["drawn memory"], shown_instead=of.shown_instead
                ).row()
    if args.chains:
        rows["chain"] = chains(args, folder).row()
    if args.casts:
        rows |= {name: score.row() for name, score in casts(args, folder / "casts").items()}
    return rows


def chains(args: argparse.Namespace, folder: Path) -> Score:
    """Render stories with the command and judge all shots but the first of each."""
    g = torch.Generator().manual_seed(args.seed)
    wanted: dict[str, list[dict[str, str]]] = {}

    def draw(kind: str) -> str:
        names = world.KINDS[kind]
        return names[int(torch.randint(len(names), (1,), generator=g))]

    (folder / "stories").mkdir()
    for index in range(args.chains):
        shots: list[dict[str, str]] = []
        prompts: list[str] = []
        character = {"colour": tuple(world.COLOURS)[index % 5], "shape": world.SHAPES[index % 3]}
        cuts = [number != 2 for number in range(_CHAIN_SHOTS)]
        for number in range(_CHAIN_SHOTS):
            drawn = {kind: draw(kind) for kind in KINDS[2:]}
            if not cuts[number]:
                drawn["background"] = shots[-1]["background"]
            shots.append({**character, **drawn})
            prompts.append(sentence(g, shots[-1], named=number == 0, place=cuts[number]))
        name = f"chain_{index}_{character['colour']}_{character['shape']}"
        scenes = [{"scene_num": 1, "video_prompts": prompts, "cut": cuts}]
        story = {"story_name": name, "story_overview": "A character travels.", "scenes": scenes}
        (folder / "stories" / f"{name}.yaml").write_text(yaml.safe_dump(story))
        wanted[name] = shots
    run = folder / "run"
    command = [sys.executable, "-m", "storymem_dist", f"stories={folder / 'stories'}", f"output={run}"]
    command += ["model=nano", f"model.packed={args.packed.absolute()}", "model.packed_sha256=null", "tracking=none"]
    command += [f"sampler.num_inference_steps={args.steps}", f"sampler.guidance_scale_high={args.guidance}"]
    command += [f"sampler.guidance_scale_low={args.guidance}", "parallel.device=cpu", f"sampler.seed={args.seed}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    score = Score()
    for name, shots in wanted.items():
        for number, shot in enumerate(shots[1:], start=2):
            frames = read_clip(run / "stories" / name / f"shot_{number:02d}.mp4")
            score.add(shot, judge(frames.permute(1, 0, 2, 3).float() / 127.5 - 1))
    return score


def casts(args: argparse.Namespace, folder: Path) -> dict[str, Score]:
    """Render stories of two characters with the command and judge the shots that recall one of them."""
    colours = tuple(world.COLOURS)
    two, away = (Cast(folder=folder / name, g=torch.Generator().manual_seed(args.seed)) for name in ("two", "away"))
    for index in range(args.casts):
        characters = [
            Character(name=name, colour=colours[(index + 2 * further) % 5], shape=world.SHAPES[(index + further) % 3])
            for further, name in enumerate(("one", "other"))
        ]
        two.two(f"two_{index}", *characters)
        away.away(f"away_{index}", *characters)
    settings = [f"model.packed={args.packed.absolute()}", "model.packed_sha256=null", f"sampler.seed={args.seed}"]
    settings += [f"sampler.num_inference_steps={args.steps}", f"sampler.guidance_scale_high={args.guidance}"]
    settings += [f"sampler.guidance_scale_low={args.guidance}"]
    rows = {}
    for name, cast, rule in (
        ("two characters", two, "entities"),
        ("away, window", away, "window"),
        ("away, by entity", away, "entities"),
    ):
        run = folder / f"{name} run"
        render(cast.folder, run, f"memory.recall={rule}", "memory.num_fixed=1", *settings)
        rows[name] = Score()
        for story_id, wanted in cast.wanted.items():
            for number, shot in wanted.items():
                rows[name].add(shot, seen(run, story_id, number))
    return rows


def below(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What is below its floor, in words."""
    found = [
        f"{part}: {kind} {rows[part][kind]:.2f}, at least {floor:.2f}"
        for part, floors in FLOORS.items()
        if part in rows
        for kind, floor in floors.items()
        if rows[part][kind] < floor
    ]
    found += [
        f"fault: {fault}: {kind} {rows[row][kind]:.2f}, at most {FLOORS['drawn memory'][kind] - LEAST_LOSS:.2f}"
        for fault, kind in SEEN_IN.items()
        if (row := f"fault: {fault}") in rows and rows[row][kind] > FLOORS["drawn memory"][kind] - LEAST_LOSS
    ]
    if "away, window" in rows and (share := rows["away, window"]["colour"]) > MOST_OF_WINDOW:
        found.append(f"away, window: colour {share:.2f}, at most {MOST_OF_WINDOW:.2f}")
    return found + [
        f"control: {kind} {rows['control'][kind]:.2f}, at most {most:.2f}"
        for kind, most in MOST_OF_CONTROL.items()
        if rows["control"][kind] > most
    ]


def _short(value: float | str) -> float | str:
    return f"{value:.2f}" if isinstance(value, float) else value


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser("meaning", __doc__)
    parser.add_argument("--packed", type=Path, default=packed_weights("nano.safetensors"), help="a packed model")
    parser.add_argument("--scale", type=float, default=1.0, help="times this many clips (default: 174 and the chains)")
    parser.add_argument("--chains", type=int, default=10, help=f"stories of {_CHAIN_SHOTS} shots (default: 10)")
    parser.add_argument("--casts", type=int, default=10, help="stories of two characters, of each kind (default: 10)")
    parser.add_argument("--faults", action="store_true", help="also render with faults (120 clips)")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
