"""An adapter of ChatGLM2/3 under GLM's names, for peft beside an exported base (component.export.glm)."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..chatglm import ChatGLMConfig
from ..model import read_finite_adapter
from ..trust import ADAPTER, read_adapter_shapes, read_model_json, read_run
from .glm import to_glm, write_json


def write_glm_adapter(adapter: Path, config: ChatGLMConfig, folder: Path) -> None:
    """Write an adapter under GLM's names into an empty folder: the same function of the same input. It names no base,
    since the exported one may lie anywhere.

    Args:
        adapter: folder of the adapter of ChatGLM, which is checked (check_adapter) and fits its base (check_fits).
        config: of its base, whose layout GLM has (check_layout).

    Raises:
        ArgumentError: a tensor is not finite, or of a type that adapters are not trained in.
    """
    parts = {}
    for name, tensor in read_finite_adapter(adapter).items():
        parts |= to_glm(name, tensor, config)
    changes = {"base_model_name_or_path": None, "revision": None}  # they are of ChatGLM's base
    changes["target_modules"] = find_targets(parts, config)
    write_json(folder / "adapter_config.json", read_model_json(adapter / "adapter_config.json") | changes)
    save_file({name: part.clone() for name, part in parts.items()}, folder / ADAPTER[0], {"format": "pt"})


def count_under_glm(adapter: Path, config: ChatGLMConfig) -> int:
    """How many numbers an adapter has under GLM's names, where three layers share an A. No tensor is read."""
    shapes = read_adapter_shapes(adapter).items()
    parts = [to_glm(name, torch.empty(shape, device="meta"), config).values() for name, shape in shapes]
    return sum(part.numel() for part in chain(*parts))


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


def run_under_glm(adapter: Path) -> dict:
    """What an adapter's manifest records of its run, as it holds beside an exported base: so our programs load that in
    the bits of training. It has another identity, and a chat template in the place of ChatGLM's own formats. Empty
    where nothing is recorded."""
    run = read_run(adapter)
    run.pop("base_model", None)
    if isinstance(run.get("format"), dict) and run["format"].get("name") in ("chatglm2", "chatglm3"):
        run["format"] = {"name": "chat_template"}
    return run
