#!/usr/bin/env bash
# Everything that is to be measured on a GPU, part by part, each under eight minutes and without a network:
#   eval/gpu.sh [--minutes M] [PART ...]    results in runs/gpu, and in $OUT; what is there is not run again
#   eval/gpu.sh --dry                       a rehearsal on the CPU, with tiny shapes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TESTS=tests/engine/test_on_device.py
if [[ " $* " == *" --dry "* ]]; then
	MODELS=tiny-llama DEVICE=cpu SHORT=136 LONG="136 200" MANY=2 REPEAT=1 COMPILED="ffn,kv:4"
	COMPILE="--backend eager --num-layers 1 --tokens 16 --steps 1"
	PICK="bf16 and llama-short and not mha and plain_form and sdpa" STEPS="--steps 2"
else
	MODELS="llama-7b llama-3.1-8b" DEVICE=cuda SHORT=2048 LONG="2048 8192 32768" MANY="4 16" REPEAT=5
	COMPILED="ffn:2 ffn,kv:4" COMPILE="--tokens 2048 8192" PICK="" STEPS=""
fi
COMMON="--random-init --device $DEVICE --repetitions $REPEAT"
PREFILL="--plugins ffn:2 ffn,kv:4 kept:0.25 --card"
DECODE="--plugins kv:4 kept:0.25 --card $STEPS"

table() {
	echo "tests 470 pytest $TESTS tests/engine/hooks/test_attention_implementations.py --device $DEVICE -k '$PICK'"
	for m in $MODELS; do
		c="--model $m $COMMON"
		echo "prefill-$m 300 bench prefill $c $PREFILL --tokens $LONG"
		echo "prefill-batches-$m 300 bench prefill $c $PREFILL --tokens $SHORT --batch-sizes $MANY"
		echo "decode-$m 300 bench decode $c $DECODE --tokens $LONG"
		echo "decode-batches-$m 450 bench decode $c $DECODE --tokens $LONG --batch-sizes $MANY"
		echo "profile-$m 240 bench profile $c --tokens ${LONG##* }"
		echo "train-$m 300 bench train $c --plugins ffn,kv:2 --tokens $SHORT --batch-sizes 1 $MANY"
		echo "train-kept-$m 300 bench train $c --plugins kept:0.25 --tokens $SHORT"
		echo "train-nf4-$m 300 bitsandbytes:bench train $c --plugins ffn,kv:2 --quantize nf4 --dtype bfloat16 --tokens $SHORT"
		for k in $COMPILED; do
			echo "compile-$k-$m 450 bench compile $c $COMPILE --plugins $k"
		done
		echo "swap-$m 240 bench swap $c --tokens 1 $SHORT"
		echo "memory-$m 240 bench memory --model $m --device $DEVICE --plugins ffn:2 --tokens $SHORT --batch-sizes 1 $MANY"
	done
}

table | "${PYTHON:-python3}" eval/gpu.py "$@"
