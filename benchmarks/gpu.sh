#!/bin/sh
# The comparison on a GPU, on a machine that has torch and transformers and no network (benchmarks/README.md).
#   sh benchmarks/gpu.sh wheels WHEELS [PYTHON]           here: fetch what that machine lacks, for its Python (3.12)
#   sh benchmarks/gpu.sh run WHEELS WORK OUT [ARGUMENTS]  there: unpack it and measure; ARGUMENTS of benchmarks.gpu
#   sh benchmarks/gpu.sh test WHEELS WORK [ARGUMENTS]     there: tests/gpu; ARGUMENTS of pytest
set -eu
verb=$1 wheels=$2
# litgpt says it wants older versions of jsonargparse and huggingface-hub; what it does here works with the newer ones.
binary="bitsandbytes==0.50.2 trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 jsonargparse==4.53.0
  docstring-parser typeshed-client omegaconf litgpt==0.5.13 torchao==0.18.0 hjson pydantic==2.14.4 pydantic-core==2.50.5
  annotated-types typing-inspection"
case $verb in
wheels)
  mkdir -p "$wheels"
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version "${3:-3.12}" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 -d "$wheels" $binary
  # Only a source distribution is published; without operators compiled in, its wheel is of Python alone.
  DS_BUILD_OPS=0 python3 -m pip wheel -q --no-deps -w "$wheels" deepspeed==0.19.8
  du -shc "$wheels"/*.whl
  ;;
run | test)
  work=$3
  mkdir -p "$work"
  if [ ! -e "$work/site/.done" ]; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" \
      "$wheels"/*.whl
    touch "$work/site/.done"
  fi
  export PYTHONPATH="$work/site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
  if [ "$verb" = test ]; then
    shift 3
    exec python3 -m pytest -q -p no:cacheprovider tests/gpu "$@"
  fi
  out=$4
  shift 4
  exec python3 -m benchmarks.gpu --work "$work" --out "$out" "$@"
  ;;
*)
  sed -n '2,5p' "$0"
  exit 2
  ;;
esac
