"""OpenAI's client, streaming, as a process of its own, for tools/bench.py http.

    bench_client.py                          says {"versions"}
    {"base", "key", "model", "prompts": [text], "tokens": N}
                                             {"times": [[seconds]], "finish": [...], "usage": [...]}

All prompts of a round are asked at once, at second 0, each on a connection that stays open; times
are of the pieces of text that are not empty. usage is what the server says, null if it doesn't.
"""

import asyncio
import importlib.metadata
import json
import sys
import time

import openai

SECONDS = 600  # for an answer


async def ask(client, request, prompt, began):
    """One answer: (times, why it ended, usage)."""
    chat = [{"role": "user", "content": prompt}]
    options = {"model": request["model"], "messages": chat, "max_tokens": request["tokens"]}
    options |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    times, finish, usage = [], None, None
    async for chunk in await client.chat.completions.create(**options):
        if chunk.usage is not None:
            usage = {"in": chunk.usage.prompt_tokens, "out": chunk.usage.completion_tokens}
        for choice in chunk.choices:
            if choice.delta.content:
                times.append(round(time.perf_counter() - began, 6))
            finish = choice.finish_reason or finish
    return times, finish, usage


async def run(clients, request):
    """A round."""
    address = (request["base"], request["key"])
    if address not in clients:
        options = {"base_url": address[0], "api_key": address[1]}
        clients[address] = openai.AsyncOpenAI(**options, timeout=SECONDS, max_retries=0)
    began = time.perf_counter()
    asked = [ask(clients[address], request, prompt, began) for prompt in request["prompts"]]
    answers = await asyncio.gather(*asked)
    taken = time.perf_counter() - began
    times, finish, usage = zip(*answers, strict=True)
    return {"seconds": taken, "times": times, "finish": finish, "usage": usage}


async def main():
    """Answer each line; a round that fails is told as {"error"}."""
    clients, loop = {}, asyncio.get_running_loop()
    print(json.dumps({"versions": {"openai": importlib.metadata.version("openai")}}), flush=True)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        try:
            result = await run(clients, json.loads(line))
        except openai.OpenAIError as error:
            result = {"error": " ".join(str(error).split()) or type(error).__name__}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
