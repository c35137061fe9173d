"""The weights of a ChatGLM2/3 model one at a time, with an adapter merged into them: host memory for one is enough."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from ..chatglm import ChatGLMConfig
from ..model import check_fits, read_finite_adapter, sketch_base
from ..pickles import open_pickle
from ..run.errors import ArgumentError
from ..trust import find_weights, read_shapes
from .merge import MergePlan, Rounding, add_update, quantised_layers, require_finite, round_weight


class ChatGLMWeights:
    """The weights of a ChatGLM checkpoint under their official names, read one at a time in the order of its layers.

    Attributes:
        config: the base's ChatGLMConfig.
        shapes: of every weight by its official name, such as `transformer.encoder.layers.0.mlp.dense_h_to_4h.weight`.
        dtype: that of every weight that `read` returns.
    """

    def __init__(self, base: str, dtype: torch.dtype, plan: MergePlan | None = None):
        """Find the weights; none is read.

        Args:
            base: folder or hub name.
            plan: which adapter is merged, and into what; None for the base as it is. It has checked both.

        Raises:
            ArgumentError: the base is no ChatGLM, lacks weights or is saved quantised, or the adapter does not fit it.
        """
        self.base, self.dtype, self.plan = base, dtype, plan and replace(plan, dtype=dtype)
        self.sketch = sketch_base(base)
        self.config = self.sketch.config
        if not isinstance(self.config, ChatGLMConfig):
            raise ArgumentError(f"{base}: its model_type is {self.config.model_type!r}, and not ChatGLM2's or 3's")
        if getattr(self.config, "quantization_config", None):
            raise ArgumentError(
                f"{base}: it is saved quantised; merge it first (script/merge_lora.py), or give the full checkpoint"
            )
        self.shapes = {name: tuple(weight.shape) for name, weight in self.sketch.state_dict().items()}
        self.quantised = quantised_layers(self.sketch).keys()
        self.files = self.find_files()
        self.adapter: dict[str, dict[str, Tensor]] = {}  # of each layer, its parts, such as lora_A.weight
        if plan:
            check_fits(plan.adapter, self.sketch)
            self.lora = {key: plan.settings[key] for key in ("r", "lora_alpha", "use_rslora", "use_dora")}
            for name, value in read_finite_adapter(plan.adapter).items():
                layer, _, part = name.removeprefix("base_model.model.").partition(".lora_")
                self.adapter.setdefault(layer, {})[f"lora_{part}"] = value
        self.norms: dict[str, tuple[float, float]] = {}

    def find_files(self) -> dict[str, Path]:
        """The file of each weight. Raises ArgumentError for one that is missing or has another shape."""
        files: dict[str, Path] = {}
        found: dict[str, list[int]] = {}
        for file in find_weights(self.base):
            shapes = read_shapes(file)
            files |= dict.fromkeys(shapes, file)
            found |= shapes
        for name, shape in self.shapes.items():
            if tuple(found.get(name, ())) != shape:
                has = f"has the shape {found[name]}" if name in found else "is not there"
                raise ArgumentError(
                    f"{self.base}: {name} {has}, and config.json asks for {list(shape)}; fetch it again"
                )
        return files

    def read(self, name: str) -> Tensor:
        """A weight of the result, in `dtype`. Raises ArgumentError where a value is too large for it, or not finite."""
        weight = self.read_from_file(name)
        if self.plan:
            weight = self.merge(name, weight.to(self.plan.values_dtype))
        weight = weight.to(self.dtype)
        require_finite(name, weight)
        return weight

    def read_from_file(self, name: str) -> Tensor:
        file = self.files[name]
        if file.suffix == ".bin":
            return open_pickle(file)[name]
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """A weight with the adapter's update, as component.export.merge.merge computes it."""
        layer, _, part = name.rpartition(".")
        if part != "weight":
            return weight
        rounding = None
        if layer in self.quantised and self.plan.rounds:
            weight, rounding = round_weight(weight, self.plan)
        if layer not in self.adapter:
            return weight
        adapted = self.adapted_layer(layer, weight)
        update = add_update(adapted, self.plan)
        if rounding is not None:
            self.norms[layer] = rounding, update
        return adapted.get_base_layer().weight.data

    def adapted_layer(self, layer: str, weight: Tensor) -> nn.Module:
        """peft's layer over a weight, with the adapter's parts in float32."""
        holder = nn.Module()
        holder.layer = deepcopy(self.sketch.get_submodule(layer))
        holder.layer.weight = nn.Parameter(weight, requires_grad=False)
        inject_adapter_in_model(LoraConfig(**self.lora, target_modules=["layer"]), holder)
        holder.float()
        parts = {f"layer.{part}": value for part, value in self.adapter[layer].items()}
        set_peft_model_state_dict(holder, parts)
        return holder.layer

    @property
    def rounding(self) -> Rounding:
        """How large the rounding of the base was beside the adapter's update, in the layers that were read."""
        return Rounding(self.norms)
