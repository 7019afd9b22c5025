#!/usr/bin/env bash
# torch 2.13.0 and transformers 5.24.0 on a CPU that multiplies bfloat16: with a frozen head, as LoRA leaves it, `generate` takes
# a copy of the head for each sequence of the batch.
#
# `generate` asks for the logits of the last position, so the head sees the slice `hidden[:, -1:]` of shape [B, 1, D]. `torch.matmul`
# merges the batch into the rows if the weight needs a gradient, or if the strides allow a view. They do not allow one: the stride of
# the batch is T·D. So the weight is expanded to [B, D, V], and the product for bfloat16 makes that contiguous. A head of 49,152 tokens
# and 4096 features takes 0.4 GB a sequence. The same head that needs a gradient, or the same rows after `.contiguous()`, take none.
# float32 takes none either: its product reads the expanded weight.
#
# Seen: a head of 64 MB, 8 sequences: 450 MB more at the peak and 10 s, where the contiguous rows take none and 0.06 s.
# Fails if that changes. Run by hand: bash findings/generate_copies_a_frozen_head_for_each_sequence.sh
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.24.0 numpy
cat > "$folder/peak.py" <<'PYTHON'
"""Print the megabytes that a first step of `generate` takes, and its seconds."""
import resource
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

dtype, frozen, rows = sys.argv[1], sys.argv[2] == "frozen", sys.argv[3]
torch.set_num_threads(1)
torch.set_default_dtype(getattr(torch, dtype))
sizes = {"hidden_size": 2048, "intermediate_size": 64, "num_attention_heads": 16, "num_hidden_layers": 1}
model = LlamaForCausalLM(LlamaConfig(vocab_size=16384, **sizes)).eval()
model.requires_grad_(not frozen)
if rows == "contiguous":
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))


def step(sequences):
    prompts = torch.full((sequences, 9), 5)
    with torch.no_grad():
        model.generate(input_ids=prompts, attention_mask=prompts > 0, max_new_tokens=1, pad_token_id=0)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


step(1)
before, start = peak(), time.perf_counter()
step(8)
print(peak() - before, time.perf_counter() - start)
PYTHON
"$folder/venv/bin/python" - "$folder/peak.py" <<'PYTHON'
import subprocess
import sys

import torch
import transformers

print("torch", torch.__version__, "transformers", transformers.__version__)
if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    raise SystemExit("this CPU does not multiply bfloat16: its product is another one")


def taken(*case):
    found = subprocess.run([sys.executable, sys.argv[1], *case], check=True, stdout=subprocess.PIPE, text=True)
    megabytes, seconds = map(float, found.stdout.split())
    print(f"{' '.join(case):28} {megabytes:6.0f} MB {seconds:8.3f} s")
    return megabytes


copies = 8 * 16384 * 2048 * 2 / 2**20
assert taken("bfloat16", "frozen", "sliced") > 0.6 * copies
for case in (("frozen", "contiguous"), ("trained", "sliced")):
    assert taken("bfloat16", *case) < 0.25 * copies
assert taken("float32", "frozen", "sliced") < 0.25 * copies
PYTHON
