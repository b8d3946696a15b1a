"""The baseline's inference server, as one would write it: FastAPI, transformers, weights in plain.

    MODEL_DIR=/srv/model uvicorn server:app --port 8000

`/generate`, `/info` and `/health` as the enclave's users know them, and OpenAI's `/v1/models`,
`/v1/completions` and `/v1/chat/completions`, each as one answer or as a stream of server-sent
events. Wrong requests get status 400, 404 or 422, as OpenAI's clients expect. One answer at a time.
"""

import dataclasses
import json
import os
import threading
import time
import uuid

import torch
import transformers
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

MODEL_DIR = os.environ.get("MODEL_DIR", "/srv/model")
NAME = os.environ.get("MODEL_NAME", "model")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTEXT = 4096  # tokens, where the model says nothing

tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype="auto").to(DEVICE)
context = getattr(model.config, "max_position_embeddings", CONTEXT)
ends = model.generation_config.eos_token_id
ends = ends if isinstance(ends, list) else [ends]
started = time.time()
one_at_a_time = threading.Lock()  # torch has one random generator, which a request may seed
app = FastAPI(title="Baseline inference server")


# ---------------------------------------------------------------- requests


class Options(BaseModel):
    """What all requests share."""

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict | None = None
    n: int = Field(default=1, ge=1, le=1)


class Generate(Options):
    """POST /generate."""

    prompt: str = Field(min_length=1)
    max_new_tokens: int = Field(default=256, ge=1)


class Completion(Options):
    """POST /v1/completions."""

    model: str = NAME
    prompt: str = Field(min_length=1)
    max_tokens: int = Field(default=256, ge=1)


class Message(BaseModel):
    """One turn of a chat."""

    role: str
    content: str


class Chat(Options):
    """POST /v1/chat/completions."""

    model: str = NAME
    messages: list[Message] = Field(min_length=1)
    max_tokens: int = Field(default=256, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)


# ---------------------------------------------------------------- generation


@dataclasses.dataclass
class Answer:
    """An answer's figures; complete when its last piece has been read."""

    prompt_tokens: int
    completion_tokens: int = 0
    finish_reason: str = "stop"

    def usage(self):
        """OpenAI's `usage`."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


def generate(ids, limit, options):
    """Start an answer to a prompt, a tensor (1, length). Returns (Answer, iterator of text)."""
    length = ids.shape[1]
    if length >= context:
        raise HTTPException(400, f"the prompt has {length} tokens, the model takes {context}")
    answer = Answer(length)
    return answer, cut(run(ids, min(limit, context - length), options, answer), options, answer)


def run(ids, limit, options, answer):
    """The text of an answer in pieces. The model runs in a thread, which ends with its reader."""
    streamer = transformers.TextIteratorStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True
    )
    gone, failures = threading.Event(), []
    sampling = {"do_sample": options.temperature > 0}
    if sampling["do_sample"]:
        sampling |= {"temperature": options.temperature, "top_p": options.top_p}

    def is_over(tokens, scores, **_):
        answer.completion_tokens = tokens.shape[1] - answer.prompt_tokens
        is_full = answer.completion_tokens >= limit and int(tokens[0, -1]) not in ends
        answer.finish_reason = "length" if is_full else "stop"
        return torch.full((1,), gone.is_set(), device=tokens.device)

    def work():
        try:
            with one_at_a_time:
                if gone.is_set():
                    return
                if options.seed is not None:
                    torch.manual_seed(options.seed)
                model.generate(
                    ids.to(DEVICE),
                    attention_mask=torch.ones_like(ids).to(DEVICE),
                    max_new_tokens=limit,
                    streamer=streamer,
                    stopping_criteria=[is_over],
                    pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                    **sampling,
                )
        except Exception as failure:
            failures.append(failure)
            streamer.end()

    threading.Thread(target=work, daemon=True).start()
    try:
        yield from streamer
    finally:
        gone.set()
    if failures:
        raise failures[0]


def cut(pieces, options, answer):
    """Those pieces up to the first stop string. What may be a part of one waits for the next."""
    stops = [options.stop] if isinstance(options.stop, str) else options.stop or []
    stops = [stop for stop in stops if stop]
    kept = max(map(len, stops), default=1) - 1
    held = ""
    for piece in pieces:
        held += piece
        found = [held.index(stop) for stop in stops if stop in held]
        if found:
            pieces.close()
            answer.finish_reason = "stop"
            yield held[: min(found)]
            return
        ready = len(held) - kept
        if ready > 0:
            yield held[:ready]
            held = held[ready:]
    yield held


# ---------------------------------------------------------------- /generate, /info, /health


@app.post("/generate")
def post_generate(request: Generate):
    """Complete a prompt; as a stream, a line of JSON for each piece."""
    began = time.monotonic()
    ids = tokenizer(request.prompt, return_tensors="pt").input_ids
    answer, pieces = generate(ids, request.max_new_tokens, request)

    def end(text):
        elapsed = round((time.monotonic() - began) * 1000)
        reason = answer.finish_reason
        last = {"completion": text, "elapsed_ms": elapsed, "finish_reason": reason}
        return last | {"usage": answer.usage()}

    def lines():
        whole = ""
        for piece in pieces:
            whole += piece
            yield json.dumps({"text": piece}) + "\n"
        yield json.dumps(end(whole)) + "\n"

    if request.stream:
        return StreamingResponse(lines(), media_type="application/x-ndjson")
    return end("".join(pieces))


@app.get("/info")
def get_info():
    """What runs here."""
    return {
        "model": NAME,
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": DEVICE,
        "context": context,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "uptime_seconds": round(time.time() - started),
    }


@app.get("/health")
def get_health():
    """200 while it answers."""
    return {"status": "ok"}


# ---------------------------------------------------------------- OpenAI's


def check_model(name):
    """Refuse a model that is not here."""
    if name != NAME:
        raise HTTPException(404, f"there is no model {name}; this is {NAME}")


def respond(kind, prefix, request, answer, pieces, first, part, whole):
    """An answer in OpenAI's form. first: choices that open a stream; part(text), whole(text)."""
    head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": NAME}
    streamed = "chat.completion.chunk" if kind == "chat.completion" else kind

    def event(choices, **more):
        chunk = head | {"object": streamed, "choices": choices} | more
        return f"data: {json.dumps(chunk)}\n\n"

    def choice(**fields):
        return [{"index": 0, "finish_reason": None} | fields]

    def events():
        if first:
            yield event(choice(**first))
        for text in pieces:
            if text:
                yield event(choice(**part(text)))
        yield event(choice(**part(""), finish_reason=answer.finish_reason))
        if (request.stream_options or {}).get("include_usage"):
            yield event([], usage=answer.usage())
        yield "data: [DONE]\n\n"

    if request.stream:
        return StreamingResponse(events(), media_type="text/event-stream")
    text = "".join(pieces)
    choices = choice(**whole(text), finish_reason=answer.finish_reason)
    return JSONResponse(head | {"object": kind, "choices": choices, "usage": answer.usage()})


@app.get("/v1/models")
def get_models():
    """The one model."""
    one = {"id": NAME, "object": "model", "created": int(started), "owned_by": "baseline"}
    return {"object": "list", "data": [one]}


@app.post("/v1/completions")
def post_completions(request: Completion):
    """Complete a prompt."""
    check_model(request.model)
    ids = tokenizer(request.prompt, return_tensors="pt").input_ids
    answer, pieces = generate(ids, request.max_tokens, request)

    def part(text):
        return {"text": text, "logprobs": None}

    return respond("text_completion", "cmpl", request, answer, pieces, {}, part, part)


@app.post("/v1/chat/completions")
def post_chat(request: Chat):
    """Answer a chat."""
    check_model(request.model)
    messages = [message.model_dump() for message in request.messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise HTTPException(400, f"the chat template refuses this chat: {error}") from None
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    limit = request.max_completion_tokens or request.max_tokens
    answer, pieces = generate(ids, limit, request)
    first = {"delta": {"role": "assistant", "content": ""}}
    return respond(
        "chat.completion",
        "chatcmpl",
        request,
        answer,
        pieces,
        first,
        lambda text: {"delta": {"content": text} if text else {}},
        lambda text: {"message": {"role": "assistant", "content": text}},
    )
