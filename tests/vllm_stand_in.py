"""The few parts of vLLM that a worker's manager of experts touches, in place of vLLM, which this environment lacks.

Fused linear layers of a Llama, vLLM's classes and functions under their names, and the configuration of an engine.
`make test-vllm` runs the same code in a real engine.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import linear


class QuantizeMethodBase:
    pass


class UnquantizedLinearMethod(QuantizeMethodBase):
    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return layer.cpu_linear(x, layer.weight, bias)  # type: ignore[no-any-return]


class QuantizedLinearMethod(QuantizeMethodBase):
    """Cannot be cut, and has no `weight`."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.packed = weight

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x, self.packed, bias)


class LinearBase(nn.Module):
    def __init__(self, *weights: torch.Tensor, prefix: str, quantized: bool = False, **attributes: Any) -> None:
        super().__init__()
        whole = torch.cat(weights).detach().clone()
        self.input_size, self.output_size, self.prefix = whole.shape[1], len(whole), prefix
        self.output_partition_sizes = [len(weight) for weight in weights]
        self.params_dtype, self.tp_size, self.tp_rank = whole.dtype, 1, 0
        for name, value in attributes.items():
            setattr(self, name, value)
        self.quant_method: Any = QuantizedLinearMethod(whole) if quantized else UnquantizedLinearMethod()
        if not quantized:
            self.weight = nn.Parameter(whole, requires_grad=False)
            dispatch_cpu_unquantized_gemm(self, remove_weight=True)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.quant_method.apply(self, x, bias)  # type: ignore[no-any-return]


def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
    """As on a CPU, where the weight vanishes into a packed copy."""
    packed = layer.weight.detach().clone()
    layer.cpu_linear = lambda x, weight, bias: linear(x, packed, bias)
    layer.weight = nn.Parameter(torch.empty(0, dtype=packed.dtype), requires_grad=False)


class FusedLlama(nn.Module):
    """The linear layers of a Llama, fused as in vLLM."""

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, llama: Any, quantized: bool = False) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for number, layer in enumerate(llama.model.layers):
            fused = nn.Module()
            fused.self_attn, fused.mlp = nn.Module(), nn.Module()
            attention, mlp = layer.self_attn, layer.mlp
            prefix = f"model.layers.{number}"

            def made(path: str, *modules: Any, prefix: str = prefix, **attributes: Any) -> LinearBase:
                weights = [module.weight for module in modules]
                return LinearBase(*weights, prefix=f"{prefix}.{path}", quantized=quantized, **attributes)

            qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
            fused.self_attn.qkv_proj = made("self_attn.qkv_proj", *qkv, gather_output=False)
            fused.self_attn.o_proj = made("self_attn.o_proj", attention.o_proj, input_is_parallel=True)
            fused.mlp.gate_up_proj = made("mlp.gate_up_proj", mlp.gate_proj, mlp.up_proj, gather_output=False)
            fused.mlp.down_proj = made("mlp.down_proj", mlp.down_proj, input_is_parallel=True)
            self.model.layers.append(fused)


def engine_config(model: str, *, slots: int = 4, loaded: int = 16, eager: bool = True, **settings: Any) -> Any:
    return SimpleNamespace(
        additional_config={"peft_svf": settings},
        lora_config=SimpleNamespace(max_loras=slots, max_cpu_loras=loaded, target_modules=None),
        model_config=SimpleNamespace(
            model=model, revision=None, enforce_eager=eager, hf_config=SimpleNamespace(quantization_config=None)
        ),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
    )


class LoRARequest(SimpleNamespace):
    def __init__(self, name: str, number: int, path: str, load_inplace: bool = False) -> None:
        super().__init__(lora_name=name, lora_int_id=number, lora_path=path, load_inplace=load_inplace)

    def __hash__(self) -> int:
        return hash(self.lora_name)


CONTENT: dict[str, dict[str, Any]] = {
    "vllm": {},
    "vllm.distributed": {
        "get_pp_group": lambda: SimpleNamespace(world_size=1),
        "tensor_model_parallel_all_reduce": lambda tensor: tensor,
    },
    "vllm.lora": {},
    "vllm.lora.request": {"LoRARequest": LoRARequest},
    "vllm.lora.resolver": {"LoRAResolver": object},
    "vllm.model_executor": {},
    "vllm.model_executor.layers": {},
    "vllm.model_executor.layers.linear": {"LinearBase": LinearBase},
    "vllm.model_executor.layers.quantization": {},
    "vllm.model_executor.layers.quantization.base_config": {"QuantizeMethodBase": QuantizeMethodBase},
    "vllm.model_executor.layers.utils": {"dispatch_cpu_unquantized_gemm": dispatch_cpu_unquantized_gemm},
    "vllm.model_executor.utils": {"get_packed_modules_mapping": lambda model: model.packed_modules_mapping},
}


def install(monkeypatch: Any) -> None:
    """Put the stand-in where `import vllm` looks, until the end of a test."""
    for name, content in CONTENT.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
