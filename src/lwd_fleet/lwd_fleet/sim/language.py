# SPDX-License-Identifier: Apache-2.0
"""What the robot is told: paraphrases of each task, some held out to test understanding of new wordings."""

from __future__ import annotations

SPLITS = ("train", "heldout")

_TEMPLATES: dict[tuple[str, str], tuple[str, ...]] = {
    ("place", "train"): (
        "put the {item} into the {side} tray",
        "place the {item} in the {side} tray",
        "move the {item} to the tray on the {side}",
        "pick up the {item} and put it in the {side} tray",
        "take the {item} and drop it into the tray on the {side}",
        "the {item} goes into the {side} tray",
        "grab the {item}, then set it down in the {side} tray",
        "into the {side} tray, please put the {item}",
        "bring the {item} over to the {side} tray",
        "please sort the {item} into the {side} tray",
    ),
    ("place", "heldout"): (
        "in the tray on the {side}, place the {item}",
        "could you move the {item} into the {side} tray",
        "the {side} tray needs the {item}",
        "pick the {item} and drop it in the {side} tray",
        "take the {item} to the {side} tray",
    ),
    ("stow", "train"): (
        "put the {item} into the box and close the lid",
        "open the box, place the {item} inside and close it",
        "stow the {item} in the box",
        "take the lid off, put the {item} in the box, put the lid back on",
        "pack the {item} into the box and cover it",
        "the {item} goes into the box, with the lid on top",
        "lift the lid, drop the {item} into the box, then close it again",
        "please store the {item} in the closed box",
        "close the {item} into the box",
        "move the {item} into the box and put the lid back",
    ),
    ("stow", "heldout"): (
        "place the {item} in the box and put the lid on",
        "the box needs the {item}, then close the lid",
        "could you pack the {item} in the box and close it",
        "into the box with the {item}, and cover it again",
        "open the lid, stow the {item}, close the lid",
    ),
}


def instructions(task: str, item: str, side: str = "", split: str = "train") -> tuple[str, ...]:
    """All wordings of one goal. item: as in scene.ITEMS; side: "left" or "right" (place only)."""
    if (task, split) not in _TEMPLATES:
        raise ValueError(f"no wordings for task {task!r}, split {split!r}; splits are {', '.join(SPLITS)}")
    return tuple(text.format(item=item.replace("_", " "), side=side) for text in _TEMPLATES[task, split])
