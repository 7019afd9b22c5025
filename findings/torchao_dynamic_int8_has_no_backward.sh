#!/usr/bin/env bash
# torchao 0.18.0 under peft 0.21.2 (torch 2.13.0, CPU): LoRA over a base in dynamic int8 trains on wrong gradients, in silence.
#
# peft dispatches linears that torchao has quantised to a LoRA layer of their own and trains it. With
# Int8WeightOnlyConfig the base product has a backward. With Int8DynamicActivationInt8WeightConfig it has none: its output does
# not require a gradient although its input does, and nothing says so. In a model the gradient reaches the lower layers
# by the adapters' own products and the residual connections alone. The loss falls, so nobody notices.
#
# Seen: cosine of the gradients of all adapters of layers 0, 1, 2 with those over the float base: 1.00, 1.00, 1.00 weight-only;
# .20, .26, .67 dynamic. Fails if that changes. Run by hand: bash findings/torchao_dynamic_int8_has_no_backward.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" -m pip install --quiet torchao==0.18.0 peft==0.21.2 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cosine_similarity
from torchao.quantization import Int8DynamicActivationInt8WeightConfig as Dynamic
from torchao.quantization import Int8WeightOnlyConfig as WeightOnly
from torchao.quantization import quantize_
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
ids = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(1))


def gradients(quantisation):
    """Of all adapters, one vector a layer, and the outputs of a base linear."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    )
    if quantisation is not None:
        quantize_(model.model.layers, quantisation)
    base = model.model.layers[0].mlp.gate_proj(torch.randn(4, 128, requires_grad=True))
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    model(input_ids=ids, labels=ids).loss.backward()
    layers = [
        torch.cat(
            [
                p.grad.flatten()
                for name, p in sorted(model.named_parameters())
                if p.grad is not None and f"layers.{i}." in name
            ]
        )
        for i in range(3)
    ]
    return layers, base.requires_grad


right, _ = gradients(None)
for kind, has_backward in ((WeightOnly, True), (Dynamic, False)):
    found, requires = gradients(kind())
    cosines = [float(cosine_similarity(a, b, dim=0)) for a, b in zip(found, right)]
    print(kind.__name__, "output requires a gradient:", requires, [f"{c:.2f}" for c in cosines])
    assert requires == has_backward
    assert all(c > 0.99 for c in cosines) if has_backward else cosines[0] < 0.5
PYTHON
