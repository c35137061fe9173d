"""What the served models are called."""

import hashlib
from pathlib import Path

from ..inference.session import Session
from ..trust import digest_of, find_adapter_weights, identify_base


def model_ids(base: str, adapter: str | None) -> dict[str, bool]:
    """Ids of the models, the tuned one first, each with whether its adapter is used.

    The tuned one is called as its run's folder is: output/x/final is x, and output/x/checkpoint-9 is x-checkpoint-9.
    The base is called by its folder or hub name, with `-base` behind it where only its case would tell it apart.
    """
    own = Path(base).resolve().name if Path(base).is_dir() else base
    if not adapter:
        return {own: False}
    folder = Path(adapter).resolve() if Path(adapter).is_dir() else Path(adapter)
    tuned = folder.name if Path(adapter).is_dir() else adapter
    if tuned == "final":
        tuned = folder.parent.name or tuned
    elif tuned.startswith("checkpoint-"):
        tuned = f"{folder.parent.name}-{tuned}"
    return {tuned: True, (own if own.lower() != tuned.lower() else f"{own}-base"): False}


def fingerprints(session: Session, models: dict[str, bool]) -> dict[str, str]:
    """A mark of each model's weights and of how they are run."""
    facts = [identify_base(session.base), session.base_bits, session.dtype, session.data_format]
    adapter = digest_of(find_adapter_weights(session.adapter)) if session.adapter else ""
    return {
        model: "fp_" + hashlib.sha256(repr([*facts, adapter * adapted]).encode()).hexdigest()[:12]
        for model, adapted in models.items()
    }
