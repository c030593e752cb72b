#!/bin/sh
# What a machine with a GPU shows, in three steps, since plans may be compiled where the solvers are:
#
#   benchmarks/gpu.sh profile -o hw.json           on the GPU machine, two minutes: what klotski-compile plans with
#   benchmarks/gpu.sh plans hw.json -o plans       where OR-Tools is, some minutes: a plan per policy and model
#   benchmarks/gpu.sh run plans -o result.txt      on the GPU machine, under nine minutes: everything else
#
# It needs no installation: Python with torch, transformers, pydantic and greenlet will do. PYTHON names another interpreter.
here=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$here:$here/runtime:$here/tests${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" "$here/benchmarks/gpu.py" "$@"
