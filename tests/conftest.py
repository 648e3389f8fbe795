"""Tiny tokenizers that are built in milliseconds, an S3 server, and a look at what tests leave behind.

`tokenizer` knows nothing of the agent's tags; `tag_tokenizer` holds each tag as one (not special) token;
`chat_tokenizer` has special tokens and a chat template, `chat_templates` has more templates for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# A slow or busy machine is no reason for a property test to fail.
settings.register_profile("exsearch", deadline=None)
settings.load_profile("exsearch")

TAGS = [
    f"<{slash}{name}>" for name in ("think", "search", "select", "record", "answer") for slash in ("", "/")
]
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
]
TRAINING_TEXT = [
    "Question: Who founded the maker of the Silver Harp?",
    "<think> Which company makes the Silver Harp? </think>",
    "<search>\n[1] Silver Harp: The Silver Harp is made by Orvane.\n</search>",
    "<record> Orvane was founded by Mara Velin in 1984. </record>",
    "<answer> Mara Velin </answer>",
]

QWEN = (
    "{%- if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "<|begin_of_text|>{%- for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_3_1 = (  # prints today's date into the system turn
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "Today Date: {{ date_string }}\n\n{{ messages[0].content }}<|eot_id|>"
    "{%- for message in messages[1:] %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
THINKING = (  # opens a thought in the generation prompt, and takes the thoughts out of earlier turns
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
NOT_THINKING = THINKING.replace("<think>\n{%", "<think>\n\n</think>\n\n{%")
MISTRAL = (
    "<s>{%- for message in messages %}"
    "{%- if message.role == 'system' %}{{ raise_exception('no system role') }}"
    "{%- elif message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{%- else %} {{ message.content }}</s>{%- endif %}{%- endfor %}"
)
MISTRAL_LAST_USER_SYSTEM = (  # Mistral-7B-Instruct-v0.3: the system message moves into the last user turn
    "<s>{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{%- for message in loop_messages %}"
    "{%- if message.role == 'user' %}[INST]"
    "{%- if loop.last and system is defined %} {{ system }}\n\n{%- endif %}"
    " {{ message.content }} [/INST]"
    "{%- else %} {{ message.content }}</s>{%- endif %}{%- endfor %}"
)


def _byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT * 4, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE, tags are plain text."""
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level_bpe(), eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def tag_tokenizer() -> Any:
    """Byte-level BPE, each tag is one added token that is not special."""
    built = PreTrainedTokenizerFast(tokenizer_object=_byte_level_bpe(), eos_token="<|endoftext|>")
    built.add_tokens(TAGS)
    return built


@pytest.fixture(scope="session")
def chat_templates() -> dict[str, str]:
    return {
        "qwen": QWEN,
        "llama-3": LLAMA_3,
        "llama-3.1": LLAMA_3_1,
        "thinking": THINKING,
        "not thinking": NOT_THINKING,
        "mistral": MISTRAL,
        "mistral-v0.3": MISTRAL_LAST_USER_SYSTEM,
    }


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    """Byte-level BPE with special tokens and a Qwen-like chat template."""
    built = PreTrainedTokenizerFast(tokenizer_object=_byte_level_bpe(), eos_token="<|im_end|>")
    built.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    built.chat_template = QWEN
    return built


@pytest.fixture(scope="session")
def crossing_tokenizer() -> Any:
    """Its tokens `>"` and ` "</` hold the end of a tag and what stands beside it, as some of Gemma's do."""
    bpe = _byte_level_bpe()
    state = json.loads(bpe.to_str())
    for left, right in ((">", '"'), (">", "(")):
        state["model"]["vocab"][left + right] = len(state["model"]["vocab"])
        state["model"]["merges"].insert(0, [left, right])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of an S3 server with the bucket `bucket`."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    credentials = {"aws_access_key_id": "id", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=endpoint, **credentials).create_bucket(Bucket="bucket")
    yield endpoint
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL on that server, with the environment that a user sets."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return f"s3://bucket/runs/{uuid.uuid4().hex}"


OURS = ("raylet", "gcs_server", "ray::", "VLLM", "pipeline.cli", "with_moments")
"""In the command lines of processes that must not outlive the tests."""
GRACE_S = 60.0


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Whatever the tests have started, by whatever parent, ends with them, and so do its segments of shared memory."""
    mark, before = uuid.uuid4().hex, segments()
    os.environ["EXSEARCH_TESTS"] = mark
    yield
    deadline = time.monotonic() + GRACE_S
    while (left := [*started_with(mark), *(segments() - before - mapped())]) and time.monotonic() < deadline:
        time.sleep(1)
    assert left == []


def started_with(mark: str) -> list[str]:
    """Command lines of processes that have inherited it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if any(ours in words for ours in OURS) and process.environ().get("EXSEARCH_TESTS") == mark:
                found.append(words)
    return found


def segments() -> set[str]:
    """Shared memory with the names that Python gives it."""
    return {str(path) for path in Path("/dev/shm").glob("psm_*")}


def mapped() -> set[str]:
    """Those that a process, of other tests perhaps, uses."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found |= {mapping.path for mapping in process.memory_maps()}
    return found
