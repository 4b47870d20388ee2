"""pi0 and pi0.5 as LeRobot and openpi publish them, to a policy of ours: names of tensors, sizes, preprocessing.

Every tensor is accounted for: what is missing, unexpected or of another shape is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from paligemma_vla.errors import CheckpointError

# A published name begins with the left, ours with the right; the first that fits counts.
PREFIXES = (
    ("paligemma_with_expert.paligemma.lm_head.", "paligemma_vlm.backbone.language_model.embed_tokens."),  # they are tied
    ("paligemma_with_expert.paligemma.model.", "paligemma_vlm.backbone."),
    ("paligemma_with_expert.gemma_expert.model.norm.", "action_head.norm_out."),
    ("paligemma_with_expert.gemma_expert.model.", "action_head."),
    ("", "action_head."),
)
TOWERS = (".vision_tower.vision_model.", ".vision_tower.")  # with and without a module around it, by transformers' version
SAVED_BY_LEROBOT = "model."  # before every name
UNUSED = "paligemma_with_expert.gemma_expert.lm_head.weight"  # random, and never read
TABLES = tuple(f"paligemma_with_expert.paligemma.{name}.weight" for name in ("lm_head", "model.language_model.embed_tokens"))


def our_names(published: Iterable[str], ours: Iterable[str], where: str) -> dict[str, str]:
    """For each tensor of a model of ours the name of the published one. Raises `CheckpointError` for what does not fit.

    Of a table that is there twice, that of the embeddings is taken: LeRobot trains it without the other.
    """
    plain = {name.removeprefix(SAVED_BY_LEROBOT): name for name in published}
    if TABLES[1] in plain:
        plain.pop(TABLES[0], None)
    plain.pop(UNUSED, None)
    wanted, found, unexpected = set(ours), {}, []
    for name, saved in plain.items():
        begin, replaced = next(pair for pair in PREFIXES if name.startswith(pair[0]))
        # transformers has had the vision tower with and without a module around it.
        forms = [
            form.replace(".vision_tower.vision_model.", tower) for form in [replaced + name[len(begin) :]] for tower in TOWERS
        ]
        fitting = next((form for form in forms if form in wanted), None)
        if fitting is None:
            unexpected.append(name)
        else:
            found[fitting] = saved
    faults = {"unexpected": unexpected, "missing": sorted(wanted - found.keys())}
    if any(faults.values()):
        raise CheckpointError(f"{where}: {_listed(faults)}; is it a pi0 or pi0.5, and complete?")
    return found


def _listed(faults: Mapping[str, list[str]]) -> str:
    lists = {kind: (", ".join(names[:3]), len(names)) for kind, names in faults.items() if names}
    return "; ".join(f"{kind} {shown}{f' and {count - 3} more' * (count > 3)}" for kind, (shown, count) in lists.items())
