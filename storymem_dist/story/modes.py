"""How a shot can be rendered: kinds of experts, modes, and the frames that a continuation is given.

A *mode* is how a shot is conditioned; a *kind* is the base model whose experts render it. Names and counts only: knows
nothing about models.
"""

T2V = "t2v"
"""From text alone."""

M2V = "m2v"
"""From text and memory: a cut."""

MI2V = "mi2v"
"""From text, memory and the last frame of the shot before it."""

MM2V = "mm2v"
"""From text, memory and the last five frames of the shot before it."""

GIVEN = "given"
"""Not rendered: a clip that the storyboard gives. Needs no experts; this is its kind, too."""

KIND_OF_MODE = {T2V: T2V, M2V: M2V, MI2V: M2V, MM2V: M2V}
"""The kind of experts that render each mode: M2V experts are the I2V base model with a StoryMem LoRA."""

KINDS = (T2V, M2V)
"""The kinds of experts, in the order in which a job needs them."""

CONDITIONED_MODES = tuple(mode for mode, kind in KIND_OF_MODE.items() if kind == M2V)
"""The modes that see the memory."""

NUM_GIVEN_FRAMES = {T2V: 0, M2V: 0, MI2V: 1, MM2V: 5}
"""Frames of the shot before it that a mode repeats at its start (as in StoryMem's MI2V and MM2V). A shot with a start
image is MI2V, too, and keeps its first frame: it repeats no other shot."""

NO_CONTINUATION = "none"
"""The continuation of a job that renders all shots like cuts."""

CONTINUATIONS = (NO_CONTINUATION, MI2V, MM2V)
"""How a job's shots may continue the shot before them."""
