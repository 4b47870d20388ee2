"""What MetaWorld's tasks are called and how a person would ask for them.

The six tasks in same-scene pairs get many instructions from a grammar, verb x object x form. Some combinations are held
out of training; each is made of a verb, an object and a form that training has seen in other combinations.
"""

from __future__ import annotations

from dataclasses import dataclass

from paligemma_vla.evaluation.envs import PromptKind

FORMS = (
    "{verb} the {thing}",
    "please {verb} the {thing}",
    "can you {verb} the {thing}",
    "{verb} the {thing} for me",
    "now {verb} the {thing}",
    "your task is to {verb} the {thing}",
)


@dataclass(frozen=True)
class Grammar:
    """Verbs and names of the thing for one task; two of each, so that every pair of them is met in several forms."""

    verbs: tuple[str, str]
    things: tuple[str, str]

    def prompts(self, kind: PromptKind) -> tuple[str, ...]:
        """The 18 instructions for training (`own`) or the 6 held out (`unseen`)."""
        chosen = []
        for number, form in enumerate(FORMS):
            pairs = [(verb, thing) for verb in self.verbs for thing in self.things]
            # One pair is held out of each form, a different one in turn: no verb, thing, form or pair is lost to training.
            held_out = pairs.pop(number % len(pairs))
            chosen += [form.format(verb=v, thing=t) for v, t in (pairs if kind == "own" else [held_out])]
        return tuple(chosen)


GRAMMARS: dict[str, Grammar] = {
    "faucet-open": Grammar(("open", "turn on"), ("faucet", "tap")),
    "faucet-close": Grammar(("close", "turn off"), ("faucet", "tap")),
    "window-open": Grammar(("open", "slide open"), ("window", "glass window")),
    "window-close": Grammar(("close", "slide shut"), ("window", "glass window")),
    "drawer-open": Grammar(("open", "pull open"), ("drawer", "desk drawer")),
    "drawer-close": Grammar(("close", "push shut"), ("drawer", "desk drawer")),
}

OPPOSITES: dict[str, str] = {
    "faucet-open": "faucet-close",
    "window-open": "window-close",
    "drawer-open": "drawer-close",
}
OPPOSITES |= {close: open_ for open_, close in OPPOSITES.items()}

SENTENCES: dict[str, str] = {
    "assembly": "put the ring onto the peg",
    "basketball": "dunk the basketball into the basket",
    "bin-picking": "move the puck from one bin to the other",
    "box-close": "put the lid on the box",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "reach over the wall and press the button from above",
    "button-press": "press the button",
    "button-press-wall": "reach around the wall and press the button",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "hammer": "hammer the nail into the block",
    "hand-insert": "put the hand into the hole",
    "handle-press-side": "press the handle down from the side",
    "handle-press": "press the handle down",
    "handle-pull-side": "pull the handle up from the side",
    "handle-pull": "pull the handle up",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "insert the peg into the hole",
    "peg-unplug-side": "unplug the peg",
    "pick-out-of-hole": "pick the puck out of the hole",
    "pick-place": "pick up the puck and carry it to the goal",
    "pick-place-wall": "pick up the puck and carry it over the wall to the goal",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-back": "slide the plate back out of the cabinet",
    "plate-slide-back-side": "slide the plate out of the cabinet sideways",
    "plate-slide-side": "slide the plate into the cabinet sideways",
    "push": "push the puck to the goal",
    "push-back": "pull the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "reach for the goal",
    "reach-wall": "reach over the wall for the goal",
    "shelf-place": "put the block on the shelf",
    "soccer": "push the ball into the goal",
    "stick-pull": "pull the thermos with the stick",
    "stick-push": "push the thermos with the stick",
    "sweep": "sweep the block off the table",
    "sweep-into": "sweep the block into the hole",
}

TASKS: tuple[str, ...] = tuple(sorted([*GRAMMARS, *SENTENCES]))


def prompts(task: str, kind: PromptKind) -> tuple[str, ...]:
    """Instructions of a task by its name in `TASKS`; tasks without a grammar have one of their own and none held out."""
    if task in GRAMMARS:
        return GRAMMARS[task].prompts(kind)
    return (SENTENCES[task],) if kind == "own" else ()
