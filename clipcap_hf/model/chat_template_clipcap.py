"""The chat template of captioners whose language model has none of its own."""

import json


# Images and videos become the prompt template, texts stay unchanged; the assistant's words are marked for loss masks.
_CHAT_TEMPLATE = """{%- macro render(content) -%}
{%- if content is string %}{{ content }}
{%- else %}{%- for part in content %}
{%- if part['type'] in ('image', 'video') %}{{ PROMPT_TEMPLATE }}{%- else %}{{ part['text'] }}{%- endif %}
{%- endfor %}{%- endif %}
{%- endmacro -%}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}{% generation %}{{ render(message['content']) }}{% endgeneration %}
{%- else %}{{ render(message['content']) }}{%- endif %}
{%- endfor %}"""


def default_chat_template(prompt_template: str) -> str:
    """Make the template that joins the messages of a chat, with the prompt template in place of images and videos."""
    return _CHAT_TEMPLATE.replace("PROMPT_TEMPLATE", json.dumps(prompt_template))


__all__ = ["default_chat_template"]
