"""The process of one loaded model: llama.cpp's own HTTP server, on a loopback port of its choice.

    python -m edge_daemon.embedded.runner --model FILE --num-ctx 4096 --num-batch 512 --threads 4

Says `{"address": "http://127.0.0.1:PORT"}` or `{"error": "..."}` in one line on standard output, and ends when its
standard input does.
"""

import argparse
import json
import os
import signal
import threading

from edge_daemon.embedded.process import die_with_parent, on_stdin_end

# llama.cpp looks up between two batches whether its client has gone, so small ones make a long prompt stoppable.
# Larger ones are hardly faster on a CPU: 263 instead of 228 tokens/s for SmolLM2 on two cores.
_LARGEST_BATCH = 64
_KEPT_MIB = 32  # 1,400 tokens of SmolLM2
# How long a thread that is done with its share spins while it waits for the others. The default, 300,000 rounds, takes
# the core from whoever else wants it: with one busy neighbour on two cores, 2 tokens/s instead of 40. Alone it is as
# fast with this many.
_SPIN_ROUNDS = 300


def main() -> None:
    """Load the model, say where it listens, serve until the parent ends."""
    arguments = _parser().parse_args()
    die_with_parent(signal.SIGKILL)
    on_stdin_end(lambda: os._exit(0))
    os.environ.setdefault("GOMP_SPINCOUNT", str(_SPIN_ROUNDS))  # read when llama.cpp is loaded
    import xllamacpp  # noqa: PLC0415 - an optional extra

    try:
        server = xllamacpp.Server(_parameters(arguments))
    except Exception as error:  # whatever llama.cpp raises, the parent has to hear of it
        print(json.dumps({"error": f"unable to load model: {error}"}), flush=True)
        raise SystemExit(1) from error
    print(json.dumps({"address": server.listening_address}), flush=True)
    threading.Event().wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edge_daemon.embedded.runner", description="One loaded model.")
    parser.add_argument("--model", required=True, metavar="FILE")
    parser.add_argument("--num-ctx", type=int, required=True, metavar="TOKENS")
    parser.add_argument("--num-batch", type=int, required=True, metavar="TOKENS")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--mmap", action="store_true", help="map the file instead of reading it")
    parser.add_argument("--no-shift", action="store_true", help="stop at the end of the context")
    parser.add_argument("--chat-template", default="", help="Jinja; default: the one in the file")
    return parser


def _parameters(arguments: argparse.Namespace) -> object:
    import xllamacpp  # noqa: PLC0415 - an optional extra

    parameters = xllamacpp.CommonParams()
    parameters.model.path = arguments.model
    parameters.chat_template = arguments.chat_template
    parameters.prefill_assistant = False  # the parent appends the partial answer itself, to the letter
    parameters.n_ctx = arguments.num_ctx
    parameters.n_batch = parameters.n_ubatch = min(arguments.num_batch, _LARGEST_BATCH)
    parameters.n_parallel = 1
    parameters.ctx_shift = not arguments.no_shift
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = arguments.threads
    # Weights in memory of our own, as Ollama has them on a CPU: what /api/ps calls used is really used.
    modes = xllamacpp.llama_load_mode
    parameters.load_mode = modes.LLAMA_LOAD_MODE_MMAP if arguments.mmap else modes.LLAMA_LOAD_MODE_NONE
    parameters.warmup = False  # a load must not compute: computing is for the one whose turn it is
    parameters.fit_params = False
    parameters.swa_full = True  # else a model with a sliding window, Gemma, reads what prompts have in common anew
    # What was computed for an interrupted answer is kept: continuing it costs no reading, and gives the same text.
    parameters.cache_ram_mib = _KEPT_MIB
    parameters.n_ctx_checkpoints = 0
    parameters.n_threads_http = 4
    parameters.ui = False
    parameters.verbosity = 1  # errors only
    return parameters


if __name__ == "__main__":
    main()
