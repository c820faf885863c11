"""Uses a server of ours as an application does, with the `openai` package: `openai_client.py URL`.

The server has the model `mock` with the adapter `tuned`, blocks of 4 tokens and no cached prompt. Ends with
a traceback if something is not as it is with vLLM.
"""

import sys

import openai


def counted(usage, completion_tokens):
    """Checks that a usage adds up; returns its prompt tokens and how many of them were cached."""
    assert usage.completion_tokens == completion_tokens, usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    return usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens


def models(client):
    listed = {model.id for model in client.models.list()}
    assert listed == {"mock", "tuned"}, listed


def completions(client, model):
    ask = {
        "model": model,
        "prompt": f"The {model} engine is asked the same thing twice, and a third time in a stream.",
        "max_tokens": 5,
    }
    first = client.completions.create(**ask)
    assert first.model == model and first.object == "text_completion", first
    assert first.choices[0].finish_reason == "length", first
    prompt, cached = counted(first.usage, 5)
    assert prompt > 8 and cached == 0, first.usage

    second = client.completions.create(**ask)
    assert second.choices[0].text == first.choices[0].text
    # Whole blocks, and never the last token.
    expected = (prompt - 1) // 4 * 4
    assert counted(second.usage, 5) == (prompt, expected), second.usage

    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
    assert text == first.choices[0].text, (text, first)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "length" and not any(reasons[:-1]), reasons
    usages = [chunk.usage for chunk in chunks if chunk.usage]
    assert len(usages) == 1 and usages[0] == chunks[-1].usage, usages
    assert counted(usages[0], 5) == (prompt, expected), usages

    tokens = client.completions.create(model=model, prompt=list(range(1, 13)), max_tokens=1)
    assert tokens.usage.prompt_tokens == 12, tokens


def chats(client):
    ask = {
        "model": "mock",
        "messages": [
            {"role": "system", "content": "You answer with whatever comes to your mind."},
            {"role": "user", "content": "Well then, what does?"},
        ],
        "max_tokens": 4,
    }
    first = client.chat.completions.create(**ask)
    message = first.choices[0].message
    assert message.role == "assistant" and message.content, first
    prompt, cached = counted(first.usage, 4)
    assert cached == 0, first.usage

    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == message.content, (text, message)
    assert counted(chunks[-1].usage, 4) == (prompt, (prompt - 1) // 4 * 4), chunks[-1]
    # Nothing about usage unless it is asked for.
    plain = list(client.chat.completions.create(**ask, stream=True))
    assert all(chunk.usage is None for chunk in plain), plain

    # The next turn has the one before as its prefix.
    messages = [*ask["messages"], message.model_dump(include={"role", "content"}), {"role": "user", "content": "Go on."}]
    later = client.chat.completions.create(**{**ask, "messages": messages})
    longer, cached = counted(later.usage, 4)
    assert longer > prompt and cached > 0, later.usage


def errors(client):
    def fails(kind, call):
        try:
            call()
        except kind as error:
            return error
        raise AssertionError(f"no {kind.__name__}")

    unknown = fails(
        openai.NotFoundError,
        lambda: client.completions.create(model="nobody", prompt="a", max_tokens=1),
    )
    assert "nobody" in str(unknown), unknown
    too_long = fails(
        openai.BadRequestError,
        lambda: client.completions.create(model="mock", prompt="a", max_tokens=10**6),
    )
    assert "maximum context length" in str(too_long), too_long


def main():
    # No retries: what fails has to be seen.
    client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0, timeout=30)
    models(client)
    completions(client, "mock")
    completions(client, "tuned")
    chats(client)
    errors(client)
    print("ok, openai", openai.__version__)


main()
