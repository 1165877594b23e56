"""A complete record with made-up values, to change parts of."""

from storymem_dist.artifacts.records import ShotRecord, StoredFile, StoredKeyframe


def make_record(**changes: object) -> ShotRecord:
    stored = StoredFile(num_bytes=3, sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    values = {
        "story_id": "ocean",
        "shot_id": "shot_01",
        "shot_index": 0,
        "scene_num": 1,
        "index_in_scene": 0,
        "prompt": "a “wave”",
        "cut": True,
        "kind": "t2v",
        "mode": "t2v",
        "seed": 0,
        "num_frames": 5,
        "height": 32,
        "width": 48,
        "fps": 16,
        "clip": "clip.mp4",
        "keyframes": (StoredKeyframe(slot=0, frame_index=2, file="keyframe_0.png"),),
        "tail": ("tail_0.png",),
        "memory": {"recalled": [], "decisions": [{"frame_index": 2, "quality": None}]},
        "inputs": {"prompt": "a “wave”", "seed": 0},
        "fingerprint": "f" * 64,
        "predecessor": None,
        "config_hash": "c",
        "files": dict.fromkeys(("clip.mp4", "keyframe_0.png", "tail_0.png"), stored),
        "timing": {"committed_at": 1.0},
        "host": {"attempt_id": "a"},
    }
    return ShotRecord(**(values | changes))  # type: ignore[arg-type]
