"""One contender of tools/bench.py decode, as a process of its own: it loads a model once, says what
it is, then answers each line of JSON with a round's tokens and when they came.

    bench_contender.py KIND MODEL THREADS DEVICE     the first line out: {"versions", "weights"}
    {"prompts": [[id]], "tokens": N}                 {"ids": [[id]], "times": [[seconds]],
                                                      "cpu": seconds, "peak_kib": KiB}

All prompts of a round come at once, at second 0; every answer has N tokens, the likeliest each
time. Runs in the project's virtual environment (muenclave, bandwidth) or the peers' (the others).
"""

import importlib.metadata
import json
import mmap
import os
import pathlib
import re
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ALIGNMENT = 64  # bytes, of a tensor in the arena
ROWS = 32  # streams at once, at most
CONTEXT = 512  # tokens of a stream, at most
READ = 1 << 30  # bytes that a measurement of the bandwidth reads
PASSES = 3  # of which the fastest counts: it is a limit
PAGE = 256  # tokens, transformers' default


class Clock:
    """Notes when tokens come, for each stream of a round that begins now."""

    def __init__(self, count):
        self.times, self.ids = [[] for _ in range(count)], [[] for _ in range(count)]
        self.began, self.cpu = time.perf_counter(), time.process_time()

    def note(self, stream, *tokens):
        """A stream has got these tokens."""
        now = time.perf_counter() - self.began
        self.ids[stream] += tokens
        self.times[stream] += [round(now, 6)] * len(tokens)

    def result(self):
        """The round, for its answer."""
        return {"ids": self.ids, "times": self.times, "cpu": time.process_time() - self.cpu}


def peak_kib(device):
    """The most memory that this process has had, or torch on the GPU, in KiB."""
    if device != "cpu" and "torch" in sys.modules:
        return sys.modules["torch"].cuda.max_memory_allocated() // 1024
    text = pathlib.Path("/proc/self/status").read_text("ascii", errors="replace")
    return int(re.search(r"^VmHWM:\s+(\d+) kB", text, re.M)[1])


def weights_of(model):
    """Bytes of a torch model's weights, shared ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


# ---------------------------------------------------------------- ours


class Ours:
    """The engine's model and decoder, as in an enclave, without the processes around it."""

    packages = ("torch", "transformers")

    def __init__(self, folder, threads, device):
        import muenclave

        sys.path.insert(0, str(ROOT / "tools"))
        import weights

        names = ("config.json", "generation_config.json")
        fields, generation = (json.loads((folder / name).read_text("utf-8")) for name in names)
        settings = {"ENCLAVE_SLOTS": ROWS, "ENCLAVE_CONTEXT": CONTEXT, "ENCLAVE_DEVICE": device}
        settings |= {"ENCLAVE_THREADS": threads}
        settings = muenclave.DEFAULTS | {name: str(value) for name, value in settings.items()}
        facts = weights.make_facts([], fields, generation)
        place = muenclave.find_place(device)
        muenclave.warm_up(fields["model_type"], settings, place)
        model = muenclave.build_model(fields, read_arena(folder), place)
        self.weights = weights_of(model)
        self.decoder = muenclave.Decoder(model, facts, Ids(), settings, None)

    def run(self, prompts, tokens, clock):
        """A round."""
        import muprotocol as mp

        decoder = self.decoder
        options = {"seed": 0, "temperature": 0, "max_new_tokens": tokens}
        for slot, prompt in enumerate(prompts):
            decoder.take({"slot": slot, "prompt": prompt} | options)
        while decoder.streams:
            decoder.step()
            for kind, slot, value in mp.PIPE.iter_unpack(bytes(decoder.out)):
                if kind == mp.ID:
                    clock.note(slot, value)
            decoder.out.clear()


def read_arena(folder):
    """The model's tensors in a file in memory, mapped as the engine maps the loader's arena."""
    import torch
    from safetensors.torch import load_file

    state, places, end = {}, {}, 0
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    for name, tensor in state.items():
        places[name] = end
        end = -(-(end + tensor.nbytes) // ALIGNMENT) * ALIGNMENT
    arena = os.memfd_create("arena")
    os.ftruncate(arena, end)
    for name, tensor in state.items():
        os.pwrite(arena, tensor.flatten().view(torch.uint8).numpy(), places[name])
    memory = mmap.mmap(arena, end, mmap.MAP_PRIVATE | mmap.MAP_POPULATE, mmap.PROT_READ)
    os.close(arena)
    for name, tensor in state.items():
        place = {"count": tensor.numel(), "offset": places[name]}
        state[name] = torch.frombuffer(memory, dtype=tensor.dtype, **place).view(tensor.shape)
    return state


class Ids:
    """In a prompter's place: prompts are ids already."""

    def encode(self, request):
        """The prompt's ids."""
        return list(request["prompt"])


# ---------------------------------------------------------------- transformers


class Generate:
    """transformers' generate, a prompt after the other."""

    packages = ("torch", "transformers")

    def __init__(self, folder, threads, device):
        import torch
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=device)
        self.model, self.weights = model.eval(), weights_of(model)

    def run(self, prompts, tokens, clock):
        """A round."""
        for number, prompt in enumerate(prompts):
            self.generate([prompt], tokens, clock, number)

    def generate(self, prompts, tokens, clock, first=0):
        """One call of generate, of prompts of one length."""
        import torch

        def note(ids, scores, **_):
            for row, token in enumerate(ids[:, -1].tolist(), first):
                clock.note(row, token)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        inputs = torch.tensor(prompts, device=self.model.device)
        options = {"do_sample": False, "max_new_tokens": tokens, "stopping_criteria": [note]}
        self.model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)


class Static(Generate):
    """transformers' generate, all prompts of a round as one batch."""

    def run(self, prompts, tokens, clock):
        """A round."""
        self.generate(prompts, tokens, clock)


class Continuous(Generate):
    """transformers' continuous batching, its cache sized by hand: by itself it takes a minute."""

    def __init__(self, folder, threads, device):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        super().__init__(folder, threads, device)
        sizes = {"num_blocks": 2 * ROWS * CONTEXT // PAGE, "max_batch_tokens": ROWS * PAGE // 4}
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
        config = ContinuousBatchingConfig(**sizes)
        self.manager = self.model.init_continuous_batching(generation, config)
        self.manager.start()

    def run(self, prompts, tokens, clock):
        """A round."""
        add = self.manager.add_request
        names = [add(prompt, max_new_tokens=tokens, streaming=True) for prompt in prompts]
        running = {name: number for number, name in enumerate(names)}
        while running:
            output = self.manager.get_result(timeout=60)
            if output is None or output.error:
                raise RuntimeError(output.error if output else "no result in 60 seconds")
            stream = running[output.request_id]
            clock.note(stream, *output.generated_tokens[len(clock.ids[stream]) :])
            if output.is_finished():
                del running[output.request_id]

    def close(self):
        """End its thread."""
        self.manager.stop(block=True)


# ---------------------------------------------------------------- llama.cpp


class Llama:
    """llama.cpp, a batch with a sequence for each stream."""

    packages = ("llama_cpp_python",)

    def __init__(self, path, threads, device):
        import llama_cpp

        self.api = llama_cpp
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.silence, None)
        llama_cpp.llama_backend_init()
        if device != "cpu" and not llama_cpp.llama_supports_gpu_offload():
            raise RuntimeError("this llama.cpp was built without a GPU")
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0 if device == "cpu" else 1000
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not model:
            raise RuntimeError("llama.cpp can't load the model")
        self.weights = llama_cpp.llama_model_size(model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_seq_max = ROWS * CONTEXT, ROWS
        options.n_batch = ROWS * CONTEXT
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, options)
        if not self.context:
            raise RuntimeError("llama.cpp has no memory for its context")
        self.batch = llama_cpp.llama_batch_init(ROWS * CONTEXT, 0, 1)

    def run(self, prompts, tokens, clock):
        """A round."""
        api, count = self.api, len(prompts)
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        chosen, position = self.decode(prompts, 0), len(prompts[0])
        for _ in range(tokens - 1):
            self.note(chosen, clock)
            chosen = self.decode([[token] for token in chosen], position)
            position += 1
        self.note(chosen, clock)
        assert count == len(chosen)

    def note(self, chosen, clock):
        """Each stream has got its next token."""
        for stream, token in enumerate(chosen):
            clock.note(stream, token)

    def decode(self, rows, start):
        """The likeliest token after each stream's next ones, which begin at a position."""
        import numpy

        batch, count, lasts = self.batch, 0, []
        for stream, row in enumerate(rows):
            for offset, token in enumerate(row):
                batch.token[count], batch.pos[count] = token, start + offset
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, stream
                batch.logits[count] = offset + 1 == len(row)
                count += 1
            lasts.append(count - 1)
        batch.n_tokens = count
        if self.api.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp can't decode")
        shape = (self.vocabulary,)
        logits = (self.api.llama_get_logits_ith(self.context, last) for last in lasts)
        return [int(numpy.ctypeslib.as_array(row, shape).argmax()) for row in logits]


# ---------------------------------------------------------------- the limit


class Bandwidth:
    """How fast memory is read: a sum over a buffer that no cache holds. No prompts, no tokens."""

    packages = ("torch",)
    weights = 0

    def __init__(self, _, threads, device):
        import torch

        torch.set_num_threads(threads)
        self.device = device
        self.buffer = torch.ones(READ // 4, device=device)
        self.rate = 0

    def run(self, prompts, tokens, clock):
        """Measure."""
        seconds = []
        for _ in range(PASSES):
            began = time.perf_counter()
            self.buffer.sum().item()  # which waits for a GPU
            seconds.append(time.perf_counter() - began)
        self.rate = READ / min(seconds)


KINDS = {"muenclave": Ours, "generate": Generate, "static": Static, "continuous": Continuous}
KINDS |= {"llama": Llama, "bandwidth": Bandwidth}


def main():
    """Load, then a round for each line."""
    kind, model, threads, device = sys.argv[1:]
    out, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is not an answer
    contender = KINDS[kind](pathlib.Path(model), int(threads), device)
    versions = {name: importlib.metadata.version(name) for name in contender.packages}
    facts = {"versions": versions, "weights": contender.weights}
    print(json.dumps(facts), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        clock = Clock(len(request["prompts"]))
        contender.run(request["prompts"], request["tokens"], clock)
        facts = {"rate": getattr(contender, "rate", None), "peak_kib": peak_kib(device)}
        print(json.dumps(clock.result() | facts), file=out, flush=True)
    if hasattr(contender, "close"):
        contender.close()


if __name__ == "__main__":
    main()
