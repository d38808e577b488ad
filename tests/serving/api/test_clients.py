"""Real clients, unmodified, against a live server on a real port."""

import re
import shlex
import subprocess
from pathlib import Path

import openai
import pytest
from http_testing import MESSAGES, PROMPT, live
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

from serving.api.app import create_app
from serving.engine import Engine, SamplingParams

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def engine(tiny_target, tiny_head):
    return Engine(tiny_target, tiny_head, speculation="chain", max_batch=2, max_waiting=2)


@pytest.fixture(scope="module")
def url(engine):
    with live(create_app(engine)) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def text(tiny_target):
    """The greedy answer."""
    ids = tiny_target.tokenizer(PROMPT).input_ids
    return Engine(tiny_target, speculation="off").generate([ids], SamplingParams(max_new_tokens=12))[0].text


# --- openai


def test_openai_completions_chat_and_models(client, text):
    wishes = {"model": "any", "temperature": 0}
    answer = client.completions.create(prompt=PROMPT, max_tokens=12, logprobs=1, **wishes)
    assert answer.choices[0].text == text and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens >= 0
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.top_logprobs)
    assert answer.model_extra["metrics"]["speculative_decoding"]["num_spec_tokens"] == 5
    chunks = client.completions.create(prompt=PROMPT, max_tokens=12, stream=True, **wishes)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    wishes |= {"messages": MESSAGES, "max_completion_tokens": 12}
    answer = client.chat.completions.create(**wishes, logprobs=True, top_logprobs=1)
    assert answer.choices[0].message.content == text and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].logprob < 0
    chunks = list(client.chat.completions.create(**wishes, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-1].usage == answer.usage
    plain = client.chat.completions.create(**wishes, extra_body={"speculative": {"enabled": False}})
    assert plain.choices[0].message.content == text
    assert plain.usage.completion_tokens_details.rejected_prediction_tokens == 0
    assert client.models.list().data[0].id == client.models.retrieve("tiny").id == "tiny"


def test_an_openai_answer_goes_back_into_the_conversation(client, url):
    """As the clients themselves send it, with all that an answer's message has."""
    wishes = {"model": "any", "max_tokens": 4, "temperature": 0}
    messages = [*MESSAGES]
    for content in ("more", "and more"):
        messages += [client.chat.completions.create(**wishes, messages=messages).choices[0].message]
        messages += [{"role": "user", "content": content}]
    again = client.chat.completions.create(**wishes, messages=messages)
    plain = [each if isinstance(each, dict) else {"role": each.role, "content": each.content} for each in messages]
    assert again.choices[0].message == client.chat.completions.create(**wishes, messages=plain).choices[0].message
    assert again.usage.prompt_tokens > len(MESSAGES[0]["content"]) + len("more") + len("and more")
    null = dict.fromkeys(["refusal", "audio", "function_call", "reasoning", "tool_call_id", "name", "parsed"])
    plain[1] |= null | {"annotations": [], "tool_calls": [], "reasoning_content": ""}  # as other servers' answers have
    assert again.choices[0].message == client.chat.completions.create(**wishes, messages=plain).choices[0].message
    hub = InferenceClient(model=url)
    answer = hub.chat_completion(MESSAGES, max_tokens=4, temperature=0).choices[0].message
    assert hub.chat_completion([*MESSAGES, answer, *MESSAGES], max_tokens=4, temperature=0).choices


def test_openai_errors_are_its_exception_types(client, url, tiny_target):
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        client.completions.create(model="any", prompt="a", temperature=3)
    assert bad.value.param == "temperature" and bad.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with live(create_app(Engine(tiny_target), api_key="secret")) as locked, pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{locked}/v1", api_key="wrong").models.list()


# --- huggingface_hub


def test_inference_client(url, text):
    for path in ("", "/generate"):
        client = InferenceClient(model=url + path)
        assert client.text_generation(PROMPT, max_new_tokens=12) == text
        stream = list(client.text_generation(PROMPT, max_new_tokens=12, stream=True, details=True))
        assert stream[-1].generated_text == text and stream[-1].details.finish_reason == "length"
    told = client.text_generation(PROMPT, max_new_tokens=12, details=True, stop=["\u2603"])
    assert told.generated_text == text and len(told.details.tokens) == told.details.generated_tokens == 12
    sampled = {"do_sample": True, "temperature": 0.9, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 4}
    first = client.text_generation(PROMPT, max_new_tokens=12, **sampled)
    assert first == client.text_generation(PROMPT, max_new_tokens=12, **sampled)
    with pytest.raises(ValidationError, match="max_new_tokens"):
        client.text_generation(PROMPT, max_new_tokens=10_000)
    chat = InferenceClient(model=url)
    assert chat.chat_completion(MESSAGES, max_tokens=12, temperature=0).choices[0].message.content == text
    chunks = chat.chat_completion(MESSAGES, max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


# --- curl


def readme_commands() -> list[str]:
    """The curl lines of the README and of the API's page, continued lines joined."""
    texts = [(ROOT / name).read_text().replace("\\\n", " ") for name in ("README.md", "docs/http-api.md")]
    return [line.strip() for text in texts for line in text.splitlines() if re.match(r"\s*curl ", line)]


@pytest.mark.parametrize("command", readme_commands())
def test_curl_lines_of_the_documents(url, command):
    command = command.replace("localhost:8000", url.removeprefix("http://"))
    command = [*shlex.split(command), "--fail-with-body", "-sS"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout
