#!/usr/bin/env bash
# One call on a machine with one GPU (measured for: H100 or H200, Python 3.12, torch 2.11, transformers 5.17, no network).
#
#   benchmarks/gpu/full_size.sh --wheels                with a network: fetch into .wheels what such a machine lacks
#   benchmarks/gpu/full_size.sh [OUTPUT.json [FLAGS]]   there: check against the CPU, then time; under ten minutes
#
# It prints a table and writes JSON. Nothing is installed: the wheels are unpacked into a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
# Carried: what is imported here and such a machine lacks. What it has itself, new enough for pyproject.toml, is not taken from here.
wheels=(pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5 peft==0.21.2 simplejpeg==1.9.0
  filelock==4.2.11)

if [ "${1:-}" = --wheels ]; then
  platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64)
  exec python3 -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]/#/--platform=}" --dest .wheels "${wheels[@]}"
fi
output=${1:-benchmarks/results/gpu_full_size.json}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for wheel in .wheels/*.whl; do
  [ -e "$wheel" ] || continue
  name=$(basename "$wheel")
  python3 - "${name%%-*}" 2>/dev/null <<'END' && continue
import importlib.metadata, sys, tomllib
from packaging.requirements import Requirement
needed = {need.name: need for need in map(Requirement, tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"])}
version = importlib.metadata.version(sys.argv[1])
sys.exit(sys.argv[1] in needed and version not in needed[sys.argv[1]].specifier)
END
  python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheel"
done
# The package runs from its source; what it says of itself (its version) a distribution's metadata would say.
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
mkdir "$site/paligemma_vla-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: paligemma-vla\nVersion: %s\n' "$version" >"$site/paligemma_vla-$version.dist-info/METADATA"
export PYTHONPATH="$PWD/src:$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
python3 -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
python3 -m benchmarks.gpu.full_size --output "$output" "${@:2}"
