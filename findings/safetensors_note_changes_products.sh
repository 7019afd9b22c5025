#!/usr/bin/env bash
# Two safetensors files with the same tensor and another note in their metadata: products of what is
# loaded from them differ in their last bits.
#
# A tensor that safetensors gives to torch on a CPU lies where it lies in the file, behind a header
# that is as long as its metadata. The header is padded to 8 bytes, so the address of the numbers
# modulo 64 is 0, 8, 16 ... by the length of a note, and small products and dot products of a BLAS
# sum from the first aligned address on. Two runs that differ in a path kept in a file's metadata are
# not equal to the bit, on one machine, with one thread. A copy of the tensor (`clone`) lies at a
# multiple of 64, and is the same for every note.
#
# Seen with torch 2.13.0 (CPU), safetensors 0.8.0, numpy 2.4.6, on a CPU with AVX512:
#   addresses modulo 64: 0 8 16 24 32 40 48 56
#   products of one [7, 32] with one [32, 1]: 2 different results or more, 1 of copies
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from safetensors import safe_open
from safetensors.torch import save_file

torch.manual_seed(0)
torch.set_num_threads(1)
weight, x = torch.randn(32, 1), torch.randn(7, 32)
addresses, found, of_copies = set(), set(), set()
for length in range(0, 64, 8):
    save_file({"weight": weight}, "file.safetensors", metadata={"note": "x" * length})
    with safe_open("file.safetensors", framework="pt") as file:
        loaded = file.get_tensor("weight")
    assert torch.equal(loaded, weight)
    addresses.add(loaded.data_ptr() % 64)
    found.add((x @ loaded).numpy().tobytes())
    of_copies.add((x @ loaded.clone()).numpy().tobytes())
print("addresses modulo 64:", *sorted(addresses))
print(f"products of one [7, 32] with one [32, 1]: {len(found)} different results,", end=" ")
print(f"{len(of_copies)} of copies")
assert len(addresses) > 1, "every tensor lies at the same address modulo 64: this has changed"
assert len(of_copies) == 1
assert len(found) > 1, "the address changes no product here: another CPU, or this has changed"
PYTHON
echo "as described"
