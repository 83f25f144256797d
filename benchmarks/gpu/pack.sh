#!/bin/sh
# Collects what prove.py needs and a bare machine with PyTorch and transformers lacks, into .gpu/kit.tar.gz (ignored by
# git): ComfyUI 0.3.75 and the wheels that it and Skrr import; with the folder of a later ComfyUI as argument, that too.
#   sh benchmarks/gpu/pack.sh [COMFYUI]
# Wheels are for Python 3.12 on Linux x86-64: PYTHON_VERSION names another. PYTHON: which Python's pip downloads.
set -eu
cd "$(dirname "$0")/../.."
newer=${1:-}
python=${PYTHON:-.venv/bin/python}
version=${PYTHON_VERSION:-3.12}
limit=$((40 * 1024 * 1024))

"$python" tests/comfy_runtime.py prepare
rm -rf .gpu
mkdir -p .gpu/wheels .gpu/kit/site

# Trees without models' and nodes' extras, other encoders' tokenizers and what only a browser or a test wants.
tree() {
  mkdir -p ".gpu/kit/$2"
  tar -C "$1" -cf - --exclude=__pycache__ --exclude=.git --exclude=./tests --exclude=./tests-unit --exclude=./models \
    --exclude=./web --exclude=./blueprints --exclude=./script_examples --exclude=./custom_nodes --exclude=./output \
    --exclude=./input --exclude='*.md' --exclude=openapi.yaml --exclude=llama_tokenizer --exclude=t5_pile_tokenizer \
    --exclude=hydit_clip_tokenizer --exclude=ace_lyrics_tokenizer --exclude=qwen35_tokenizer --exclude=.github \
    --exclude=extra_model_paths.yaml . | tar -C ".gpu/kit/$2" -xf -
  mkdir -p ".gpu/kit/$2/models" ".gpu/kit/$2/custom_nodes" ".gpu/kit/$2/input" ".gpu/kit/$2/output"
}

wheels() {
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version "$version" --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --platform manylinux1_x86_64 -d .gpu/wheels "$@"
}

tree .cache/comfyui comfyui
wheels pydantic==2.14.3 pydantic-core==2.50.4 annotated-types typing-inspection typing-extensions pydantic-settings==2.16.3 \
  python-dotenv torchsde==0.2.6 trampoline
if [ -n "$newer" ]; then
  tree "$newer" comfyui-newer
  # what that version itself asks for
  wheels $(grep -E '^(comfy-kitchen|comfy-aimdo|simpleeval|blake3)([=<>]|$)' "$newer/requirements.txt") \
    SQLAlchemy==2.1.9 alembic==1.20.1 Mako
fi
for wheel in .gpu/wheels/*.whl; do "$python" -m zipfile -e "$wheel" .gpu/kit/site; done
# Hundreds of MB of kernels for quantised layers, which no text encoder runs: comfy-kitchen has others in their place.
find .gpu/kit/site -path '*comfy_kitchen/backends*' -name '*.so' -delete
find .gpu/kit/site -name '*rocm*' -delete
echo "$version" > .gpu/kit/python
tar -C .gpu/kit -czf .gpu/kit.tar.gz .
rm -rf .gpu/kit .gpu/wheels
size=$(wc -c < .gpu/kit.tar.gz)
echo ".gpu/kit.tar.gz: $((size / 1024 / 1024)) MiB"
[ "$size" -lt "$limit" ] || { echo "the kit is larger than $((limit / 1024 / 1024)) MiB: leave more out" >&2; exit 1; }
