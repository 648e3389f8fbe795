"""Chat templates of the model families that configurations are for, written after the published ones.

Each keeps what is peculiar to its family; what only concerns tools and images is left out.
"""

from __future__ import annotations

QWEN_2_5 = (  # puts its own system prompt where there is none
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role in ('user', 'assistant') or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
_LLAMA = (  # a system turn with dates always, contents without spaces around them
    "{{- '<|begin_of_text|>' }}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
    "{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\n' }}{{- 'Today Date: ' + DATE + '\n\n' }}"
    "{{- system_message }}{{- '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA_3_1 = _LLAMA.replace("DATE", "'26 Jul 2024'")
LLAMA_3_2 = _LLAMA.replace("DATE", "strftime_now('%d %b %Y')")
MISTRAL_7B = (  # the system message moves into the last user turn; a space in front of the model's words
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- '<s>' }}"
    "{%- for message in loop_messages %}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('roles must alternate') }}{%- endif %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] + '</s>' }}{%- endif %}"
    "{%- endfor %}"
)
MISTRAL_SMALL = (  # its own system prompt, with today's date, where there is none
    "{%- set default_system_message = 'You are Mistral Small 3. Today is ' + strftime_now('%Y-%m-%d') + '.' %}"
    "{{- '<s>' }}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
    "{%- else %}{%- set system_message = default_system_message %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}"
    "{%- for message in loop_messages %}"
    "{%- if message['role'] == 'user' %}{{- '[INST]' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- message['content'] + '</s>' }}{%- endif %}"
    "{%- endfor %}"
)
GEMMA_3 = (  # no system role: the system message becomes the beginning of the first user turn; the model is `model`
    "{{ '<bos>' }}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set first_user_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
GEMMA_2 = GEMMA_3.replace(  # refuses a system message
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}",
    "{{ raise_exception('System role not supported') }}",
)

FAMILIES = {
    "qwen2.5": QWEN_2_5,
    "llama-3.1": LLAMA_3_1,
    "llama-3.2": LLAMA_3_2,
    "mistral-7b": MISTRAL_7B,
    "mistral-small": MISTRAL_SMALL,
    "gemma-2": GEMMA_2,
    "gemma-3": GEMMA_3,
}
FOLDED = {"mistral-7b", "gemma-2"}
"""Families whose templates do not take a system message where it is: the instructions begin the first user turn."""
ENDS_OF_TURNS = ("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>")
