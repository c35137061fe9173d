"""An adapter of ChatGLM2/3 under GLM's names, for peft beside an exported base (component.export.glm)."""

import os
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file

from ..chatglm import ChatGLMConfig
from ..model import check_fits, read_finite_adapter
from ..run.manifest import seal
from ..trust import ADAPTER, check_adapter, identify_base, read_model_json, read_run
from .glm import check_layout, to_glm, write_json


def write_glm_adapter(adapter: Path, config: ChatGLMConfig, folder: Path, base: str | None = None) -> None:
    """Write an adapter under GLM's names into an empty folder: the same function of the same input.

    The manifest records the run that trained it, so that our programs load the exported base in the bits of training.

    Args:
        adapter: folder of the adapter of ChatGLM.
        config: of the adapter's base, loaded by its name (ChatGLMWeights.config).
        base: what the new adapter names as its base, an exported folder or a hub name; None for no name.

    Raises:
        ArgumentError: the adapter is refused or does not fit its base or `base`, or the layout is none of GLM's.
    """
    check_layout(config)
    check_adapter(adapter)
    check_fits(adapter, config.name_or_path)
    parts = {}
    for name, tensor in read_finite_adapter(adapter).items():
        parts |= to_glm(name, tensor, config)
    changes = {"base_model_name_or_path": base, "revision": None, "target_modules": find_targets(parts, config)}
    write_json(folder / "adapter_config.json", read_model_json(adapter / "adapter_config.json") | changes)
    save_file({name: part.clone() for name, part in parts.items()}, folder / ADAPTER[0], {"format": "pt"})
    if base and os.path.isdir(base):
        check_fits(folder, base)
    seal(folder, {"run": describe_run(adapter, base)})


def find_targets(names: Iterable[str], config: ChatGLMConfig) -> list[str]:
    """Names of the adapted layers as peft takes them, from the names of an adapter's tensors: the last part where every
    layer of a kind is adapted, else whole names."""
    kinds: dict[str, set[str]] = {}
    for name in names:
        layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
        kinds.setdefault(layer.rpartition(".")[2], set()).add(layer)
    targets: set[str] = set()
    for kind, layers in kinds.items():
        everywhere = 1 if kind in ("embed_tokens", "lm_head") else config.num_layers
        targets |= {kind} if len(layers) == everywhere else layers
    return sorted(targets)


def describe_run(adapter: Path, base: str | None) -> dict:
    """What an adapter's manifest records of its run, as it holds for another base: with that one's identity, if its
    files are here, and with a chat template in the place of ChatGLM's own formats. Empty where nothing is recorded."""
    run = read_run(adapter)
    run.pop("base_model", None)
    if isinstance(run.get("format"), dict) and run["format"].get("name") in ("chatglm2", "chatglm3"):
        run["format"] = {"name": "chat_template"}
    return run | ({"base_model": identify_base(base)} if run and base and os.path.isdir(base) else {})
