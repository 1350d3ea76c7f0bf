#!/usr/bin/env bash
# Wheels of what a machine with torch for CUDA may lack, for eval/gpu.sh, where there is a network:
#   eval/gpu-wheels.sh [FOLDER]     default: runs/gpu-wheels; for Python 3.12 on Linux, in the locked versions
# bitsandbytes is larger than all of them may be: without it the parts in NF4 are left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

FOLDER=${1:-runs/gpu-wheels}
MOST=$((40 * 1024 * 1024))
NAMES="accelerate annotated-doc anyio certifi charset-normalizer click filelock fsspec gguf h11 hf-xet httpcore2 httpx2
	huggingface_hub idna iniconfig jinja2 jsonargparse markdown-it-py markupsafe mdurl packaging peft platformdirs pluggy
	psutil pygments pytest pyyaml regex requests rich safetensors shellingham tokenizers tqdm transformers truststore typer
	typing-extensions urllib3"

mkdir -p "$FOLDER"
rm -f "$FOLDER"/*.whl
# the newest of each within the lock; --no-deps, so that nobody brings a second torch
locked=()
for name in $NAMES; do
	locked+=("$(grep -i -h "^${name//_/[-_]}==" requirements/test.txt requirements/demo.txt | head -n 1 || true)")
	if [ -z "${locked[-1]}" ]; then
		echo "error: requirements/*.txt do not lock $name: take it out of this list, or run make lock" >&2
		exit 2
	fi
done
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
	--python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	--dest "$FOLDER" "${locked[@]}"

size=$(cat "$FOLDER"/*.whl | wc -c)
if [ "$size" -gt "$MOST" ]; then
	echo "error: the wheels are $size bytes, more than $MOST: take something out of the list" >&2
	exit 1
fi
echo "$(ls "$FOLDER"/*.whl | wc -l) wheels, $size bytes, in $FOLDER"
