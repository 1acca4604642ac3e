#!/usr/bin/env bash
# Gathers in a folder all that a machine with a GPU needs for `python -m benchmarks.first_contact`, if it has no network:
# this checkout's Python, and the peers' wheels for x86-64 without the parts for other GPUs. Then, on that machine:
#
#     . FOLDER/ready.sh
#     python3 -m benchmarks.first_contact smoke --output OUT && python3 -m benchmarks.first_contact main --output OUT
set -euo pipefail
folder=${1:?usage: benchmarks/first_contact.sh FOLDER}
limit=$((64 << 20))
root=$(cd "$(dirname "$0")/.." && pwd)
rm -rf "$folder/tree" "$folder/wheels"
mkdir -p "$folder/tree" "$folder/wheels"
(cd "$root" && git ls-files -co --exclude-standard -z minipeft kernels benchmarks tests pyproject.toml ':!benchmarks/results' |
    tar --null -T - -cf -) | tar -xf - -C "$folder/tree"
python3 -m pip download -q --no-deps --only-binary=:all: --platform manylinux_2_24_x86_64 -d "$folder/wheels" bitsandbytes==0.50.2
python3 -m pip download -q --no-deps -d "$folder/wheels" peft==0.21.2
# Of its libraries, one for each version of CUDA, the one for 13.0 and the CPU's stay: 4 MB of 43.
python3 - "$folder"/wheels/bitsandbytes-*.whl <<'P'
import os, re, sys, zipfile
name = sys.argv[1]
with zipfile.ZipFile(name) as full, zipfile.ZipFile(name + ".slim", "w", zipfile.ZIP_DEFLATED) as slim:
    for entry in full.infolist():
        if not re.search(r"lib\w+_(cuda(?!130)|rocm|xpu)\w*\.(so|dll|dylib)$", entry.filename):
            slim.writestr(entry, full.read(entry))
os.replace(name + ".slim", name)
P
cat > "$folder/ready.sh" <<'R'
# To be sourced: Python finds this checkout and the wheels. The package `kernels` of PyPI is not hidden by our folder.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=${TMPDIR:-/tmp}/first-contact-site
if [ ! -d "$site" ]; then
    mkdir -p "$site"
    for wheel in "$here"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$site"; done
fi
for package in minipeft benchmarks kernels/minipeft_kernels; do ln -sfn "$here/tree/$package" "$site/$(basename $package)"; done
export PYTHONPATH=$site PYTHONUNBUFFERED=1 TRITON_INTERPRET=0 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cd "$site"
R
bytes=$(du -sb "$folder" | cut -f1)
echo "$folder: $((bytes >> 20)) MiB, of x86-64 and Python 3.10 or later"
if [ "$bytes" -gt "$limit" ]; then
    echo "more than the $((limit >> 20)) MiB that are meant to travel" >&2
    exit 1
fi
