"""The weights of a ChatGLM2/3 model one at a time, with an adapter merged into them: host memory for one is enough."""

from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from ..chatglm import ChatGLMConfig
from ..model import check_fits, from_pretrained, sketch_base
from ..pickles import open_pickle
from ..run.errors import ArgumentError
from ..trust import check_adapter, find_weights, read_adapter, read_shapes
from .merge import MergePlan, Rounding, add_update, name_of, quantised_layers, round_to_nf4


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
            plan: which adapter is merged, and into what; None for the base as it is.

        Raises:
            ArgumentError: the base is no ChatGLM, lacks weights or is saved quantised, or the adapter does not fit it.
        """
        self.base, self.dtype, self.plan = base, dtype, plan
        self.config = from_pretrained(AutoConfig, base)
        if not isinstance(self.config, ChatGLMConfig):
            raise ArgumentError(f"{base}: its model_type is {self.config.model_type!r}, and not ChatGLM2's or 3's")
        if getattr(self.config, "quantization_config", None):
            raise ArgumentError(
                f"{base}: it is saved quantised; merge it first (script/merge_lora.py), or give the full checkpoint"
            )
        sketch = sketch_base(base)
        self.shapes = {name: tuple(weight.shape) for name, weight in sketch.state_dict().items()}
        self.quantised = quantised_layers(sketch).keys()
        self.files = self.find_files()
        self.adapter: dict[str, Tensor] = {}
        if plan:
            check_fits(plan.adapter, base)
            settings = check_adapter(plan.adapter)
            self.lora = {key: settings[key] for key in ("r", "lora_alpha", "use_rslora", "use_dora")}
            self.adapter = {
                name.removeprefix("base_model.model."): part for name, part in read_adapter(plan.adapter).items()
            }
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
        if not weight.isfinite().all():
            raise ArgumentError(
                f"--dtype {name_of(self.dtype)}: {name} has a value that is not finite in it (the largest is "
                f"{torch.finfo(self.dtype).max:,.0f}); give --dtype bfloat16"
            )
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
        rounding = None
        if part == "weight" and layer in self.quantised and self.plan.rounds:
            rounded = round_to_nf4(weight.to(self.plan.compute_dtype))
            rounding = torch.linalg.vector_norm(weight.float() - rounded.float()).item()
            weight = rounded if self.plan.into == "trained" else weight
        parts = {
            key[len(layer) + 1 :]: value for key, value in self.adapter.items() if key.startswith(f"{layer}.lora_")
        }
        if part != "weight" or not parts:
            return weight
        adapted = self.adapted_layer(weight, parts)
        update = add_update(adapted, self.dtype)
        if rounding is not None:
            self.norms[layer] = rounding, update
        return adapted.get_base_layer().weight.data

    def adapted_layer(self, weight: Tensor, parts: dict[str, Tensor]) -> nn.Module:
        """peft's layer of a weight and of an adapter's parts, such as `lora_A.weight`."""
        holder = nn.Module()
        holder.layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
        holder.layer.weight = nn.Parameter(weight, requires_grad=False)
        inject_adapter_in_model(LoraConfig(**self.lora, target_modules=["layer"]), holder)
        for key, value in parts.items():
            holder.layer.get_parameter(key.replace(".weight", ".default.weight")).data = value.float()
        return holder.layer

    @property
    def rounding(self) -> Rounding:
        """How large the rounding of the base was beside the adapter's update, in the layers that were read."""
        return Rounding(self.norms)
